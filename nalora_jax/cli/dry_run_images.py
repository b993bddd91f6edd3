"""``nalora train --dry-run`` of image and text encoders, from their configs and the images."""

from __future__ import annotations

import math
from typing import Any

import jax

from nalora_jax import trees
from nalora_jax.cli.dry_run import mechanisms_text
from nalora_jax.config import RunConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import init_lora
from nalora_jax.runs.dual_pieces import held_out_indices, image_records
from nalora_jax.runs.hooks import say_counts
from nalora_jax.train.dual import resolve_dual
from nalora_jax.train.settle import settled
from nalora_jax.weights.vision.model import read_dual


def describe_images(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Returns the final settings of a run on images, and lines that describe the run.

    Raises:
      NaloraError: any error that a run would raise before it reads weights.
    """
    records, held_out = image_records(config)
    config = settled(config, None, images=len(records.indices))
    base = read_dual(config.model, d_out=config.vision.features, loss=config.vision.loss)
    spec = resolve_dual(config, base)
    reported, selecting = held_out_indices(config, held_out)
    say_counts(len(reported), len(selecting), chosen=config.train.eval_every > 0)
    total, trained = sum(map(math.prod, base.param_shapes().values())), _trained(base, spec)
    of = f"{len(records.classes)} classes, " if records.classes else ""
    epochs = config.steps * config.train.batch_size / len(records.indices)
    weights = config.compute.itemsize * total
    held = f"{4 * trained / 1e9:.2f} GB each for trained parameters, their gradients and what the optimizer remembers"
    return config, [
        f"base model: {total:,} parameters, {config.model}",
        f"trained parameters: {trained:,}, on {len(spec.targets)} projections a layer of both towers",
        f"mechanisms: {mechanisms_text(config, base.towers['image'].activation, spec)}",
        f"training data: {of}{len(records.indices)} images of {len(records.source)}",
        f"held out: {len(reported)} images that results are reported on, {len(selecting)} that choose the checkpoint",
        f"steps: {config.steps} of {config.train.batch_size} images, {epochs:.2f} epochs",
        f"memory: {weights / 1e9:.2f} GB for the weights, {held}; activations are not estimated",
    ]


def _trained(base: DualConfig, spec: AdapterSpec) -> int:
    """Returns the number of trained parameters."""
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in base.param_shapes().items()}
    lora: Any = jax.eval_shape(
        lambda key, params: init_lora(base, spec, key, params), jax.random.key(0), trees.unflatten(shapes)
    )
    return trees.count(lora)
