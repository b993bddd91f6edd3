"""Self-attention for training in plain XLA, one block of queries at a time.

No score outlives its block, forward or backward. The backward pass recomputes the probabilities
from the saved queries, keys and log-sum-exps, as flash attention does (arXiv 2205.14135). Autodiff
would save ``[heads, seq, seq]`` probabilities and differentiate the softmax in more passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Stored, read_residual, round_and_save, rounded, save_residual

# Queries whose scores are computed together: longer blocks are split, so that memory grows with the
# number of keys only.
PIECE = 256
# Score of unseen keys: far below any score, but finite, so that a row that sees no key (padding)
# has no NaN.
UNSEEN = -1e30


@dataclass(frozen=True)
class AttentionConfig:
    """Static options of the scores, and facts that a kernel must know before it runs."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # c tanh(score / c); 0: none
    dropout: float = 0.0  # rate on the probabilities
    windows: tuple[int, ...] = ()  # all values of the window, ascending; () if no window is used
    sharding: NamedSharding | None = None  # sharding of [batch, seq, d_model] on a mesh
    interpret: bool = False  # run Pallas kernels in Python, for tests
    recomputed: str = ""  # letters of "qkv": arrays that follow from saved ones without a matmul

    @property
    def head_axis(self) -> str | None:
        """The mesh axis that splits heads; None if the mesh does not have it."""
        if self.sharding is None or "tensor" not in self.sharding.mesh.shape:
            return None
        return "tensor"


def saved_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, config: AttentionConfig, numerics: Numerics
) -> tuple[jax.Array, ...]:
    """Returns queries, keys and values of a kernel, saved for the backward pass unless ``config`` recomputes them."""
    named = zip("qkv", (q, k, v), strict=True)
    return tuple(x if name in config.recomputed else round_and_save(x, numerics) for name, x in named)


def block_size(seq: int) -> int:
    """Returns the queries per block.

    Blocks are small enough to skip most of the upper triangle; at most 8 are compiled.
    """
    # Measured on a CPU: 32 makes a step with rows of 128 tokens 3% to 5% faster, and steps with
    # rows of 48 or 256 up to 3% slower.
    size = max(32 if 128 <= seq < 256 else 64, -(-seq // 8))
    if size <= PIECE:
        return size
    return -(-size // PIECE) * PIECE


def visibility(
    positions: jax.Array,
    segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    window: jax.Array | int,
    key_starts: jax.Array | None = None,
) -> jax.Array:
    """Returns whether each query sees each key: bool ``[batch or 1, queries, keys]``.

    All inputs are int ``[batch or 1, ...]``. A key is seen by queries at its own position and
    later, or starting at ``key_starts``.
    """
    ahead = positions[:, :, None] - key_positions[:, None, :]
    since = ahead
    if key_starts is not None:
        since = positions[:, :, None] - key_starts[:, None, :]
    same = segments[:, :, None] == key_segments[:, None, :]
    return same & (since >= 0) & (ahead < window)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
) -> jax.Array:
    """Computes attention of every token over its segment up to itself, within the window.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      k: ``[batch, seq, kv_heads, head_dim]``.
      v: the same.
      positions: int ``[batch or 1, seq]``, in order along each segment.
      segments: int ``[batch or 1, seq]``.
      window: scalar.
      sinks: float32 ``[heads]``, see `with_sinks`, or None; they receive no gradient.
      config: scale and soft cap; its dropout is not applied.
      numerics: dtypes.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``numerics.result``.
    """
    return _fwd(q, k, v, positions, segments, window, sinks, config, numerics)[0]


def _fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
) -> tuple[jax.Array, Any]:
    save = partial(save_residual, dtype=numerics.residual, numerics=numerics)
    heads = tuple(save(by_key_head(x, k.shape[2])) for x in (q * config.scale, k, v))
    outs, totals = [], []
    for start, end in blocks(q.shape[1]):
        visible = _seen(heads, positions, segments, window, end)
        rows = (_rows(heads[0], start, end), *_own(positions, segments, start, end))
        _, (out, total) = _by_pieces(partial(_attended, visible, config, numerics), None, rows)
        outs.append(out)
        totals.append(total)
    out, logsumexp = joined(outs, -2), joined(totals, -2)  # [batch, kv_heads, groups, seq, head_dim or 1]
    if sinks is not None:
        out, logsumexp = with_sinks(out, logsumexp, sinks.reshape(1, k.shape[2], -1, 1, 1))
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    saved = save(out)
    total = save_residual(logsumexp, "float32", numerics)
    residuals = (*heads, saved, total, positions, segments, window, like)
    return by_token(read_residual(saved, numerics.result)), residuals


def _attended(
    seen: _Seen, config: AttentionConfig, numerics: Numerics, carry: None, rows: tuple[Any, ...]
) -> tuple[None, Any]:
    """Returns results and log-sum-exps of some queries."""
    scores, unseen = _scores(seen, config, numerics, *rows)
    scores = scores + unseen
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # The softmax's division follows the matmul with the values: a pass over head_dim instead of all
    # keys.
    out = product("bkgqt,bktd->bkgqd", weights, seen.value, numerics) / total
    return carry, (out, top + jnp.log(total))


def _bwd(config: AttentionConfig, numerics: Numerics, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    *heads, out, logsumexp, positions, segments, window, like = residuals
    kv_heads, seq = heads[1].shape[1], g.shape[1]
    g = by_key_head(g.astype(jnp.float32), kv_heads)
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1, keepdims=True)
    dq: list[jax.Array] = []
    dk = dv = jnp.zeros((g.shape[0], kv_heads, g.shape[-1], seq), jnp.float32)
    # The last block first: only it adds to all keys, so that the other blocks add to parts of its
    # result in place.
    for start, end in reversed(list(blocks(seq))):
        visible = _seen(heads, positions, segments, window, end)
        by_query = (_rows(x, start, end) for x in (logsumexp, g, inner))
        rows = (_rows(heads[0], start, end), *_own(positions, segments, start, end), *by_query)
        sums = (dk[..., :end], dv[..., :end])
        sums, dq_block = _by_pieces(partial(_gradients, visible, config, numerics), sums, rows)
        dk, dv = (x.at[..., :end].set(new) for x, new in zip((dk, dv), sums, strict=True))
        dq.append(dq_block)
    # The barrier keeps XLA:CPU from fusing the transpose into a matmul, which it cannot run in
    # bf16.
    dk, dv = (x.swapaxes(2, 3)[:, :, None] for x in lax.optimization_barrier((dk, dv)))
    grads = (by_token(joined(dq[::-1], -2)) * config.scale, by_token(dk), by_token(dv))
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None, None, None)


def _gradients(
    seen: _Seen,
    config: AttentionConfig,
    numerics: Numerics,
    sums: tuple[jax.Array, jax.Array],
    rows: tuple[Any, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Adds the contributions of some queries to ``dk`` and ``dv``, and returns their ``dq``, too.

    ``dk`` and ``dv`` are ``[..., head_dim, keys]``.
    """
    query, positions, segments, logsumexp, g, inner = rows
    scores, unseen = _scores(seen, config, numerics, query, positions, segments)
    weights = jnp.exp(scores + (unseen - logsumexp))
    slope = weights * (product("bkgqd,bktd->bkgqt", g, seen.value, numerics) - inner)
    if config.softcap:
        slope = slope * (1 - jnp.square(scores / config.softcap))
    # Queries on the left: a matmul transposes its left operand, and scores are wider than heads.
    dk = sums[0] + product("bkgqd,bkgqt->bkdt", read_residual(query, jnp.float32), slope, numerics)
    dv = sums[1] + product("bkgqd,bkgqt->bkdt", g, weights, numerics)
    return (dk, dv), product("bkgqt,bktd->bkgqd", slope, seen.key, numerics)


blockwise_attention.defvjp(_fwd, _bwd)


def blocks(seq: int) -> Iterator[tuple[int, int]]:
    """Yields first and last position (exclusive) of every block of queries.

    The length of a long block is a multiple of `PIECE`.
    """
    size, start = block_size(seq), 0
    while start < seq:
        length = min(size, seq - start)
        if length > PIECE:
            length -= length % PIECE
        yield start, start + length
        start += length


def _by_pieces(step: Any, carry: Any, rows: tuple[Any, ...]) -> Any:
    """Runs ``step(carry, rows)`` on pieces of the rows and joins the results.

    Rows are on axis -2.
    """
    length = rows[0].shape[-2]
    if length <= PIECE:
        return step(carry, rows)
    split = partial(_split, count=length // PIECE)
    carry, outputs = lax.scan(step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(_unsplit, outputs)


def _split(x: jax.Array, count: int) -> jax.Array:
    """Returns ``[count, ..., rows / count, n]`` of ``[..., rows, n]``."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, -1, x.shape[-1]), -3, 0)


def _unsplit(x: jax.Array) -> jax.Array:
    """Computes the inverse of `_split`."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _rows(x: Any, start: int, end: int) -> Any:
    """Returns some rows (axis -2) of an array or of a saved one in any storage form."""
    return jax.tree.map(lambda leaf: leaf[..., start:end, :], x)


def _keys(x: Any, end: int) -> Any:
    """Returns ``[batch, kv_heads, end, head_dim]`` of ``[batch, kv_heads, 1, seq, head_dim]``.

    ``x`` may be in any storage form.
    """
    return jax.tree.map(lambda leaf: leaf[:, :, 0, :end], x)


class _Seen(NamedTuple):
    """The keys up to a block's end, which the block's queries may see."""

    key: jax.Array  # [batch, kv_heads, keys, head_dim]
    value: jax.Array  # the same
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]
    window: jax.Array | int


def _seen(
    heads: Any, positions: jax.Array, segments: jax.Array, window: jax.Array | int, end: int
) -> _Seen:
    key, value = (read_residual(_keys(x, end), jnp.float32) for x in heads[1:])
    return _Seen(key, value, positions[:, :end], segments[:, :end], window)


def _own(positions: jax.Array, segments: jax.Array, start: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Returns positions and segments of a block's queries, ``[batch or 1, block, 1]``.

    Queries are on axis -2, as in all arrays that `_by_pieces` splits.
    """
    return positions[:, start:end, None], segments[:, start:end, None]


def _scores(
    seen: _Seen,
    config: AttentionConfig,
    numerics: Numerics,
    query: jax.Array | Stored,
    positions: jax.Array,
    segments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns capped scores ``[batch, kv_heads, groups, rows, keys]`` and their mask.

    The mask is 0 for seen keys and `UNSEEN` for the others.
    """
    # The barrier ties the mask to the queries. Without it XLA computes the masks of all layers
    # first: [batch, seq, seq] each.
    floats, positions = lax.optimization_barrier((read_residual(query, jnp.float32), positions))
    scores = capped(product("bkgqd,bktd->bkgqt", floats, seen.key, numerics), config)
    visible = visibility(positions[..., 0], segments[..., 0], seen.positions, seen.segments, seen.window)
    return scores, jnp.where(visible[:, None, None], 0.0, UNSEEN)


def with_sinks(out: jax.Array, logsumexp: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result and the log-sum-exps of a softmax with one more score per head, the sink.

    A sink has no value: its probability is lost. Gradients need no other change, since they follow
    from the probabilities ``exp(score - logsumexp)``.

    Args:
      out: results without sinks.
      logsumexp: float32, of the rank of ``out``.
      sinks: float32, of the same rank.
    """
    total = jnp.logaddexp(logsumexp, lax.stop_gradient(sinks))
    return (out * jnp.exp(logsumexp - total)).astype(out.dtype), total


def capped(scores: jax.Array, config: AttentionConfig) -> jax.Array:
    """Returns ``c tanh(score / c)``, or the scores if there is no soft cap."""
    if not config.softcap:
        return scores
    return config.softcap * jnp.tanh(scores / config.softcap)


def by_key_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """Returns ``[batch, kv_heads, groups, seq, head_dim]`` of ``[batch, seq, heads, head_dim]``."""
    batch, seq, _, dim = x.shape
    return x.reshape(batch, seq, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def by_token(x: jax.Array) -> jax.Array:
    """Computes the inverse of `by_key_head`."""
    batch, kv_heads, groups, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, kv_heads * groups, dim)


def joined(parts: list[jax.Array], axis: int) -> jax.Array:
    """Concatenates arrays; a single array is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate(parts, axis=axis)


def product(equation: str, x: jax.Array, y: jax.Array, numerics: Numerics) -> jax.Array:
    """Computes `jnp.einsum` with operands rounded to ``numerics.operand`` and a float32 result."""
    operands = (rounded(side, numerics.operand, numerics) for side in (x, y))
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
