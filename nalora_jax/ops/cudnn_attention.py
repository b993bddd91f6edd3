"""cuDNN's flash attention on a GPU, through `jax.nn.dot_product_attention`.

It stores no ``[seq, seq]`` probabilities, but visibility is passed as a mask of that size. Long
rows therefore use `nalora_jax.ops.triton_attention`. A sink is passed as one more key. Cached keys,
dropout, soft caps, and shapes that cuDNN rejects use the plain function.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from nalora_jax.common.devices import kind_of
from nalora_jax.ops.attention import CachedKeys, Keys, attention, drops
from nalora_jax.ops.blockwise_attention import AttentionConfig, saved_heads, visibility
from nalora_jax.ops.dispatch import AUTO, Implementation, Numerics

log = logging.getLogger(__name__)

CUDNN = Implementation("cudnn", platform="gpu")
# bytes of a mask; for longer rows a kernel that compares segments is faster
_LARGEST_BIAS = 256 << 20
# Positions and columns that hold a sink. cuDNN takes even lengths and widths that 8 divides.
_SINK_POSITIONS, _SINK_COLUMNS = 2, 8


@CUDNN.implements(attention)
def cudnn_attention(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    cached: CachedKeys | None = None,
    dropout_rng: jax.Array | None = None,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Computes `attention` if cuDNN supports the arguments."""
    fits = numerics.operand == "bfloat16" and takes(q.shape[1], q.shape[-1], config.softcap)
    if not fits or cached is not None or drops(config, dropout_rng) or starts is not None:
        return NotImplemented
    if numerics.implementation == AUTO and not fits_as_bias(_rows(q, config), q.shape[1]):
        return NotImplemented
    shapes = [x.shape if sinks is None else _with_sink(x.shape) for x in (q, keys.k)]
    if not compiles(*shapes, config.scale, numerics.platform.kind):
        return NotImplemented
    visible = visibility(keys.positions, keys.segments, keys.positions, keys.segments, window)
    q, k, v = saved_heads(q, keys.k, keys.v, config, numerics)
    attend = partial(dot_product, scale=config.scale, operand=numerics.operand, implementation="cudnn")
    if sinks is None:
        return attend(q, k, v, visible).astype(numerics.result)
    operands = with_sink_key(q, k, v, visible, sinks, config.scale)
    out = attend(*operands)[:, _SINK_POSITIONS:, :, : q.shape[-1]]
    return out.astype(numerics.result)


def with_sink_key(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, sinks: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the operands of `dot_product` with one more key, whose score is the sink and whose value is 0.

    The key is the first position, which all queries see. The second position is hidden and makes the length
    even. Sinks differ between the query heads that share a key head. Queries therefore hold the sink, as the
    sum of two bf16 numbers, in columns in which only the new key is not 0.

    Args:
      q: ``[batch, seq, heads, head_dim]``.
      k: ``[batch, seq, kv_heads, head_dim]``.
      v: the same.
      visible: bool ``[batch or 1, seq, seq]``.
      sinks: ``[heads]``.
      scale: multiplies q . k.

    Returns:
      The same with ``seq + 2`` and ``head_dim + 8``; the results of `dot_product` start at position 2.
    """
    scores = jax.lax.stop_gradient(sinks) / scale
    high = jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)
    columns = slice(q.shape[-1], q.shape[-1] + 2)
    before = (_SINK_POSITIONS, 0)
    q, k, v = (jnp.pad(x, ((0, 0), before, (0, 0), (0, _SINK_COLUMNS))) for x in (q, k, v))
    in_columns = jnp.stack([high, scores - high], axis=-1).astype(q.dtype)
    q = q.at[:, _SINK_POSITIONS:, :, columns].set(in_columns)
    k = k.at[:, 0, :, columns].set(1)
    visible = jnp.pad(visible, ((0, 0), before, before)).at[:, :, 0].set(True)
    return q, k, v, visible


def _with_sink(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of queries or keys with the positions and columns of a sink."""
    rows, seq, heads, dim = shape
    return rows, seq + _SINK_POSITIONS, heads, dim + _SINK_COLUMNS


def takes(seq: int, head_dim: int, softcap: float | None) -> bool:
    """Returns True if cuDNN may support rows of ``seq`` tokens; `compiles` tests it."""
    return not softcap and seq % 2 == 0 and head_dim % 8 == 0


def fits_as_bias(rows: float, seq: int) -> bool:
    """Returns True if the bf16 mask of a device's rows is small enough.

    Its shape is ``[rows, 1, seq, seq]``.
    """
    return 2 * rows * seq**2 <= _LARGEST_BIAS


def _rows(q: jax.Array, config: AttentionConfig) -> int:
    """Returns the rows of q on each device."""
    return q.shape[0] if config.sharding is None else config.sharding.shard_shape((q.shape[0], 1, 1))[0]


def is_forward_pass(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns True for cuDNN's forward pass: a policy for `jax.checkpoint` that saves its results.

    JAX gives these results no name.
    """
    return bool(primitive.name == "dot_product_attention_fwd_wrapper")


@lru_cache(maxsize=64)
def compiles(q_shape: tuple[int, ...], k_shape: tuple[int, ...], scale: float, kind: str) -> bool:
    """Returns True if cuDNN accepts these shapes on GPUs of a kind.

    The answer depends on cuDNN's version and on the kind. The program is always lowered for a GPU,
    and compiled if this process has a GPU of the kind.
    """
    device = _device(kind)
    place = None if device is None else SingleDeviceSharding(device)
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in (q_shape, k_shape))
    visible = jax.ShapeDtypeStruct((q_shape[0], q_shape[1], q_shape[1]), jnp.bool_, sharding=place)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return jnp.sum(dot_product(q, k, v, visible, scale, "bfloat16", "cudnn"))

    try:
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, visible)
        lowered = traced.lower(lowering_platforms=("cuda",))
        if device is not None:
            lowered.compile()
    except Exception as error:  # cuDNN's refusals have no common type
        log.warning("cuDNN attention does not apply to %s (%s); XLA's is used", q_shape, error)
        return False
    return True


def _device(kind: str) -> jax.Device | None:
    """Returns a GPU of this process of the given kind, or None."""
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:  # this process has no GPU backend
        return None
    return next((device for device in devices if kind_of(device) == kind), None)


def dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float,
    operand: str,
    implementation: str,
) -> jax.Array:
    """Calls `jax.nn.dot_product_attention` with the conventions of `attention`.

    Args:
      q: ``[batch, seq, heads, head_dim]``.
      k: ``[batch, seq, kv_heads, head_dim]``.
      v: the same.
      visible: bool ``[batch or 1, seq, seq]``.
      scale: multiplies q . k.
      operand: dtype of the operands.
      implementation: "cudnn" or "xla".

    Returns:
      ``[batch, seq, heads, head_dim]`` float32.
    """
    q, k, v = (x.astype(operand) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation=implementation)
    # Causality is implied by `visible`, but only the flag lets the kernel skip the upper triangle.
    return attend(q, k, v, mask=visible[:, None], is_causal=True).astype(jnp.float32)
