"""Checks of runs whose rows are split over the mesh axis "context"."""

from __future__ import annotations

import logging

from jax.sharding import Mesh

from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import stacks
from nalora_jax.ops.split_rows import block_length

log = logging.getLogger(__name__)


def check_context(config: RunConfig, base: ModelConfig, mesh: Mesh) -> None:
    """Checks that an axis "context" can split the rows of a run; logs a line if it pads them.

    Raises:
      NaloraError: a part of the model or of the run needs whole rows, or rows are too short.
    """
    shards = distributed.context_size(mesh)
    if shards == 1:
        return
    mixers = {stack.config.mixer for stack in stacks(base)} - {None}
    whole = sorted(mixer.name for mixer in mixers if mixer is not None and not mixer.splits_rows)
    if whole:
        raise context_error(shards, f"the layers {', '.join(whole)} of {base.model_type}")
    if base.attn_dropout:
        raise context_error(shards, f"the attention dropout of {base.model_type} ({base.attn_dropout})")
    seq = config.data.max_length
    if seq and (padded := 2 * shards * block_length(seq, shards)) != seq:
        log.info(
            "rows of %d tokens are padded to %d: two blocks on each of --mesh.context %d",
            seq,
            padded,
            shards,
        )


def context_error(shards: int, cause: str) -> NaloraError:
    """Returns the error of a run that cannot split rows."""
    return NaloraError(
        "--mesh.context",
        expected=f"1: {cause} cannot be split along the tokens of a row",
        found=shards,
        remedy="use --mesh.fsdp or --mesh.tensor for these devices",
    )
