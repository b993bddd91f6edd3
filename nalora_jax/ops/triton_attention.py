"""Attention of packed rows on a GPU: JAX's Pallas kernel for Triton, which compares segments where it computes scores.

cuDNN, which is asked first, takes visibility as an array ``[rows, 1, seq, seq]`` of bfloat16: 2 GB of a row of 32,768
tokens. From 256 MB on it is this kernel's. Windows, soft caps, cached keys, dropout, and lengths that the kernel
does not take are the plain function's, which stores no such array either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nalora_jax.ops.attention import CachedKeys, Keys, attention, drops
from nalora_jax.ops.blockwise_attention import AttentionConfig
from nalora_jax.ops.dispatch import Implementation, Numerics
from nalora_jax.ops.storage import round_and_save

TRITON = Implementation("triton", platform="gpu")
_BLOCK = 128  # queries and keys of a block; the backward pass has four gradients to hold, and takes half


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
) -> jax.Array:
    """`attention` of every example; on a mesh, each device its own examples and heads.

    Positions have to grow by one along each segment, and no window of ``config.windows`` to be shorter than the row.
    """
    fits = takes(q.shape[1], q.shape[-1], config.windows, config.softcap)
    # A Pallas call is not partitioned by the compiler: on several devices it needs the sharding to map itself over.
    mapped = config.sharding is not None or numerics.platform.devices == 1
    if not (fits and mapped) or cached is not None or drops(config, dropout_rng) or starts is not None:
        return NotImplemented
    del window
    q, k, v = (round_and_save(x, numerics).astype(numerics.operand) for x in (q, keys.k, keys.v))
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    attend: Callable[..., jax.Array] = partial(_one_device, config=config)
    if config.sharding is not None:
        mesh, (rows, *_) = config.sharding.mesh, (*config.sharding.spec, None)
        heads = P(rows, None, "tensor" if "tensor" in mesh.shape else None)
        specs = (heads, heads, heads, P(rows))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, k, v, segments).astype(numerics.result)


def takes(seq: int, head_dim: int, windows: Sequence[int], softcap: float | None) -> bool:
    """Whether the kernel computes rows of ``seq`` tokens: whole blocks, and no window that is shorter."""
    far = bool(windows) and min(windows) >= seq
    return far and seq % _BLOCK == 0 and head_dim in (32, 64, 128) and not softcap


def computed_pairs(seq: int) -> float:
    """Pairs of a query and a key whose scores a pass computes: those of every block that causality touches."""
    return seq * (seq + _BLOCK) / 2


def _one_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, config: AttentionConfig) -> jax.Array:
    """One device's part: ``[batch, seq, heads, head_dim]`` in q's dtype."""
    # Where it is used: Pallas is 5 MB and a tenth of a second of every other process.
    with warnings.catch_warnings():
        # JAX 0.12 calls it deprecated in favour of a package of its own (tokamax), which has no stable version yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    half = _BLOCK // 2
    sizes = BlockSizes(_BLOCK, _BLOCK, half, half, half, half)
    # The kernel knows no groups of heads: a key head is there once for every query head that reads it.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out: jax.Array = mha(
        q, k, v, segments, sm_scale=config.scale, causal=True, block_sizes=sizes, interpret=config.interpret
    )
    return out
