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
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.cpu.native.library import available, has_tiles, multiplies_few_rows, multiplies_on_tiles, name_of
from nalora_jax.ops.storage import Stored

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slice(Stored):
    """One array of a stack, read in place; slicing would copy it every time."""

    stack: jax.Array  # [n, ...], bf16 viewed as uint16
    at: jax.Array  # int [], index in the stack

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one array."""
        return tuple(self.stack.shape[1:])

    def copied(self) -> jax.Array:
        """Returns a copy of the array, uint16."""
        return lax.dynamic_index_in_dim(self.stack, self.at, keepdims=False)

    def expand(self) -> jax.Array:
        """Returns a copy of the array as bf16."""
        return lax.bitcast_convert_type(self.copied(), jnp.bfloat16)


class Term(NamedTuple):
    """One product of a sum; both operands are bf16, or bf16 viewed as uint16."""

    x: jax.Array  # [rows, depth]
    y: Any  # an array or a `Slice`, [depth, columns] or [columns, depth]
    transposed: bool = False  # True for [columns, depth]


class Sum(NamedTuple):
    """The sum ``sum_t x_t y_t``."""

    terms: Sequence[Term]
    dtype: Any = "float32"  # of the result; "bfloat16" is rounded once, from the float32 sum


def products(*sums: Sum) -> list[jax.Array]:
    """Computes the sums ``[rows, columns]`` in one call, so that threads share all of the work.

    Args:
      sums: the sums; rows and columns may differ between them.

    Raises:
      AssertionError: shapes or dtypes do not match.
    """
    operands: list[jax.Array] = []
    indices: list[jax.Array] = []
    shapes = []
    for terms, dtype in sums:
        rows, columns = terms[0].x.shape[0], terms[0].y.shape[0 if terms[0].transposed else 1]
        for x, y, transposed in terms:
            chex.assert_shape(x, (rows, None))
            chex.assert_equal(y.shape, (columns, x.shape[1]) if transposed else (x.shape[1], columns))
            if isinstance(y, Slice):
                indices.append(jnp.asarray(y.at, jnp.int32))
                y = y.stack
            operands += [_bits(x), _bits(y)]
        bits = {"float32": jnp.float32, "bfloat16": jnp.uint16}[jnp.dtype(dtype).name]
        shapes.append(jax.ShapeDtypeStruct((rows, columns), bits))
    every = [term for terms, _ in sums for term in terms]
    results = _call("products", shapes)(
        *operands,
        *indices,
        terms=np.array([len(terms) for terms, _ in sums], np.int64),
        transposed=np.array([term.transposed for term in every], np.int64),
        stacked=np.array([isinstance(term.y, Slice) for term in every], np.int64),
    )
    return [r if r.dtype == jnp.float32 else lax.bitcast_convert_type(r, jnp.bfloat16) for r in results]


# Largest number of parts of the rows with separate sums, and so of threads.
_PARTS = 8
# Queries whose weights the gradient of attention stores at once, kQueries in the sources.
_AT_ONCE = 256


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
    out, logsumexp = _call("attention", shapes)(*_operands(heads), cap=np.float32(softcap), ordered=heads.ordered)
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
    arguments = (*_operands(heads), _bits(out), logsumexp, _bits(g))
    dq, dk, dv = _call("attention_gradient", shapes)(*arguments, cap=np.float32(softcap), ordered=heads.ordered)
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
    arguments = *new, cached.k.stack, cached.v.stack, jnp.asarray(cached.k.at, jnp.int32), *query_places, *key_places
    sinks = jnp.full(n, -1e30) if sinks is None else sinks
    result: jax.Array = _call("cached_attention", [jax.ShapeDtypeStruct((batch, n, dim), jnp.float32)])(
        *arguments,
        jnp.asarray(heads.window, jnp.int32),
        sinks.astype(jnp.float32),
        scale=np.float32(scale),
        cap=np.float32(softcap),
    )[0]
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
    chex.assert_axis_dimension(table, 1 if transposed else 0, d_model)
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    shapes = [row, row, jax.ShapeDtypeStruct((rows, d_model if gradient else 0), jnp.float32)]
    attributes = {"transposed": transposed, "scale": np.float32(scale), "cap": np.float32(softcap)}
    operands = (_bits(hidden), _bits(table), jnp.asarray(count, jnp.int32))
    top, total, attended = _call("over_vocabulary", shapes)(*operands, **attributes)
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
    (out,) = _call("gate", shapes)(_bits(z).reshape(-1), _factor(u, z), **logistic.attributes())
    return lax.bitcast_convert_type(out.reshape(z.shape), jnp.bfloat16)


def gate_gradient(
    z: jax.Array, u: jax.Array | None, g: jax.Array, logistic: Logistic, *, product: bool = False
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns the gradients of z and u, and with ``product`` also the result of `gate`.

    ``g`` is the gradient of that result. All arrays are bf16 of one shape.
    """
    chex.assert_equal_shape([z, g])
    flat = _bits(z).reshape(-1), _factor(u, z), _bits(g).reshape(-1)
    sizes = z.size, flat[1].size, z.size if product else 0
    shapes = [jax.ShapeDtypeStruct((size,), jnp.uint16) for size in sizes]
    results = _call("gate_gradient", shapes)(*flat, **logistic.attributes())
    dz, du, out = (lax.bitcast_convert_type(x, jnp.bfloat16) for x in results)
    of_u = None if u is None else du.reshape(z.shape)
    return dz.reshape(z.shape), of_u, out.reshape(z.shape) if product else None


def _factor(u: jax.Array | None, z: jax.Array) -> jax.Array:
    """Returns u, the factor of the gate, flat; an empty array means ones."""
    if u is None:
        return jnp.zeros((0,), jnp.uint16)
    chex.assert_equal_shape([z, u])
    return _bits(u).reshape(-1)


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
    arguments = (_bits(sampled.z), rows, sampled.weights, probed_rows, *delta, sampled.probe_weights)
    result: jax.Array = _call("gate_statistics", shapes)(*arguments, **logistic.attributes(), **_regions(cuts))[0]
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
    out, sums, _ = _call("gate_measured", shapes)(_bits(z), _bits(u), *measured, **attributes)
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
    if y is not None:
        chex.assert_equal_shape([x, y])
    added = x.shape if y is not None else (0, x.shape[1])
    shapes = [
        jax.ShapeDtypeStruct(added, jnp.float32),
        jax.ShapeDtypeStruct(x.shape, jnp.uint16),
        jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
    ]
    other = jnp.zeros((0, x.shape[1]), jnp.float32) if y is None else y
    s, held, inverse = _call("add_rms", shapes)(x, other, eps=np.float32(eps))
    return x if y is None else s, held, inverse


def normalise(held: jax.Array, inverse: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the norm, bf16 ``[rows, d]``, from the results of `add_rms`.

    ``scale`` is float32 ``[d]``.
    """
    (out,) = _call("normalise", [jax.ShapeDtypeStruct(held.shape, jnp.uint16)])(held, inverse, scale)
    return lax.bitcast_convert_type(out, jnp.bfloat16)


def norm_gradient(held: jax.Array, inverse: jax.Array, scale: jax.Array, dn: jax.Array, ds: jax.Array) -> jax.Array:
    """Returns the gradient of s, float32 ``[rows, d]``.

    It is the gradient through the norm, from bf16 ``dn``, plus float32 ``ds``.
    """
    chex.assert_equal_shape([held, dn, ds])
    shapes = [jax.ShapeDtypeStruct(held.shape, jnp.float32)]
    result: jax.Array = _call("norm_gradient", shapes)(held, inverse, scale, _bits(dn), ds)[0]
    return result


def _operands(heads: Heads) -> tuple[jax.Array, ...]:
    chex.assert_rank(heads[:3], 4)
    chex.assert_equal_shape([heads.k, heads.v])
    positions, segments, window = (jnp.asarray(x, jnp.int32) for x in heads[3:6])
    return (*map(_bits, heads[:3]), *jnp.broadcast_arrays(positions, segments), window)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    chex.assert_type(x, jnp.uint16)
    return x


def _call(function: str, shapes: list[jax.ShapeDtypeStruct]) -> Any:
    return jax.ffi.ffi_call(name_of(function), shapes, vmap_method="sequential")
