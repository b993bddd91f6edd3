"""Evaluation of long rows on a mesh that splits their tokens (`nalora_jax.ops.split_rows`)."""

from __future__ import annotations

from jax.sharding import Mesh

from nalora_jax.layout.distributed import context_size, row_sharding
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import stacks

_LEAST_BLOCK = 128  # tokens; shorter rows are computed on every device


def for_rows(model: Decoder, mesh: Mesh | None, seq: int) -> Decoder:
    """Returns ``model`` for rows of ``seq`` tokens without a cache; its result has parts of long rows."""
    splits = all(
        stack.config.mixer is None or stack.config.mixer.splits_rows for stack in stacks(model.config)
    )
    if context_size(mesh) == 1 or not splits or seq < 2 * context_size(mesh) * _LEAST_BLOCK:
        return model
    return model.clone(activation_sharding=row_sharding(mesh))
