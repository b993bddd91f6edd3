"""Settings and checks of a run before its model is loaded: data, steps, learning rate, mesh and
rules."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nalora_jax.assembly.optimizers import resolve_learning_rate
from nalora_jax.assembly.program import check_decoder
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.forms import form_of
from nalora_jax.data.source import MixedSource, SelectedSource, Source
from nalora_jax.data.sources import have_same_records, open_pair
from nalora_jax.data.tokenizer import AddedTokens, Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import Inputs, run_kind
from nalora_jax.mesh import distributed
from nalora_jax.models.adapters import check_token_indices
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.model_files import ModelFiles

log = logging.getLogger(__name__)

_EVAL_EVERY = 50  # largest automatic interval between evaluations, in steps


def resolve_base(config: RunConfig) -> ResolvedSource:
    """Returns the files of a run's base model, with the RoPE scaling of its settings.

    Raises:
      NaloraError: the model is not found.
    """
    return replace(resolve_source(config.model), rope_scaling=config.rope_scaling)


class BaseFacts(NamedTuple):
    """Facts about the base model of a run, known before its weights are read."""

    config: ModelConfig  # with rows for added tokens
    tokenizer: Tokenizer  # with added tokens
    adapters: AdapterSpec


def describe_base(config: RunConfig, files: ModelFiles) -> BaseFacts:
    """Returns architecture, tokenizer and adapters of a run on opened files.

    Raises:
      NaloraError: rules that match nothing, or that the base has no place for.
    """
    added = AddedTokens.of(config.data)
    base = files.described(added)
    adapters = run_kind(config).adapters(config, base)
    return BaseFacts(base, files.tokenizer_with(added), adapters)


def open_records(
    data: DataConfig, source: Mapping[str, Source] | None = None
) -> tuple[Source, Source]:
    """Opens the training and the held-out records, reads the first of each and logs their form.

    Raises:
      NaloraError: a missing data set, file or split, an empty one, an invalid first record, or
        shared records.
    """
    train, held_out = open_pair(data, source=source)
    ((first, *_), _) = train.read([0]), held_out.read([0])
    form = form_of(first, data)
    log.info("%s: %s", train.name, form or f"fields {', '.join(first)}")
    if isinstance(train, MixedSource):
        log.info("records of an epoch: %s", train.describe())
    drawn = [
        selected for selected in held_out.parts if isinstance(selected, SelectedSource)
    ]
    if drawn:
        log.info(
            "no split is held out, so some records are, by a fixed draw: %s",
            "; ".join(part.name for part in drawn),
        )
    if have_same_records(train, held_out):
        log.warning(
            "--data.eval-split %s holds the records that are trained on: the evaluation shows "
            "what was memorized, not how the model does on new records",
            held_out.name,
        )
    return train, held_out


def settle_schedule(
    config: RunConfig, width: int, examples: int, noun: str
) -> RunConfig:
    """Returns ``config`` with concrete steps, learning rate and evaluation interval.

    Args:
      config: the run's settings.
      width: of the decoder's hidden states; 0 for image and text encoders.
      examples: number of rows or images in an epoch.
      noun: their name in the log.

    Raises:
      NaloraError: an optimizer without an automatic learning rate.
    """
    if config.epochs:
        batch = config.train.batch_size
        steps = max(1, math.ceil(config.epochs * examples / batch))
        unit = "epoch" if config.epochs == 1 else "epochs"
        message = "%g %s of %d %s: %d steps of %d"
        log.info(message, config.epochs, unit, examples, noun, steps, batch)
        config = replace(config, steps=steps)
    if not config.optimizer.learning_rate:
        config = resolve_learning_rate(config, width, run_kind(config).rate)
        log.info("learning rate %g", config.optimizer.learning_rate)
    every = config.train.eval_every
    if every < 0:
        # Automatic: at least one evaluation before the last step.
        every = min(_EVAL_EVERY, max(config.steps // 2, 1))
    return replace(config, train=replace(config.train, eval_every=every))


def stream_shape(config: RunConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Returns batch size, micro-batches and seed of the training rows, and with a mesh the rows of
    this process."""
    train = config.train
    shape = {
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "seed": config.seed,
    }
    if mesh is None:
        return shape
    rows = distributed.process_rows(mesh, train.batch_size // train.accumulate)
    return shape | {"rows": tuple(rows.tolist())}


def check_longest(longest: int, base: ModelConfig) -> None:
    """Checks that the longest example of the training data fits the model's context.

    Raises:
      NaloraError: the example is longer.
    """
    context = base.max_positions
    if longest > context:
        raise NaloraError(
            "training data",
            expected=f"examples of at most {context} tokens, the model's context",
            found=f"one of {longest}",
            remedy=f"set --data.max-length to {context} or less, or extend the context by "
            "--model.rope-scaling",
        )


def check_layout(placed: RunConfig, inputs: Inputs, mesh: Mesh) -> None:
    """Checks that the model fits the mesh and the rules, from its config files only.

    Args:
      placed: the run's settings with a concrete layout.
      inputs: of the run, on a decoder.
      mesh: the devices.

    Raises:
      NaloraError: an axis that splits a head or a row that must be whole, rows that the mesh does
        not divide, rules that match nothing, an added token without a trained row, or a trained row
        without a token.
    """
    assert inputs.base is not None
    assert inputs.files is not None
    assert inputs.adapters is not None
    check_decoder(placed, inputs.base, mesh)
    # Raises the error of a mesh that does not divide the rows.
    distributed.process_rows(mesh, placed.train.batch_size // placed.train.accumulate)
    _check_rows(placed, inputs.files, inputs.base, inputs.adapters)


def _check_rows(
    config: RunConfig, files: ModelFiles, base: ModelConfig, spec: AdapterSpec
) -> None:
    """Checks that trained rows exist, and that added tokens have trained rows in both tables."""
    check_token_indices(spec, base)
    trained = dict(spec.token_indices)
    if not trained:
        return
    new = files.added_ids(AddedTokens.of(config.data))
    head = spec.head_rows(tied=base.tie_embeddings)
    for name, ids in (
        ("embed_tokens", trained.get("embed_tokens", ())),
        ("lm_head", head[1] if head else ()),
    ):
        untrained = {
            text: token_id for text, token_id in new.items() if token_id not in ids
        }
        if untrained and name not in spec.saved:
            listed = ", ".join(
                f"{text!r} ({token_id})" for text, token_id in untrained.items()
            )
            expected = f"{' '.join(map(str, new.values()))} among them, the ids of added tokens"
            raise NaloraError(
                "--lora.trainable-token-indices",
                expected=f"{expected}, for {name} (--lora.trainable-token-modules)",
                found=f"no row of {name} for {listed}",
                remedy="they are not trained: name them, or the table in --lora.modules-to-save",
            )
