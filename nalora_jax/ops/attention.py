"""Causal attention with grouped heads, segments, sliding windows, soft caps and caches, in plain
XLA.

Integers, not a stored mask, decide which keys a query sees: those with its segment, at positions up
to its own and fewer than ``window`` before it. Packing, padding, windows by layer and cached keys
all follow this rule. Tokens of a segment are in order along the sequence, so keys after a query's
block are never read.

Training computes one block of queries at a time. No score outlives its block, forward or backward.
The backward pass recomputes the probabilities from the saved queries, keys and log-sum-exps, as
flash attention does (arXiv 2205.14135). Autodiff would save ``[heads, seq, seq]`` probabilities and
differentiate the softmax in more passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import TENSOR
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.reductions import join_tiles, split_tiles
from nalora_jax.ops.shardings import RowSharding
from nalora_jax.ops.storage import (
    Kernel,
    expand,
    read_residual,
    round_and_save,
    round_to,
    save_residual,
)

# Queries whose scores are computed together: longer blocks are split, so that memory grows with the
# number of keys only.
PIECE = 256
# Blocks of queries in a row, each compiled separately.
_MOST_BLOCKS = 8
# Score of unseen keys: far below any score, but finite, so that a row that sees no key (padding)
# has no NaN.
UNSEEN = -1e30
# Cached keys whose scores are computed together. Shorter caches are read as a whole.
CACHE_BLOCK = 1024


@dataclass(frozen=True)
class AttentionConfig:
    """Static options of the scores, and facts that a kernel must know before it runs."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # c tanh(score / c); 0: none
    dropout: float = 0.0  # rate on the probabilities
    windows: tuple[
        int, ...
    ] = ()  # all values of the window, ascending; () if no window is used
    sharding: RowSharding = None  # sharding of [batch, seq, d_model] on a mesh
    interpret: bool = False  # run Pallas kernels in Python, for tests
    recomputed: str = (
        ""  # letters of "qkv": arrays that follow from saved ones without a matmul
    )

    @property
    def rows(self) -> P:
        """The spec of arrays ``[batch, ...]`` on the mesh."""
        if self.sharding is None or not self.sharding.spec:
            return P(None)
        return P(self.sharding.spec[0])

    @property
    def head_axis(self) -> str | None:
        """The mesh axis that splits heads; None if the mesh does not have it."""
        if self.sharding is None or TENSOR not in self.sharding.mesh.shape:
            return None
        return TENSOR


class Keys(NamedTuple):
    """Keys and values with the integers that decide which queries see them."""

    k: Array  # [batch, keys, kv_heads, head_dim]
    v: Array  # [batch, keys, kv_heads, head_dim]
    positions: Array  # int [batch or 1, keys]
    segments: Array  # int [batch or 1, keys]; 0: empty
    # int [batch or 1, keys], the first position that sees a key, if not the key's own: tokens of
    # one image that see each other all have the position of the image's first token.
    starts: Array | None = None
    # float32 [heads], a score of each head that every query sees and that has no value
    # (`apply_sinks`); frozen, not scaled, not capped.
    sinks: Array | None = None
    cached: CachedKeys | None = None  # keys of earlier calls, seen under the same rule


# Queries [batch, seq, heads, head_dim], keys and values [batch, seq, kv_heads, head_dim].
QKV = tuple[Array, Array, Array]


class CachedKeys(NamedTuple):
    """Keys and values of earlier calls in any storage form, in the fastest layout for a single
    token."""

    k: Kernel  # [batch, kv_heads, head_dim, slots]
    v: Kernel  # [batch, kv_heads, slots, head_dim]
    positions: Array  # int [batch or 1, slots]
    segments: Array  # int [batch or 1, slots]; 0: empty


def attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    dropout_rng: Array | None = None,
) -> Array:
    """Computes softmax attention of every token over the tokens that it sees.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      keys: keys of the same tokens and of earlier calls.
      window: scalar; a query at position p sees positions in ``(p - window, p]``.
      config: scale, soft cap, dropout.
      numerics: dtypes of operands, of saved arrays and of the result; sums and softmax are float32.
      dropout_rng: key for ``config.dropout``; None for no dropout.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``numerics.result``.
    """
    chex.assert_rank([q, keys.k, keys.v], 4)
    chex.assert_equal_shape([keys.k, keys.v])
    drops = dropout_rng is not None and config.dropout > 0
    slots = 0
    if keys.cached is not None:
        slots = keys.cached.positions.shape[1]
    if not slots:  # there were no earlier calls
        keys = keys._replace(cached=None)
    if not slots and keys.starts is None and not drops:
        return self_attention(q, keys, window, config, numerics)
    if slots > CACHE_BLOCK and q.shape[1] > 1 and not drops:
        out = attention_over_cache(q, keys, window, config, numerics)
    else:
        out = attend_in_tiles(q, keys[2:4], keys, window, config, numerics, dropout_rng)
    return out.astype(numerics.result)


def is_mapped(config: AttentionConfig, numerics: Numerics) -> bool:
    """Returns True if a Pallas call can be mapped over the devices; the compiler does not partition
    it."""
    return config.sharding is not None or numerics.platform.devices == 1


def map_over_devices(
    attend: Callable[..., Array], config: AttentionConfig, *more: Any
) -> Any:
    """Returns ``attend((q, k, v), *others)``, mapped over the mesh of ``config`` if there is one.

    On a mesh, ``attend`` gets each device's rows and heads of q, k and v and returns its rows and
    heads of the result. ``more`` are the partition specs of ``others``.
    """
    if config.sharding is None:
        return attend
    heads = P(*config.rows, None, config.head_axis)
    specs = ((heads, heads, heads), *more)
    return jax.shard_map(
        attend,
        mesh=config.sharding.mesh,
        in_specs=specs,
        out_specs=heads,
        check_vma=False,
    )


def visibility(
    positions: Array,
    segments: Array,
    key_positions: Array,
    key_segments: Array,
    window: Array | int,
    key_starts: Array | None = None,
) -> Array:
    """Returns whether each query sees each key: bool ``[batch or 1, queries, keys]`` of int
    ``[batch or 1, ...]``.

    A key is seen by queries at its own position and later, or starting at ``key_starts``.
    """
    # [batch or 1, queries, keys]: tokens from a key to a query, and from a key's start to it
    distance = positions[:, :, None] - key_positions[:, None, :]
    since_start = distance
    if key_starts is not None:
        since_start = positions[:, :, None] - key_starts[:, None, :]
    same_segment = segments[:, :, None] == key_segments[:, None, :]
    return same_segment & (since_start >= 0) & (distance < window)


def apply_sinks(out: Array, logsumexp: Array, sinks: Array) -> tuple[Array, Array]:
    """Returns the result and the log-sum-exps of a softmax with one more score per head, the sink.

    A sink has no value: its probability is lost. Gradients need no other change, since they follow
    from the probabilities ``exp(score - logsumexp)``. All arrays have the rank of ``out``.
    """
    total = jnp.logaddexp(logsumexp, lax.stop_gradient(sinks))
    share_of_keys = jnp.exp(logsumexp - total)  # the sink has the other part
    return (out * share_of_keys).astype(out.dtype), total


def cap_scores(scores: Array, config: AttentionConfig) -> Array:
    """Returns ``c tanh(score / c)``, or the scores if there is no soft cap."""
    if config.softcap:
        return config.softcap * jnp.tanh(scores / config.softcap)
    return scores


def group_heads(x: Array, kv_heads: int) -> Array:
    """Returns ``[batch, kv_heads, groups, seq, head_dim]`` of ``[batch, seq, heads, head_dim]``."""
    batch, seq, _, dim = x.shape
    return x.reshape(batch, seq, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def ungroup_heads(x: Array) -> Array:
    """Computes the inverse of `group_heads`."""
    batch, kv_heads, groups, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, kv_heads * groups, dim)


def product(equation: str, x: Array, y: Array, numerics: Numerics) -> Array:
    """Returns `jnp.einsum` of both arrays in float32; the operands are rounded to
    ``numerics.operand`` first."""
    operands = (round_to(side, numerics.operand, numerics) for side in (x, y))
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def save_heads(heads: QKV, config: AttentionConfig, numerics: Numerics) -> list[Array]:
    """Returns q, k and v, rounded and saved for the backward pass.

    Arrays that ``config.recomputed`` names are returned as they are, because the backward pass
    recomputes them.
    """
    named = zip("qkv", heads, strict=True)
    return [
        x if name in config.recomputed else round_and_save(x, numerics)
        for name, x in named
    ]


def blocks(seq: int) -> Iterator[tuple[int, int]]:
    """Yields first and last position (exclusive) of every block of queries.

    Blocks are small enough to skip most of the upper triangle of the causal mask, whose scores no
    query sees. The length of a long block is a multiple of `PIECE`.
    """
    # Measured on a CPU: 32 makes a step with rows of 128 tokens 3% to 5% faster, and steps with
    # rows of 48 or 256 up to 3% slower.
    smallest = 32 if 128 <= seq < 256 else 64
    size = max(smallest, -(-seq // _MOST_BLOCKS))
    start = 0
    if size > PIECE:
        size = -(-size // PIECE) * PIECE
    while start < seq:
        length = min(size, seq - start)
        if length > PIECE:
            length -= length % PIECE
        yield start, start + length
        start += length


# ---------------------------------------------------------------- training


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _self_attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `attention` without cached keys, dropout and ``starts``; sinks receive no
    gradient."""
    return _fwd(q, keys, window, config, numerics)[0]


def _fwd(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> tuple[Array, Any]:
    """Returns the result ``[batch, seq, heads, head_dim]`` and the residuals of
    `_bwd`."""
    kv_heads = keys.k.shape[2]
    save = partial(save_residual, dtype=numerics.residual, numerics=numerics)
    # [batch, kv_heads, groups, seq, head_dim]; keys and values have one group
    heads = tuple(
        save(group_heads(x, kv_heads)) for x in (q * config.scale, keys.k, keys.v)
    )
    places = keys.positions, keys.segments

    def attended(start: int, end: int) -> Any:
        """Returns the results and log-sum-exps of the queries from ``start`` to ``end``."""
        seen = _Seen.of(heads, places, window, end, config, numerics)
        return _by_pieces(seen.attended, None, (heads[0], *places), start, end)[1]

    outs = []
    totals = []
    for start, end in blocks(q.shape[1]):
        of_block, total_of_block = attended(start, end)
        outs.append(of_block)
        totals.append(total_of_block)
    # Results [batch, kv_heads, groups, seq, head_dim], log-sum-exps [..., seq, 1].
    out = jnp.concatenate(outs, -2)
    logsumexp = jnp.concatenate(totals, -2)
    if keys.sinks is not None:
        out, logsumexp = apply_sinks(
            out, logsumexp, keys.sinks.reshape(1, kv_heads, -1, 1, 1)
        )
    # Empty arrays carry the dtypes of the inputs: residuals have to be arrays.
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, keys.k, keys.v))
    saved = save(out)
    total = save_residual(logsumexp, "float32", numerics)
    residuals = heads, saved, total, places, window, like
    return ungroup_heads(read_residual(saved, numerics.result)), residuals


def _bwd(
    config: AttentionConfig, numerics: Numerics, residuals: Any, g: Array
) -> tuple[Any, ...]:
    """Returns the gradients of q, of the keys and of the window (None), in the dtypes of the
    inputs."""
    heads, out, logsumexp, places, window, like = residuals
    kv_heads = heads[1].shape[1]
    seq = g.shape[1]
    g = group_heads(g.astype(jnp.float32), kv_heads)
    # [batch, kv_heads, groups, seq, 1]: the mean of the loss's gradient by the probabilities, which
    # the gradient of the softmax subtracts.
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1, keepdims=True)
    dq: list[Array] = []
    # transposed: [batch, kv_heads, head_dim, seq]
    dk = dv = jnp.zeros((g.shape[0], kv_heads, g.shape[-1], seq), jnp.float32)
    # The last block first: only it adds to all keys, so that the other blocks add to parts of its
    # result in place.
    for start, end in reversed(list(blocks(seq))):
        seen = _Seen.of(heads, places, window, end, config, numerics)
        sums = (dk[..., :end], dv[..., :end])
        by_query = heads[0], *places, logsumexp, g, inner
        sums, dq_block = _by_pieces(seen.gradients, sums, by_query, start, end)
        more_dk, more_dv = sums
        dk = dk.at[..., :end].set(more_dk)
        dv = dv.at[..., :end].set(more_dv)
        dq.append(dq_block)
    # The barrier keeps XLA:CPU from fusing the transpose into a matmul, which it cannot run in
    # bf16.
    dk, dv = lax.optimization_barrier((dk, dv))
    # [batch, kv_heads, head_dim, seq] -> [batch, kv_heads, 1, seq, head_dim]
    dk = dk.swapaxes(2, 3)[:, :, None]
    dv = dv.swapaxes(2, 3)[:, :, None]
    dq_all = ungroup_heads(jnp.concatenate(dq[::-1], -2)) * config.scale
    like_q, like_k, like_v = like
    of_keys = Keys(
        ungroup_heads(dk).astype(like_k.dtype),
        ungroup_heads(dv).astype(like_v.dtype),
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
    )
    return dq_all.astype(like_q.dtype), of_keys, None


_self_attention.defvjp(_fwd, _bwd)
self_attention = operation(_self_attention)


def _by_pieces(
    step: Any, carry: Any, by_query: tuple[Any, ...], start: int, end: int
) -> Any:
    """Runs ``step(carry, rows)`` on the queries from ``start`` to ``end`` of a row, `PIECE` at a
    time.

    ``by_query`` are arrays ``[..., seq, n]`` in any storage form, of which the second and third are
    integers ``[batch or 1, seq]``. Returns the last carry and the outputs ``[..., end - start, n]``
    of all pieces.
    """
    query, positions, segments, *others = by_query
    arrays = query, positions[..., None], segments[..., None], *others
    rows = jax.tree.map(lambda leaf: leaf[..., start:end, :], arrays)
    length = end - start
    if length <= PIECE:
        return step(carry, rows)

    def split(x: Array) -> Array:
        """Returns ``[pieces, ..., PIECE, n]`` of ``[..., length, n]``."""
        *lead, _, n = x.shape
        pieces = x.reshape(*lead, length // PIECE, -1, n)
        return jnp.moveaxis(pieces, -3, 0)

    def joined(x: Array) -> Array:
        """Computes the inverse of `split`."""
        pieces = jnp.moveaxis(x, 0, -3)
        return pieces.reshape(*x.shape[1:-2], length, x.shape[-1])

    carry, outputs = lax.scan(step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(joined, outputs)


class _Seen(NamedTuple):
    """The keys that a block of queries may see, up to the block's end, and the attention of its
    queries."""

    key: Array  # [batch, kv_heads, keys, head_dim]
    value: Array  # the same
    positions: Array  # int [batch or 1, keys]
    segments: Array  # int [batch or 1, keys]
    window: Array | int
    config: AttentionConfig
    numerics: Numerics

    @classmethod
    def of(
        cls, heads: Any, places: tuple[Array, ...], window: Any, end: int, *static: Any
    ) -> _Seen:
        """Returns the first ``end`` keys of a row.

        ``heads`` are the saved queries, keys and values, keys and values as ``[batch, kv_heads, 1,
        seq, head_dim]``; ``places`` are positions and segments ``[batch or 1, seq]``; ``static``
        are config and numerics.
        """
        saved = jax.tree.map(lambda leaf: leaf[:, :, 0, :end], heads[1:])
        key, value = (read_residual(x, jnp.float32) for x in saved)
        positions, segments = (x[:, :end] for x in places)
        return cls(key, value, positions, segments, window, *static)

    def attended(
        self, carry: None, rows: tuple[Any, ...]
    ) -> tuple[None, tuple[Array, Array]]:
        """Returns the results ``[..., rows, head_dim]`` and log-sum-exps ``[..., rows, 1]`` of
        queries.

        ``rows`` are queries, positions and segments; the carry of the scan is not used.
        """
        scores, unseen = self._scores(*rows)
        scores = scores + unseen
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # The softmax's division follows the matmul with the values: a pass over head_dim instead
        # of all keys.
        out = product("bkgqt,bktd->bkgqd", weights, self.value, self.numerics) / total
        return carry, (out, top + jnp.log(total))

    def gradients(
        self, sums: tuple[Array, Array], rows: tuple[Any, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        """Adds contributions of queries to dk and dv ``[..., head_dim, keys]``; also returns the
        gradient of these queries.

        ``rows`` are queries, positions, segments, log-sum-exps, the gradient of the results and its
        products with the results (``inner``).
        """
        query, positions, segments, logsumexp, g, inner = rows
        scores, unseen = self._scores(query, positions, segments)
        weights = jnp.exp(scores + (unseen - logsumexp))
        slope = weights * (
            product("bkgqd,bktd->bkgqt", g, self.value, self.numerics) - inner
        )
        if cap := self.config.softcap:
            slope = slope * (1 - jnp.square(scores / cap))
        # Queries on the left: a matmul transposes its left operand, and scores are wider than
        # heads.
        dk = product(
            "bkgqd,bkgqt->bkdt", read_residual(query, jnp.float32), slope, self.numerics
        )
        dv = product("bkgqd,bkgqt->bkdt", g, weights, self.numerics)
        dq = product("bkgqt,bktd->bkgqd", slope, self.key, self.numerics)
        return (sums[0] + dk, sums[1] + dv), dq

    def _scores(
        self, query: Kernel, positions: Array, segments: Array
    ) -> tuple[Array, Array]:
        """Returns capped scores ``[batch, kv_heads, groups, rows, keys]`` and what to add to them:
        0 for seen keys and `UNSEEN` for others, ``[batch or 1, 1, 1, rows, keys]``."""
        # The barrier ties the mask to the queries. Without it XLA computes the masks of all layers
        # first: [batch, seq, seq] each.
        floats, positions = lax.optimization_barrier(
            (read_residual(query, jnp.float32), positions)
        )
        products = product("bkgqd,bktd->bkgqt", floats, self.key, self.numerics)
        scores = cap_scores(products, self.config)
        visible = visibility(
            positions[..., 0],
            segments[..., 0],
            self.positions,
            self.segments,
            self.window,
        )
        return scores, jnp.where(visible[:, None, None], 0.0, UNSEEN)


# ---------------------------------------------------------------- short caches, dropout, given keys


def attend_in_tiles(
    q: Array,
    here: tuple[Array, Array],
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    dropout_rng: Array | None = None,
) -> Array:
    """Computes attention of queries to all given keys, at most `PIECE` queries at a time, in
    float32.

    ``here`` are the queries' positions and segments. The backward pass recomputes the scores of
    several tiles.
    """
    seq = q.shape[1]
    tiles = -(-seq // PIECE)
    attend = partial(
        _attend, keys=keys, window=window, config=config, numerics=numerics
    )
    if tiles == 1:
        return attend(q, here, rng=dropout_rng)

    @jax.checkpoint
    def tile(_: None, rows: tuple[Array, ...]) -> tuple[None, Array]:
        """Computes `PIECE` queries; the tile's number gives each its own dropout mask."""
        number, query, positions, segments = rows
        if dropout_rng is None:
            rng = None
        else:
            rng = jax.random.fold_in(dropout_rng, number)
        return None, attend(query, (positions, segments), rng=rng)

    tiled = [split_tiles(x, tiles) for x in (q, *here)]
    _, out = lax.scan(tile, None, (jnp.arange(tiles), *tiled))
    return join_tiles(out, seq)


def _attend(
    q: Array,
    here: tuple[Array, Array],
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    rng: Array | None,
) -> Array:
    """Returns the attention of one block of queries to given keys, float32 ``[batch, seq, heads,
    head_dim]``.

    ``here`` are the queries' positions and segments; ``rng`` is None for no dropout.
    """
    batch, seq, heads, dim = q.shape
    groups = heads // keys.k.shape[2]
    # [batch, kv_heads, groups * seq, head_dim]: one matrix per key head
    q = group_heads(q, keys.k.shape[2]).reshape(batch, -1, groups * seq, dim)
    sources = [source for source in (keys.cached, keys) if source is not None]

    def masked_scores(source: Keys | CachedKeys) -> Array:
        """Returns the queries' scores of the keys of one source, `UNSEEN` for keys that they do not
        see: float32 ``[batch, kv_heads, groups, seq, keys]``."""
        if isinstance(source, CachedKeys):
            products = product("bkqd,bkdt->bkqt", q, expand(source.k), numerics)
            starts = None
        else:
            by_head = source.k.transpose(
                0, 2, 1, 3
            )  # [batch, kv_heads, keys, head_dim]
            products = product("bkqd,bktd->bkqt", q, by_head, numerics)
            starts = source.starts
        scores = cap_scores(products * config.scale, config)
        # [batch, kv_heads, groups * seq, keys] -> [batch, kv_heads, groups, seq, keys]
        scores = scores.reshape(batch, -1, groups, seq, scores.shape[-1])
        visible = visibility(*here, source.positions, source.segments, window, starts)
        return jnp.where(visible[:, None, None], scores, UNSEEN)

    # [batch, kv_heads, groups, seq, all keys]
    scored = jnp.concatenate([masked_scores(source) for source in sources], -1)
    top = lax.stop_gradient(jnp.max(scored, axis=-1, keepdims=True))
    if keys.sinks is not None:
        sink = lax.stop_gradient(keys.sinks).reshape(1, -1, groups, 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scored - top)
    # The softmax's division follows the matmul with the values: a pass over [seq, head_dim] instead
    # of [seq, keys].
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if keys.sinks is not None:
        total = total + jnp.exp(sink - top)
    if rng is not None and config.dropout > 0:
        remaining = jax.random.bernoulli(rng, 1.0 - config.dropout, weights.shape)
        weights = jnp.where(remaining, weights / (1.0 - config.dropout), 0.0)
    out = jnp.zeros((), jnp.float32)
    first = 0
    for source in sources:
        last = first + source.positions.shape[1]
        weights_of_block = weights[..., first:last].reshape(
            batch, -1, groups * seq, last - first
        )
        if isinstance(source, CachedKeys):
            values = expand(source.v)
        else:
            values = source.v.transpose(0, 2, 1, 3)
        out = out + product("bkqt,bktd->bkqd", weights_of_block, values, numerics)
        first = last
    return ungroup_heads(out.reshape(batch, -1, groups, seq, dim) / total)


# Running sums of a softmax: the largest score, the sum of weights ``exp(score - largest)`` and the
# weighted sum of values.
_Sums = tuple[Array, Array, Array]


def attention_over_cache(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `attention` without dropout, with at least `CACHE_BLOCK` cached keys; it has no
    gradient.

    The softmax is summed while blocks are read (arXiv 1805.02867), so that memory does not grow
    with the number of cached keys. Only blocks with keys are read.
    """
    cached = keys.cached
    assert cached is not None
    k = expand(cached.k)
    v = expand(cached.v)
    slots = cached.positions.shape[1]
    kv_heads = keys.k.shape[2]
    index = jnp.arange(slots)
    # slots up to the last one that any example uses
    is_used = jnp.any(cached.segments > 0, axis=0)
    used = jnp.max(jnp.where(is_used, index + 1, 0))
    block_of = partial(lax.dynamic_slice_in_dim, slice_size=CACHE_BLOCK)

    def attend(start: int, end: int) -> Array:
        """Returns the results of a block of queries."""
        # [batch, kv_heads, groups, block, head_dim]
        queries = group_heads(q[:, start:end], kv_heads)
        here = keys.positions[:, start:end], keys.segments[:, start:end]

        def add(
            sums: _Sums,
            k: Array,
            v: Array,
            positions: Any,
            segments: Any,
            starts: Any = None,
        ) -> _Sums:
            """Adds keys to the running sums of the softmax; keys with segment 0 are not visible.

            ``k`` is ``[batch, kv_heads, head_dim, keys]``, ``v [batch, kv_heads, keys, head_dim]``.
            """
            top, total, out = sums
            scores = cap_scores(
                product("bkgqd,bkdt->bkgqt", queries, k, numerics) * config.scale,
                config,
            )
            visible = visibility(*here, positions, segments, window, starts)
            visible &= (segments > 0)[:, None, :]
            visible = visible[:, None, None]  # [batch, 1, 1, block, keys]
            scores = jnp.where(visible, scores, UNSEEN)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.where(visible, jnp.exp(scores - higher), 0.0)
            # Earlier sums are relative to the earlier maximum.
            faded = jnp.exp(top - higher)
            values = product("bkgqt,bktd->bkgqd", weights, v, numerics)
            total = total * faded + jnp.sum(weights, axis=-1, keepdims=True)
            return higher, total, out * faded + values

        def step(i: Array, sums: _Sums) -> _Sums:
            """Adds block ``i`` of the cached keys to the sums."""
            first = jnp.minimum(i * CACHE_BLOCK, slots - CACHE_BLOCK)
            # The last block overlaps the one before it: keys of both get segment 0, as unused.
            again = block_of(index, first, axis=0) < i * CACHE_BLOCK
            segments = jnp.where(
                again[None], 0, block_of(cached.segments, first, axis=1)
            )
            positions = block_of(cached.positions, first, axis=1)
            return add(
                sums,
                block_of(k, first, axis=3),
                block_of(v, first, axis=2),
                positions,
                segments,
            )

        # The sums before any key; a sink is a score without a value.
        shape = (*queries.shape[:-1], 1)
        top = jnp.full(shape, UNSEEN, jnp.float32)
        total = jnp.zeros(shape, jnp.float32)
        if keys.sinks is not None:
            top = jnp.broadcast_to(keys.sinks.reshape(1, kv_heads, -1, 1, 1), shape)
            total = jnp.ones(shape, jnp.float32)
        # With ``starts``, keys after a query may be visible (images are not causal).
        if keys.starts is None:
            last = end
        else:
            last = q.shape[1]
        new_k = keys.k[:, :last].transpose(0, 2, 3, 1)
        new_v = keys.v[:, :last].transpose(0, 2, 1, 3)
        sums = top, total, jnp.zeros(queries.shape, jnp.float32)
        sums = add(
            sums,
            new_k,
            new_v,
            keys.positions[:, :last],
            keys.segments[:, :last],
            keys.starts,
        )
        _, total, out = lax.fori_loop(
            0, (used + CACHE_BLOCK - 1) // CACHE_BLOCK, step, sums
        )
        # Padding sees no key; its result must be finite, because its values are multiplied by 0
        # later.
        return ungroup_heads(out / jnp.where(total > 0, total, 1.0))

    return jnp.concatenate([attend(*block) for block in blocks(q.shape[1])], axis=1)


@operation
def full_attention(
    q: Array,
    k: Array,
    v: Array,
    numerics: Numerics,
    *,
    scale: float,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """Computes softmax attention of an encoder: float32 ``[batch, queries, heads, head_dim]`` as q.

    k and v are ``[batch, keys, heads, head_dim]``; ``scale`` multiplies the scores. A row of the
    mask, bool ``[batch, keys]``, without any key averages all of them. With ``causal``, a query
    sees keys up to its position.
    """
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    # [batch, heads, queries, keys]
    scores = product("bhqd,bhkd->bhqk", q, k, numerics) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, UNSEEN)
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible[None, None], scores, UNSEEN)
    out = product("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v, numerics)
    return out.transpose(0, 2, 1, 3)
