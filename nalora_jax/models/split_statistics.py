"""The sample of positions of rows that are split over devices (`nalora_jax.ops.split_rows`)."""

from __future__ import annotations

import math
from collections.abc import Callable

from jax import Array

from nalora_jax.measurement import GateStatsConfig, SampledWeights
from nalora_jax.ops.reductions import RUN, sampled_weights


def sampled_as_whole(
    weights: Array, config: GateStatsConfig, block: int, parts: Callable[[Array], Array]
) -> SampledWeights:
    """Returns the weights of parts of rows for the positions that are sampled of the whole rows.

    Args:
      weights: ``[batch, seq]`` of whole rows.
      config: strides.
      block: tokens of the blocks that parts consist of.
      parts: returns the parts of rows ``[batch, seq]``.
    """
    length = weights.shape[-1]
    config = config.of_rows(length)
    strides = config.stride, config.probe_stride
    of_gate, of_probe = (parts(sampled_weights(weights, stride)) for stride in strides)
    gate, probe = (_within_blocks(stride, length, block) for stride in strides)
    return SampledWeights(parts(weights), of_gate, of_probe, (gate, probe), length)


def _within_blocks(stride: int, length: int, block: int) -> int:
    """Returns the largest stride at which samples of blocks contain the sample of their row.

    A group of the row consists of whole groups of a block, which take the group's run if the weights
    of all others are 0. If the row's positions are taken singly, or blocks divide runs, all are taken.
    """
    singly = length % (RUN * stride) or block % RUN
    return 1 if singly else math.gcd(stride, block // RUN)
