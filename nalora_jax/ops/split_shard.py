"""Attention of one shard of split rows, for `nalora_jax.ops.split_attention` and its implementations.

A shard gathers the keys and values that its queries may see, or receives the tokens that a window
reaches, in the forward pass and again in the backward pass. `Kernels` compute what is between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.ops.blockwise_attention import AttentionConfig, with_sinks
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_rows import Row, block_numbers, by_block, by_part, gathered, with_preceding
from nalora_jax.ops.storage import read_residual, save_residual

Spread = Callable[[jax.Array], jax.Array]  # a shard's keys -> all keys that its queries may see


def on_shards(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array | int,
    config: AttentionConfig,
    sinks: jax.Array | None,
    *more: Any,
    more_specs: tuple[Any, ...] = (),
) -> jax.Array:
    """Returns ``attend(q, k, v, row, window, sinks, *more)``, mapped over all axes of the mesh."""
    sharding = config.sharding
    assert sharding is not None
    by_head = P(sharding.spec[0], None, config.head_axis)
    specs = (by_head, by_head, by_head, P(BATCH_AXES), P(), P(config.head_axis), *more_specs)
    mapped = jax.shard_map(attend, mesh=sharding.mesh, in_specs=specs, out_specs=by_head, check_vma=False)
    out: jax.Array = mapped(q, k, v, row, jnp.asarray(window, jnp.int32), sinks, *more)
    return out


def reach(windows: tuple[int, ...], block: int, row: Row) -> int:
    """Returns the most tokens before a block that a window within a block reaches; 0: keys are gathered."""
    if row.starts is not None:
        return 0
    return max((window - 1 for window in windows if window - 1 <= block), default=0)


def on_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array,
    sinks: jax.Array | None,
    *,
    config: AttentionConfig,
    numerics: Numerics,
    kernels: Kernels,
    tile: int,
) -> jax.Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``.

    The tiles of ``kernels`` have ``tile`` tokens, which divides a block.
    """
    block = q.shape[1] // 2
    ahead = reach(config.windows, block, row)
    ahead = -(-ahead // tile) * tile

    def near(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys = row.slices(ahead)
        queries = Queries(of_keys.positions[:, ahead:], of_keys.segments[:, ahead:], jnp.full((1,), ahead))
        options = Options(kernels, _Preceding(ahead), tile, config, numerics)
        return by_part(_attention(by_block(q), k, v, Integers(queries, of_keys, window), sinks, options))

    def far(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        here = row.slices(0)
        queries = Queries(
            by_part(here.positions), by_part(here.segments), block * jnp.stack(block_numbers())
        )
        options = Options(kernels, gathered, tile, config, numerics)
        return _attention(q, k, v, Integers(queries, row, window), sinks, options)

    if not ahead:
        return far(q, k, v)
    if config.windows[-1] - 1 <= block:
        return near(q, k, v)
    return lax.cond(window - 1 <= block, near, far, q, k, v)


class Queries(NamedTuple):
    """Integers of a shard's queries, which consist of equal runs of neighbours in their row."""

    positions: jax.Array  # int [batch, queries]
    segments: jax.Array  # int [batch, queries]
    first: jax.Array  # int [runs], index of the first query of each run among the keys

    def first_of_tiles(self, size: int) -> jax.Array:
        """Returns the index of the first query of each tile of ``size`` among the keys, int ``[tiles]``."""
        tiles = self.positions.shape[1] // size // self.first.shape[0]
        return (self.first[:, None] + size * jnp.arange(tiles)[None]).reshape(-1)


class Integers(NamedTuple):
    """Integers that decide which keys a shard's queries see."""

    queries: Queries
    keys: Row
    window: jax.Array  # scalar


class Kernels(NamedTuple):
    """Attention of a shard's queries to all keys that they may see, and its gradients.

    Arrays of heads are ``[batch, tokens, heads, head_dim]`` in `Numerics.operand`, already multiplied by the
    scale; ``g`` is float32; log-sum-exps and ``inner``, the sum of ``g`` times the result, are float32
    ``[batch, queries, heads]``.

    Attributes:
      forward: ``(q, k, v, integers, options)`` to the float32 result and the log-sum-exps.
      backward: ``(q, k, v, g, logsumexp, inner, integers, options)`` to the gradients of q, k and v.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Options(NamedTuple):
    """Static options of a shard's attention."""

    kernels: Kernels
    spread: Spread
    size: int  # queries and keys of a tile
    config: AttentionConfig
    numerics: Numerics


@dataclass(frozen=True)
class _Preceding:
    """`with_preceding` as a static argument."""

    ahead: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return with_preceding(x, self.ahead)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    integers: Integers,
    sinks: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Computes attention of a shard's queries to ``options.spread`` of its keys."""
    return _forward(q, k, v, integers, sinks, options)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    integers: Integers,
    sinks: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, Any]:
    numerics = options.numerics
    heads = tuple(save_residual(x, numerics.residual, numerics) for x in (q * options.config.scale, k, v))
    out, logsumexp = options.kernels.forward(*_operands(heads, options), integers, options)
    if sinks is not None:
        out, logsumexp = with_sinks(out, logsumexp[..., None], sinks[None, None, :, None])
        logsumexp = logsumexp[..., 0]
    saved = save_residual(out, numerics.residual, numerics)
    total = save_residual(logsumexp, "float32", numerics)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    return read_residual(saved, numerics.result), (*heads, saved, total, integers, like)


def _backward(options: Options, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    *heads, out, logsumexp, integers, like = residuals
    g = g.astype(jnp.float32)
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1)
    sums = read_residual(logsumexp, jnp.float32), inner
    dq, dk, dv = options.kernels.backward(*_operands(heads, options), g, *sums, integers, options)
    part = jax.ShapeDtypeStruct(jax.tree.leaves(heads[1])[0].shape, dk.dtype)
    back = jax.linear_transpose(options.spread, part)
    grads = dq * options.config.scale, *back(dk), *back(dv)
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None)


_attention.defvjp(_forward, _backward)


def _operands(heads: Any, options: Options) -> list[jax.Array]:
    """Returns a shard's queries, and the keys and values that they may see, from the saved heads."""
    spread = [heads[0], *(jax.tree.map(options.spread, x) for x in heads[1:])]
    return [read_residual(x, options.numerics.operand) for x in spread]
