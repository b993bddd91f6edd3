"""Attention of long packed rows on a GPU: JAX's Pallas kernel for Triton.

The kernel compares segments while it computes scores. cuDNN, which has priority, takes visibility
as a bf16 array ``[rows, 1, seq, seq]``: 2 GB for a row of 32,768 tokens. If that array is larger
than 256 MB, this kernel is used. Windows, soft caps, sinks, cached keys, dropout, and lengths that the
kernel does not support use the plain function, which stores no such array either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# The order of registration is the order of choice: cuDNN is asked before Triton, whichever module is imported first.
import nalora_jax.ops.cudnn_attention  # noqa: F401
from nalora_jax.ops.attention import CachedKeys, Keys, attention, drops
from nalora_jax.ops.blockwise_attention import AttentionConfig, saved_heads
from nalora_jax.ops.dispatch import Implementation, Numerics

TRITON = Implementation("triton", platform="gpu")
# Queries and keys per block; the backward pass stores four gradients and uses half of it.
_BLOCK = 128


@TRITON.implements(attention)
def triton_attention(
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
    """Computes `attention` of every example.

    On a mesh, each device computes its own examples and heads.

    Positions must grow by one along each segment, and no window of ``config.windows`` may be
    shorter than the row.
    """
    fits = takes(q.shape[1], q.shape[-1], config.windows, config.softcap) and sinks is None
    # The compiler does not partition a Pallas call: on several devices it is mapped over the
    # sharding.
    mapped = config.sharding is not None or numerics.platform.devices == 1
    if not (fits and mapped) or cached is not None or drops(config, dropout_rng) or starts is not None:
        return NotImplemented
    del window
    inputs = saved_heads(q, keys.k, keys.v, config, numerics)
    q, k, v = (x.astype(numerics.operand) for x in inputs)
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    attend: Callable[..., jax.Array] = partial(_one_device, config=config)
    if config.sharding is not None:
        mesh, (rows, *_) = config.sharding.mesh, (*config.sharding.spec, None)
        heads = P(rows, None, config.head_axis)
        specs = (heads, heads, heads, P(rows))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, k, v, segments).astype(numerics.result)


def takes(seq: int, head_dim: int, windows: Sequence[int], softcap: float | None) -> bool:
    """Returns True if the kernel supports rows of ``seq`` tokens.

    It needs whole blocks, and no window may be shorter than the row.
    """
    far = bool(windows) and min(windows) >= seq
    return far and seq % _BLOCK == 0 and head_dim in (32, 64, 128) and not softcap


def computed_pairs(seq: int) -> float:
    """Returns the number of query-key pairs in the blocks that causality touches, for one row."""
    return seq * (seq + _BLOCK) / 2


def _one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, config: AttentionConfig
) -> jax.Array:
    """Computes one device's part: ``[batch, seq, heads, head_dim]`` in q's dtype."""
    # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
    with warnings.catch_warnings():
        # JAX 0.12 deprecates it in favour of a separate package (tokamax), which has no stable
        # version yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    half = _BLOCK // 2
    sizes = BlockSizes(_BLOCK, _BLOCK, half, half, half, half)
    # The kernel does not group heads: a key head is repeated for every query head that reads it.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out: jax.Array = mha(
        q, k, v, segments, sm_scale=config.scale, causal=True, block_sizes=sizes, interpret=config.interpret
    )
    return out
