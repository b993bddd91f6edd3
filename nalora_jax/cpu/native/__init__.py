"""Native kernels for bf16 matmuls and attention that XLA calls on a CPU; sums are float32.

At the shapes of a training step XLA:CPU's matmuls reach half of the throughput of matrix tiles
(AMX) and two thirds of AVX2's. With the dot products of AVX512-BF16 they are fast, but adapters and
roundings take separate passes. Its attention passes over every score several times.
The C++ sources in this folder are compiled on first use, if the CPU has one of these instruction
sets and a C++ compiler is installed, and stored in the cache. Otherwise, and with
``NALORA_NATIVE=0``, XLA does the work. ``NALORA_NATIVE=plain`` compiles the same sources without
such instructions, for any CPU: slow, to test their callers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from nalora_jax.cpu.native.calls import bits, call, join_rows, looped, of_runs, row_call
from nalora_jax.cpu.native.library import available, has_tiles, multiplies_few_rows, multiplies_on_tiles
from nalora_jax.cpu.native.products import Slice, Sum, Term, products

__all__ = [
    "Cached",
    "Heads",
    "Logistic",
    "Measured",
    "Sampled",
    "Slice",
    "Sum",
    "Term",
    "add_rms",
    "attention",
    "attention_gradient",
    "available",
    "cached_attention",
    "gate",
    "gate_gradient",
    "gate_measured",
    "gate_statistics",
    "has_tiles",
    "multiplies_few_rows",
    "multiplies_on_tiles",
    "needs_result",
    "norm_gradient",
    "normalise",
    "over_vocabulary",
    "products",
]


# Largest number of parts of the rows with separate sums, and so of threads.
_PARTS = 8
# Queries whose weights the gradient of attention stores at once, kQueries in the sources.
_AT_ONCE = 256
# Place of the window among the operands of attention.
_WINDOW = (5,)


class Heads(NamedTuple):
    """Queries, keys, values, and integers that decide visibility (`nalora_jax.ops.attention`)."""

    q: jax.Array  # [batch, seq, heads, head_dim], scaled; bf16 or a view of it
    k: jax.Array  # [batch, seq, kv_heads, head_dim]
    v: jax.Array  # the same
    positions: jax.Array  # int [batch or 1, seq]
    segments: jax.Array  # int [batch or 1, seq]
    window: jax.Array | int  # scalar
    ordered: bool = True  # tokens of a segment are in order; False: any key may be seen


def attention(heads: Heads, softcap: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Computes attention; returns the result and the log-sum-exps.

    They are bf16 ``[batch, seq, heads, head_dim]`` and float32 ``[batch, heads, seq]``.
    """
    batch, seq, n, _ = heads.q.shape
    shapes = [
        jax.ShapeDtypeStruct(heads.q.shape, jnp.uint16),
        jax.ShapeDtypeStruct((batch, n, seq), jnp.float32),
    ]
    out, logsumexp = row_call("attention", shapes, _WINDOW, cap=np.float32(softcap), ordered=heads.ordered)(
        *_operands(heads)
    )
    return lax.bitcast_convert_type(out, jnp.bfloat16), logsumexp


def needs_result(seq: int, softcap: float) -> bool:
    """Returns True if `attention_gradient` needs the result of `attention`."""
    return seq > _AT_ONCE or softcap > 0


def attention_gradient(
    heads: Heads, out: jax.Array | None, logsumexp: jax.Array, g: jax.Array, softcap: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 gradients of q, k and v.

    Args:
      heads: as passed to `attention`.
      out: the result of `attention`, bf16; may be None unless `needs_result`.
      logsumexp: the log-sum-exps that `attention` returned.
      g: the result's cotangent, bf16.
      softcap: as passed to `attention`.
    """
    if out is None:
        out = jnp.zeros((*heads.q.shape[:3], 0), jnp.uint16)
        chex.assert_equal_shape([heads.q, g])
    else:
        chex.assert_equal_shape([heads.q, out, g])
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in heads[:3]]
    arguments = (*_operands(heads), bits(out), logsumexp, bits(g))
    dq, dk, dv = row_call(
        "attention_gradient", shapes, _WINDOW, cap=np.float32(softcap), ordered=heads.ordered
    )(*arguments)
    return dq, dk, dv


class Cached(NamedTuple):
    """Keys and values of all layers, with the integers that decide which slots are seen."""

    k: Slice  # of [layers, batch, kv_heads, head_dim, slots]
    v: Slice  # of [layers, batch, kv_heads, slots, head_dim]
    positions: jax.Array  # int [batch or 1, slots]
    segments: jax.Array  # int [batch or 1, slots]; 0: empty


def cached_attention(
    heads: Heads, cached: Cached, scale: float, softcap: float = 0.0, sinks: jax.Array | None = None
) -> jax.Array:
    """Returns attention of one new token per row to cached keys and to itself.

    Args:
      heads: of the new tokens, seq 1; float32, rounded to bf16 as the cache is.
      cached: earlier tokens, seen under the same rule.
      scale: multiplies q . k.
      softcap: ``c tanh(s / c)`` of the scores; 0: none.
      sinks: float32 ``[heads]``, one more score of each head, without a value; None: none.

    Returns:
      float32 ``[batch, 1, heads, head_dim]``.
    """
    batch, _, n, dim = heads.q.shape
    _, _, kv_heads, _, slots = cached.k.stack.shape
    chex.assert_shape(heads.q, (batch, 1, n, dim))
    chex.assert_shape([heads.k, heads.v], (batch, 1, kv_heads, dim))
    new = (x[:, 0].astype(jnp.float32) for x in heads[:3])
    of_query = (jnp.asarray(x, jnp.int32)[:, 0] for x in (heads.positions, heads.segments))
    of_keys = (jnp.asarray(x, jnp.int32) for x in (cached.positions, cached.segments))
    query_places = (jnp.broadcast_to(x, (batch,)) for x in of_query)
    key_places = (jnp.broadcast_to(x, (batch, slots)) for x in of_keys)
    arguments = (
        *new,
        cached.k.stack,
        cached.v.stack,
        jnp.asarray(cached.k.at, jnp.int32),
        *query_places,
        *key_places,
    )
    if sinks is None:
        sinks = jnp.full(n, -1e30)
    shapes = [jax.ShapeDtypeStruct((batch, n, dim), jnp.float32)]
    called = call("cached_attention", shapes, scale=np.float32(scale), cap=np.float32(softcap))
    window = jnp.asarray(heads.window, jnp.int32)
    result: jax.Array = called(*arguments, window, sinks.astype(jnp.float32))[0]
    return result[:, None]


def over_vocabulary(
    hidden: jax.Array,
    table: jax.Array,
    count: jax.Array | int,
    *,
    transposed: bool,
    scale: float = 1.0,
    softcap: float = 0.0,
    gradient: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes ``max l``, ``sum exp(l - max)`` and ``sum exp(l - max) l' E`` of the logits ``l``.

    Args:
      hidden: bf16 ``[rows, d_model]``, or a view of it.
      table: E, bf16 ``[d_model, vocab]``, or ``[vocab, d_model]`` if ``transposed``; or a view of
        it.
      count: number of rows to compute, starting at the first; for the others the results are 0, 1
        and zeros.
      transposed: see table.
      scale: products are multiplied by it, before the cap.
      softcap: ``c tanh(l / c)``; 0: none.
      gradient: compute the third sum.

    Returns:
      Float32 ``[rows]``, ``[rows]`` and ``[rows, d_model]`` (``[rows, 0]`` without ``gradient``),
      with ``l'`` the derivative of the logits by the products.
    """
    rows, d_model = hidden.shape
    chex.assert_axis_dimension(table, int(transposed), d_model)
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    shapes = [row, row, jax.ShapeDtypeStruct((rows, d_model if gradient else 0), jnp.float32)]
    attributes = {"transposed": transposed, "scale": np.float32(scale), "cap": np.float32(softcap)}
    operands = (bits(hidden), bits(table), jnp.asarray(count, jnp.int32))
    called = custom_vmap(call("over_vocabulary", shapes, **attributes))

    def joined(
        size: int, batched: Sequence[bool], *operands: jax.Array
    ) -> tuple[list[jax.Array], list[bool]]:
        """Computes the rows of all runs in one call, each run's first rows first."""
        if batched[1]:
            return looped(call("over_vocabulary", shapes, **attributes), batched, operands), [True] * 3
        of_run, counts = of_runs(operands[0], size, batched[0]), of_runs(operands[2], size, batched[2])
        order = jnp.argsort((jnp.arange(rows)[None] >= counts[:, None]).reshape(-1), stable=True)
        found = over_vocabulary(
            jnp.take(join_rows(of_run), order, axis=0),
            operands[1],
            jnp.sum(counts),
            transposed=transposed,
            scale=scale,
            softcap=softcap,
            gradient=gradient,
        )
        back = jnp.argsort(order)
        return [jnp.take(x, back, axis=0).reshape(size, rows, *x.shape[1:]) for x in found], [True] * 3

    called.def_vmap(joined)
    top, total, attended = called(*operands)
    return top, total, attended


class Logistic(NamedTuple):
    """A gate with selection weight ``sigmoid(a z + b z^3)``."""

    a: float
    b: float

    def attributes(self) -> dict[str, Any]:
        """Returns the parameters as attributes of a library call."""
        return {"a": np.float32(self.a), "b": np.float32(self.b)}


def gate(z: jax.Array, u: jax.Array | None, logistic: Logistic) -> jax.Array:
    """Computes ``phi(z) u`` with ``phi(z) = z sigmoid(a z + b z^3)``; without u, ``phi(z)``.

    All arrays are bf16 of one shape; z and u may be views of bf16.
    """
    shapes = [jax.ShapeDtypeStruct((z.size,), jnp.uint16)]
    (out,) = row_call("gate", shapes, **logistic.attributes())(bits(z).reshape(-1), _factor(u, z))
    return lax.bitcast_convert_type(out.reshape(z.shape), jnp.bfloat16)


def gate_gradient(
    z: jax.Array, u: jax.Array | None, g: jax.Array, logistic: Logistic, *, product: bool = False
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns the gradients of z and u, and with ``product`` also the result of `gate`.

    ``g`` is the gradient of that result. All arrays are bf16 of one shape.
    """
    chex.assert_equal_shape([z, g])
    flat = bits(z).reshape(-1), _factor(u, z), bits(g).reshape(-1)
    sizes = z.size, flat[1].size, z.size if product else 0
    shapes = [jax.ShapeDtypeStruct((size,), jnp.uint16) for size in sizes]
    results = row_call("gate_gradient", shapes, **logistic.attributes())(*flat)
    dz, du, out = (lax.bitcast_convert_type(x, jnp.bfloat16) for x in results)
    of_u = None if u is None else du.reshape(z.shape)
    return dz.reshape(z.shape), of_u, out.reshape(z.shape) if product else None


def _factor(u: jax.Array | None, z: jax.Array) -> jax.Array:
    """Returns u, the factor of the gate, flat; an empty array means ones."""
    if u is None:
        return jnp.zeros((0,), jnp.uint16)
    chex.assert_equal_shape([z, u])
    return bits(u).reshape(-1)


class Sampled(NamedTuple):
    """A block's tokens that its statistics are computed from."""

    z: jax.Array  # [tokens, d_ff], bf16 or a view of it
    rows: jax.Array  # int [taken], indices of tokens
    weights: jax.Array  # float32 [taken]
    probed_rows: jax.Array  # int [probed], tokens whose adapter output is known
    # The adapter's output, float32 [probed, d_ff], or its factors [probed, r] and [r, d_ff].
    delta: jax.Array | tuple[jax.Array, jax.Array]
    probe_weights: jax.Array  # float32 [probed]


def gate_statistics(sampled: Sampled, logistic: Logistic, cuts: tuple[float, float]) -> jax.Array:
    """Returns weighted sums over tokens for every channel, float32 ``[7, d_ff]``.

    The sums, in order: ``|phi'(z)|``; z below the first cut, below 0 and below the second cut;
    ``|F|``, ``|S|`` and ``|z rho'(z) dz|``. See `nalora_jax.method.statistics`.
    """
    shapes = [jax.ShapeDtypeStruct((7, sampled.z.shape[1]), jnp.float32)]
    rows, probed_rows = (jnp.asarray(x, jnp.int32) for x in (sampled.rows, sampled.probed_rows))
    if isinstance(sampled.delta, tuple):
        delta = jnp.zeros((0, sampled.z.shape[1]), jnp.float32), *sampled.delta
    else:
        delta = sampled.delta, jnp.zeros((len(probed_rows), 0)), jnp.zeros((0, sampled.z.shape[1]))
    arguments = (bits(sampled.z), rows, sampled.weights, probed_rows, *delta, sampled.probe_weights)
    result: jax.Array = call("gate_statistics", shapes, **logistic.attributes(), **_regions(cuts))(
        *arguments
    )[0]
    return result


class Measured(NamedTuple):
    """Inputs of the statistics over all tokens of a block; a weight of 0 excludes a token."""

    weights: jax.Array  # float32 [tokens]
    probe_weights: jax.Array  # float32 [tokens], for the adapter's output
    hidden: jax.Array  # float32 [tokens, r]; hidden times b is the adapter's part of z
    b: jax.Array  # float32 [r, d_ff]


def gate_measured(
    z: jax.Array, u: jax.Array, measured: Measured, logistic: Logistic, cuts: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Computes `gate` of z and u and the sums of `gate_statistics` in one pass.

    z and u are ``[tokens, d_ff]``.
    """
    chex.assert_equal_shape([z, u])
    shapes = [
        jax.ShapeDtypeStruct(z.shape, jnp.uint16),
        jax.ShapeDtypeStruct((7, z.shape[1]), jnp.float32),
        # Scratch memory.
        jax.ShapeDtypeStruct((max(1, min(_PARTS, z.shape[0])), 7, z.shape[1]), jnp.float32),
    ]
    attributes = {**logistic.attributes(), **_regions(cuts)}
    out, sums, _ = call("gate_measured", shapes, **attributes)(bits(z), bits(u), *measured)
    return lax.bitcast_convert_type(out, jnp.bfloat16), sums


def _regions(cuts: tuple[float, float]) -> dict[str, Any]:
    """Returns the cuts as attributes of a library call."""
    return {"low": np.float32(cuts[0]), "high": np.float32(cuts[1])}


def add_rms(x: jax.Array, y: jax.Array | None, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes ``x + y`` (x without y) and the inputs of its root-mean-square norm.

    x and y are float32 ``[rows, d]``.

    Returns:
      ``s = x + y``, its bits in bf16 (uint16 ``[rows, d]``), and ``1 / sqrt(mean(s^2) + eps)`` of
      the rounded sum, ``[rows]``.
    """
    added = y
    if added is None:
        added = jnp.zeros((0, x.shape[1]), jnp.float32)
    else:
        chex.assert_equal_shape([x, added])
    shapes = [
        jax.ShapeDtypeStruct(added.shape, jnp.float32),
        jax.ShapeDtypeStruct(x.shape, jnp.uint16),
        jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
    ]
    s, held, inverse = row_call("add_rms", shapes, eps=np.float32(eps))(x, added)
    if y is None:
        s = x
    return s, held, inverse


def normalise(held: jax.Array, inverse: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the norm, bf16 ``[rows, d]``, from the results of `add_rms`.

    ``scale`` is float32 ``[d]``.
    """
    (out,) = row_call("normalise", [jax.ShapeDtypeStruct(held.shape, jnp.uint16)], (2,))(
        held, inverse, scale
    )
    return lax.bitcast_convert_type(out, jnp.bfloat16)


def norm_gradient(
    held: jax.Array, inverse: jax.Array, scale: jax.Array, dn: jax.Array, ds: jax.Array
) -> jax.Array:
    """Returns the gradient of s, float32 ``[rows, d]``.

    It is the gradient through the norm, from bf16 ``dn``, plus float32 ``ds``.
    """
    chex.assert_equal_shape([held, dn, ds])
    shapes = [jax.ShapeDtypeStruct(held.shape, jnp.float32)]
    result: jax.Array = row_call("norm_gradient", shapes, (2,))(held, inverse, scale, bits(dn), ds)[0]
    return result


def _operands(heads: Heads) -> tuple[jax.Array, ...]:
    chex.assert_rank(heads[:3], 4)
    chex.assert_equal_shape([heads.k, heads.v])
    positions, segments, window = (jnp.asarray(x, jnp.int32) for x in heads[3:6])
    return (*map(bits, heads[:3]), *jnp.broadcast_arrays(positions, segments), window)
