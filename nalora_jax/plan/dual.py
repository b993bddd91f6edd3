"""The contrastive step of a dual encoder, compiled for absent hardware."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed, trees
from nalora_jax.config import RunConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.distributed.mesh import BATCH_AXES
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import init_lora
from nalora_jax.plan.program import placed
from nalora_jax.train.dual import check_dual, dual_program, resolve_dual


def contrastive_step(
    config: RunConfig, base: DualConfig, mesh: Mesh, *, seq: int
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step of a run with ``vision.task`` "contrast" and its arguments' shapes.

    The shapes are placed on ``mesh``.

    Args:
      config: the run; its batch size is the number of pairs over all devices.
      base: architecture of the pair; images are squares of the size that its position embeddings
        cover.
      mesh: real or abstract devices.
      seq: tokens of a caption.
    """
    check_dual(config, base, mesh)
    spec = resolve_dual(config, base)
    shapes = base.param_shapes().items()
    weights = trees.unflatten(
        {path: jax.ShapeDtypeStruct(shape, config.compute.dtype) for path, shape in shapes}
    )
    lora = jax.eval_shape(lambda params: init_lora(base, spec, jax.random.key(0), params), weights)
    # The scale and the offset of grey levels do not affect the program, so the defaults are used.
    program = dual_program(config, base, spec, lora, mesh, ImageProcessor())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state, places = placed(jax.eval_shape(program.fresh, lora, key), mesh, distributed.STATE_RULES)
    params, _ = placed(weights, mesh, distributed.PARAM_RULES)
    by_rows = NamedSharding(mesh, P(None, BATCH_AXES))
    rows, side = (1, config.train.batch_size), base.image.image_size
    batch = {
        "pixels": jax.ShapeDtypeStruct(
            (*rows, side, side, base.image.channels), jnp.uint8, sharding=by_rows
        ),
        "tokens": jax.ShapeDtypeStruct((*rows, seq), jnp.int32, sharding=by_rows),
        "token_weights": jax.ShapeDtypeStruct((*rows, seq), jnp.float32, sharding=by_rows),
    }
    return program.step(places), (params, state, batch)
