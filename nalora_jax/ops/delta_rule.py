"""The gated delta rule, a linear recurrence over tokens, in matrix products over chunks.

With keys ``k`` and queries ``q`` of unit norm, every head has a state ``S [d_k, d_v]``::

    S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - exp(g_t) k_t^T S_{t-1}))^T  o_t = q_t^T S_t / sqrt(d_k)

Within a chunk the corrections ``b_t (v_t - ...)`` of all tokens solve a unit triangular system.
Only one state per chunk is saved for the backward pass, which recomputes the rest of a chunk. The
state starts at zero in every segment of a packed row, and padding leaves it unchanged.

Sources: Gated DeltaNet, arXiv 2412.06464; the parallel form, 2406.06484.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.ops.dispatch import Numerics

CHUNK_TOKENS = 64  # tokens; a shorter row takes the next power of two
SCOPE = "delta_rule"  # of all operations, for `nalora_jax.planner.figures`
_EPS = 1e-6  # added to the squared norm of queries and keys


class DeltaInputs(NamedTuple):
    """Inputs of every token; each of ``groups`` keys serves ``n`` consecutive value heads."""

    q: Array  # [batch, seq, groups, d_k], not normalized
    k: Array  # [batch, seq, groups, d_k], not normalized
    v: Array  # [batch, seq, groups, n, d_v]
    decay: Array  # float32 [batch, seq, groups, n], the log decay g, at most 0
    beta: Array  # float32 [batch, seq, groups, n], the rate b of the correction


@jax.named_scope(SCOPE)
def gated_delta_rule(
    inputs: DeltaInputs,
    segments: Array,
    state: Array | None = None,
    before: Array | None = None,
    numerics: Numerics = Numerics(),  # noqa: B008
) -> tuple[Array, Array]:
    """Returns the outputs ``o``, float32 ``[batch, seq, groups, n, d_v]``, and the state after the
    last token.

    Each of the ``segments``, int ``[batch or 1, seq]``, is one run of tokens, 0 is padding, whose
    outputs have no meaning. ``state`` is float32 ``[batch, groups, n, d_k, d_v]`` before the first
    token, zero by default, and ``before`` its segment, int ``[batch]``, 1 by default.
    """
    batch, seq, groups, n, d_v = inputs.v.shape
    # A short row takes the smallest power of two that holds it.
    power_of_two = 1 << (seq - 1).bit_length()
    size = min(CHUNK_TOKENS, power_of_two)
    segments = jnp.broadcast_to(segments, (batch, seq))
    real = (segments > 0)[..., None, None]
    inputs = inputs._replace(
        decay=jnp.where(real, inputs.decay, 0.0), beta=jnp.where(real, inputs.beta, 0.0)
    )
    axes = (-2, -2, -2, -1, -1)  # of the tokens in q, k, v, decay and beta
    chunks = [_chunks(x, size, axis) for x, axis in zip(inputs, axes, strict=True)]
    if state is None:
        state = jnp.zeros((batch, groups, n, inputs.k.shape[-1], d_v), jnp.float32)
    if before is None:
        before = jnp.ones((batch,), segments.dtype)
    runs = segment_runs(segments, before[:, None])
    start = (state.astype(jnp.float32), before)
    # Under `checkpoint` the scan saves its carry, and recomputes the chunk in the backward pass.
    step = jax.checkpoint(partial(_chunk, numerics=numerics))
    (last, _), out = lax.scan(step, start, (*chunks, _chunks(runs, size, -1)))
    # [chunks, batch, groups, n, size, d_v] -> [batch, chunks, size, groups, n, d_v]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, groups, n, d_v)
    return out[:, :seq], last


def segment_runs(segments: Array, before: Array | int = 1) -> Array:
    """Returns the segment of the last real token at or before each token: int ``[batch, seq]``.

    Padding at a row's start gets ``before`` (scalar or ``[batch, 1]``), the segment of an earlier
    state.

    Example: ``[[0, 2, 2, 0, 3]]`` -> ``[[1, 2, 2, 2, 3]]``.
    """
    index = jnp.where(segments > 0, jnp.arange(segments.shape[1])[None], -1)
    last = lax.cummax(index, axis=1)
    of_last = jnp.take_along_axis(segments, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, before, of_last)


def _chunks(x: Array, size: int, axis: int) -> Array:
    """Returns ``[chunks, batch, ...]`` of ``[batch, seq, ...]``, a chunk's tokens at ``axis``.

    The last chunk is padded: by zeros, which leave the state unchanged, or by the last segment.
    """
    batch, seq, *rest = x.shape
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -seq % size)
    mode = "constant"
    if x.ndim == 2:  # segments
        mode = "edge"
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(batch, -1, size, *rest)
    x = jnp.moveaxis(x, 2, axis)
    return jnp.moveaxis(x, 1, 0)


def _chunk(
    carry: tuple[Array, Array], chunk: tuple[Array, ...], numerics: Numerics
) -> tuple[Any, Array]:
    """Returns the state after a chunk, with its segment, and the outputs of the chunk's tokens.

    ``carry`` is a state ``[batch, groups, n, d_k, d_v]`` and its segment ``[batch]``; ``chunk`` are
    q and k ``[batch, groups, size, d_k]``, v ``[batch, groups, n, size, d_v]``, decays and betas
    ``[batch, groups, n, size]``, and segments ``[batch, size]``.
    """
    state, before = carry
    q, k, v, decay, beta, runs = chunk
    q = _unit(q) * q.shape[-1] ** -0.5
    k = _unit(k)
    total = jnp.cumsum(decay, axis=-1)
    last = total[..., -1:]
    same_run = runs[:, :, None] == runs[:, None, :]
    causal = jnp.tril(same_run)[:, None, None]
    # Decay between two tokens of a segment [..., size, size], from the state before the chunk to
    # each token, and from each token to the state after [..., size, 1].
    between = total[..., :, None] - total[..., None, :]
    pairs = jnp.exp(jnp.where(causal, between, -jnp.inf))
    last_run = runs[:, -1:]
    carried = _within(runs == before[:, None], jnp.exp(total))
    remaining = _within(runs == last_run, jnp.exp(last - total))
    both = jnp.concatenate([q, k], axis=2)
    # [batch, groups, n, 2 * size, d_v]: the state read by queries, then by keys
    of_state = _product("bgcd,bgnde->bgnce", both, state)
    of_q, of_k = jnp.split(of_state, 2, axis=3)
    # [batch, groups, 2 * size, size]
    of_keys = _product("bgcd,bgsd->bgcs", both, k)
    qk, kk = jnp.split(of_keys[:, :, None], 2, axis=3)
    weight = beta[..., None]
    # The corrections delta solve (I + system) delta = target: each depends on earlier tokens' ones.
    system = jnp.tril(weight * kk * pairs, -1)
    target = weight * (v.astype(jnp.float32) - carried * of_k)
    delta = solve_unit(system, target, numerics)
    within_chunk = _product("bgncs,bgnse->bgnce", qk * pairs, delta)
    out = carried * of_q + within_chunk
    decayed = _within(last_run == before[:, None], jnp.exp(last)) * state
    state = decayed + _product("bgcd,bgnce->bgnde", k, remaining * delta)
    return (state, runs[:, -1]), out


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)  # a float32 result


def _unit(x: Array) -> Array:
    """Returns float32 ``x`` scaled to length 1 along the last axis."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(square + _EPS)


def _within(mask: Array, decay: Array) -> Array:
    """Returns ``[batch, groups, n, tokens, 1]``: ``decay`` within ``mask [batch, tokens]``."""
    kept = jnp.where(mask[:, None, None], decay, 0.0)
    return kept[..., None]


def solve_unit(lower: Array, target: Array, numerics: Numerics) -> Array:
    """Returns ``(I + lower)^-1 target`` for strictly lower triangular matrices, in float32
    products.

    ``lower`` is ``[..., size, size]``, the size a power of two; ``target`` is ``[..., size,
    columns]``. On one CPU, LAPACK's substitution takes a tenth of the time of the inverse, whose
    matmuls suit matrix units. Several devices would gather the systems for it.
    """
    if numerics.facts_of == "cpu" and numerics.platform.devices == 1:
        return lax.linalg.triangular_solve(
            lower, target, left_side=True, lower=True, unit_diagonal=True
        )
    return _solve_unit(lower, target)


@jax.custom_vjp
def _solve_unit(lower: Array, target: Array) -> Array:
    solution, _ = _solve_unit_fwd(lower, target)
    return solution


def _solve_unit_fwd(lower: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _unit_inverse(lower)
    solution = inverse @ target
    return solution, (inverse, solution)


def _solve_unit_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """Returns the gradients of both arguments."""
    inverse, solution = saved
    # With A x = t: dt = A^-T g and dA = -dt x^T.
    back = jnp.swapaxes(inverse, -1, -2) @ g
    of_lower = -back @ jnp.swapaxes(solution, -1, -2)
    return jnp.tril(of_lower, -1), back


_solve_unit.defvjp(_solve_unit_fwd, _solve_unit_bwd)


def _unit_inverse(lower: Array) -> Array:
    """Returns ``(I + lower)^-1``, doubling the size of inverted diagonal blocks.

    ``[[A, 0], [C, B]]^-1 = [[A', 0], [-B' C A', B']]``. A Neumann series would have the same
    products but overflows for equal keys, whose powers grow like binomial coefficients.
    """
    size = lower.shape[-1]
    index = jnp.arange(size)
    highest = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    identity = jnp.broadcast_to(jnp.eye(size), lower.shape)
    inverse = identity - _corners(lower, index)
    for level in range(1, size.bit_length() - 1):  # blocks of 2^level rows
        corners = _corners(lower, index >> level)
        inverse = inverse - highest(highest(inverse, corners), inverse)
    return inverse


def _corners(lower: Array, block: Array) -> Array:
    """Returns the entries of ``lower`` in the blocks C of the pairs ``[[A, 0], [C, B]]``, and 0
    elsewhere.

    ``block`` int ``[size]`` is the number of the block of each row and column.
    """
    row = block[:, None]
    column = block[None, :]
    is_corner = (row == column + 1) & (row % 2 == 1)
    is_corner = jnp.broadcast_to(is_corner, lower.shape)
    return jnp.where(is_corner, lower, 0.0)
