"""Recurrences along rows that are split over the mesh axis "context" (`nalora_jax.ops.split_rows`).

A causal convolution reads the last tokens of the preceding block. The gated delta rule is linear in
its state, so each block is computed once for a state of zero and for an identity. The results are a
summary ``(D, M)`` of the block, with ``state after = D + M (state before)``. Every shard gathers
the summaries of all blocks and applies them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES, CONTEXT, TENSOR
from nalora_jax.errors import NaloraError
from nalora_jax.ops.causal_conv import causal_conv
from nalora_jax.ops.delta_rule import DeltaInputs, gated_delta_rule, segment_runs
from nalora_jax.ops.reductions import append_zeros
from nalora_jax.ops.split_rows import (
    Row,
    block_numbers,
    gather_rows,
    join_blocks,
    prepend_context,
    split_blocks,
)


def split_conv(x: Array, kernel: Array, row: Row, sharding: NamedSharding) -> Array:
    """Computes `nalora_jax.ops.causal_conv.causal_conv` of rows from their parts.

    ``x`` and the result are parts ``[shards * batch, 2 * block, channels]``, and ``sharding`` is
    that of their first axis.

    Raises:
      NaloraError: a block has fewer tokens than the convolution reads before it.
    """
    ahead = kernel.shape[0] - 1
    block = x.shape[1] // 2
    if ahead > block:
        raise NaloraError(
            "--mesh.context",
            expected=f"blocks of at least {ahead} tokens, which a convolution reads",
            found=f"blocks of {block}",
            remedy="use a smaller --mesh.context, or longer rows",
        )

    def local(x: Array, kernel: Array, row: Row) -> Array:
        """Returns the convolution of a shard's part, ``[batch, 2 * block, channels]``."""
        segments = row.slices(ahead).segments
        out = causal_conv(prepend_context(x, ahead), kernel, segments)
        return join_blocks(out[:, ahead:])

    channels = _over_tensor(sharding, x.shape[-1])
    by_channel = P(sharding.spec[0], None, channels)
    specs = (by_channel, P(None, channels), P(BATCH_AXES))
    return _mapped(local, sharding, specs, by_channel, x, kernel, row)


def split_delta_rule(inputs: DeltaInputs, row: Row, sharding: NamedSharding) -> Array:
    """Computes the outputs of `nalora_jax.ops.delta_rule.gated_delta_rule` of rows from their parts
    ``[shards * batch, 2 * block, ...]``."""
    by_head = P(sharding.spec[0], None, _over_tensor(sharding, inputs.k.shape[2]))
    return _mapped(
        _delta_rule, sharding, (by_head, P(BATCH_AXES)), by_head, inputs, row
    )


def _delta_rule(inputs: DeltaInputs, row: Row) -> Array:
    """Computes a shard's outputs ``[batch, 2 * block, groups, n, d_v]``."""
    inputs = jax.tree.map(split_blocks, inputs)  # [2 * batch, block, ...]
    segments = row.slices(0).segments
    with_runs = row._replace(segments=segment_runs(row.segments))
    before = with_runs.slices(1).segments[
        :, 0
    ]  # segment of the token before each block
    d_k = inputs.k.shape[-1]
    d_v = inputs.v.shape[-1]
    v = append_zeros(inputs.v, d_k, -1)
    heads = (v.shape[0], *v.shape[2:4])
    # The rule is run on two states side by side: zeros [d_k, d_v] with the values, and an identity
    # [d_k, d_k] with values of zero.
    identity = jnp.eye(d_k, d_v + d_k, d_v)
    state = jnp.broadcast_to(identity, (*heads, d_k, d_v + d_k))
    out, summary = gated_delta_rule(inputs._replace(v=v), segments, state, before)
    state = _states_before(summary, d_v)
    of_state = jnp.einsum(
        "btgnd,bgnde->btgne", out[..., d_v:], state, preferred_element_type=jnp.float32
    )
    return join_blocks(out[..., :d_v] + of_state)


def _states_before(summary: Array, d_v: int) -> Array:
    """Returns the state before each of this shard's blocks, ``[2 * batch, groups, n, d_k, d_v]``.

    ``summary [2 * batch, groups, n, d_k, d_v + d_k]`` has the matrices D and M of the blocks.
    """
    _, *matrix = summary.shape
    of_row = gather_rows(summary.reshape(-1, 2, *matrix))
    # [blocks, batch, ...] in the order of the row
    summaries = jnp.moveaxis(of_row, 1, 0)

    def after(state: Array, block: Array) -> tuple[Array, Array]:
        """Returns the states after and before a block with the matrices ``block``."""
        carried = jnp.matmul(block[..., d_v:], state, precision=lax.Precision.HIGHEST)
        return block[..., :d_v] + carried, state

    start = jnp.zeros_like(summaries[0, ..., :d_v])
    _, states = lax.scan(after, start, summaries)
    local_states = [
        lax.dynamic_index_in_dim(states, number, 0, keepdims=False)
        for number in block_numbers()
    ]
    return jnp.stack(local_states, axis=1).reshape(-1, *states.shape[2:])


def _over_tensor(sharding: NamedSharding, size: int) -> str | None:
    """Returns the mesh axis "tensor" if it divides ``size``."""
    parts = sharding.mesh.shape.get(TENSOR, 0)
    if not parts or size % parts:
        return None
    return TENSOR


def _mapped(
    local: Callable[..., Array],
    sharding: NamedSharding,
    specs: Any,
    out: P,
    *arguments: Any,
) -> Array:
    """Runs ``local`` on every device, on the parts of ``arguments`` by ``specs``; returns the array
    with spec ``out``."""
    assert CONTEXT in sharding.mesh.shape
    mapped = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    result: Array = mapped(*arguments)
    return result
