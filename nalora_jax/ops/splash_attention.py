"""JAX's Pallas splash attention on a TPU, which skips blocks by segment, causality and window.

It stores no ``[seq, seq]`` probabilities. Rematerialized layers that save the results of matmuls
also save its result and log-sum-exps, so that the backward pass does not run the forward kernel
again. Cached keys, dropout, and shapes that the kernel does not support use the plain function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nalora_jax.ops.attention import CachedKeys, Keys, attention, drops
from nalora_jax.ops.blockwise_attention import AttentionConfig, saved_heads
from nalora_jax.ops.dispatch import Implementation, Numerics
from nalora_jax.ops.storage import SAVED

SPLASH = Implementation("splash", platform="tpu")
LANES = 128  # width of a TPU register; block sizes must be multiples of it
# Queries and keys per block. A block is computed entirely if any of its pairs is seen: large blocks
# waste work along the diagonal, small blocks cost time between them. Tunix uses 1,024 and MaxText
# 1,024 to 2,048 at these lengths.
BLOCKS = (1024, 512, 256, LANES)
# Most numbers in a block of queries, keys or values: the backward pass holds several blocks in a TPU's
# vector memory, and with 1,024 queries and heads of 256 v5p has too little of it.
LARGEST = 1024 * LANES
# The fused kernel writes one partial gradient of the queries per block of keys. With more parts
# they take gigabytes.
_MOST_PARTS = 8


@SPLASH.implements(attention)
def splash_attention(
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

    Positions must grow by one along each segment, and the window must be one of ``config.windows``:
    each is compiled as a branch, and a traced window selects one.
    """
    # The compiler does not partition a Pallas call: on several devices it is mapped over the
    # sharding.
    mapped = config.sharding is not None or numerics.platform.devices == 1
    fits = takes(q.shape[1], q.shape[-1]) and mapped
    if not fits or cached is not None or drops(config, dropout_rng) or starts is not None:
        return NotImplemented
    q, k, v = saved_heads(q, keys.k, keys.v, config, numerics)
    # [batch, heads, seq, head_dim]; splash attention has no scale parameter
    arrays = [x.astype(numerics.operand).swapaxes(1, 2) for x in (q * config.scale, k, v)]
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    windows = np.asarray(config.windows[:-1], np.int32)
    choice = jnp.sum(jnp.asarray(window) > windows)  # 0 if there is one window
    attend: Callable[..., jax.Array] = partial(_one_device, config=config)
    if config.sharding is not None:
        mesh, (rows, *_) = config.sharding.mesh, (*config.sharding.spec, None)
        heads = P(rows, config.head_axis)
        specs = (heads, heads, heads, P(rows), P(), P(heads[1]))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return (
        attend(*arrays, segments, choice, sinks).swapaxes(1, 2).astype(jnp.float32).astype(numerics.result)
    )


def takes(seq: int, head_dim: int) -> bool:
    """Returns True if the kernels support rows of ``seq`` tokens and heads of size ``head_dim``."""
    return seq % LANES == 0 and head_dim % 64 == 0


def _one_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    choice: jax.Array,
    sinks: jax.Array | None,
    *,
    config: AttentionConfig,
) -> jax.Array:
    """Computes one device's part: ``[batch, heads, seq, head_dim]``."""
    # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    branches = [
        _for_window(q.shape[1:], window, config.softcap, config.interpret)
        for window in config.windows or (q.shape[2],)
    ]
    ids = SegmentIds(segments, segments)
    mapped = [jax.vmap(branch, in_axes=(0, 0, 0, 0, None)) for branch in branches]
    return jax.lax.switch(choice, mapped, q, k, v, ids, sinks)


def _for_window(
    shape: tuple[int, ...], window: int, softcap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """Returns the kernel for queries ``[heads, seq, head_dim]``."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, seq, head_dim = shape
    mask: Any = masks.CausalMask((seq, seq))
    if window < seq:
        mask = masks.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0)
    return splash_attention_kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**block_sizes(seq, window, head_dim)),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def block_sizes(seq: int, window: int, head_dim: int) -> dict[str, Any]:
    """Returns the kernels' block sizes for rows of ``seq`` tokens, a multiple of 128.

    Blocks are at most a quarter of the row and half of the ``window``, and smaller for heads of more
    than 128. One fused kernel computes all gradients with five matmuls instead of the seven of two
    kernels. It is not used with more than `_MOST_PARTS` blocks of keys, or with windows, which leave
    fewer matmuls but as many partial gradients to sum.
    """
    span = min(window, seq)
    most = min(seq // 4, LARGEST // head_dim)
    if span < seq:
        most = min(most, span // 2)
    block = largest_block(seq, most)
    names = (
        "block_q",
        "block_kv",
        "block_kv_compute",
        "block_q_dkv",
        "block_kv_dkv",
        "block_kv_dkv_compute",
    )
    if span == seq and seq // block <= _MOST_PARTS:
        return dict.fromkeys(names, block) | {"use_fused_bwd_kernel": True}
    return dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)


def largest_block(length: int, most: int) -> int:
    """Returns the largest block size that divides ``length`` and is at most ``most``; at least 128."""
    return max((size for size in BLOCKS if length % size == 0 and size <= most), default=LANES)


def computed_pairs(seq: int, window: int, head_dim: int) -> float:
    """Returns the number of query-key pairs that the kernels compute for a row.

    These are all pairs of every block of which any pair is seen.
    """
    block = block_sizes(seq, window, head_dim)["block_q"]
    # Blocks of keys before the diagonal block that a block of queries sees.
    before = -(-(min(window, seq) - 1) // block)
    return float(sum(min(i, before) + 1 for i in range(seq // block)) * block * block)
