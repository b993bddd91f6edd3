"""Attention on a TPU: JAX's Pallas splash attention, which skips blocks by segments, causality and window.

It stores no ``[seq, seq]`` probabilities. Its result and the logarithms of its sums are saved by rematerialised layers
that save products, so that the backward pass does not run it again. Cached keys, dropout, and shapes that the kernel
does not take are the plain function's.
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
from nalora_jax.ops.blockwise_attention import AttentionConfig
from nalora_jax.ops.dispatch import Implementation, Numerics
from nalora_jax.ops.storage import SAVED, round_and_save

SPLASH = Implementation("splash", platform="tpu")
_LANES = 128  # a TPU register's width: what block sizes must be multiples of
# Queries and keys of a block. A block is computed whole if any of it is seen, so that large ones waste products along
# the diagonal, and small ones time between them. Tunix takes 1,024 and MaxText 1,024 to 2,048 at these lengths.
_BLOCKS = (1024, 512, 256, _LANES)
# Gradients of queries that the fused kernel leaves for a sum, one of each block of keys: beyond, they take gigabytes.
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
) -> jax.Array:
    """`attention` of every example; on a mesh, each device its own examples and heads.

    Positions have to grow by one along each segment, and the window to be one of ``config.windows``: these are
    compiled, so that a traced window chooses among them.
    """
    # A Pallas call is not partitioned by the compiler: on several devices it needs the sharding to map itself over.
    mapped = config.sharding is not None or numerics.platform.devices == 1
    fits = takes(q.shape[1], q.shape[-1]) and mapped
    if not fits or cached is not None or drops(config, dropout_rng) or starts is not None:
        return NotImplemented
    q, k, v = (round_and_save(x, numerics) for x in (q, keys.k, keys.v))
    # [batch, heads, seq, head_dim]; splash has no scale of its own.
    arrays = [x.astype(numerics.operand).swapaxes(1, 2) for x in (q * config.scale, k, v)]
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    windows = np.asarray(config.windows[:-1], np.int32)
    choice = jnp.sum(jnp.asarray(window) > windows)  # 0 where there is one window
    attend: Callable[..., jax.Array] = partial(_one_device, config=config)
    if config.sharding is not None:
        mesh, (rows, *_) = config.sharding.mesh, (*config.sharding.spec, None)
        heads = P(rows, "tensor" if "tensor" in mesh.shape else None)
        specs = (heads, heads, heads, P(rows), P())
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(*arrays, segments, choice).swapaxes(1, 2).astype(jnp.float32).astype(numerics.result)


def takes(seq: int, head_dim: int) -> bool:
    """Whether the kernels take rows of ``seq`` tokens and heads of ``head_dim`` numbers."""
    return seq % _LANES == 0 and head_dim % 64 == 0


def _one_device(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, choice: jax.Array, *, config: AttentionConfig
) -> jax.Array:
    """One device's part: ``[batch, heads, seq, head_dim]``."""
    # Where it is used: Pallas is 5 MB and a tenth of a second of every other process.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    branches = [
        _for_window(q.shape[1], q.shape[2], window, config.softcap, config.interpret)
        for window in config.windows or (q.shape[2],)
    ]
    ids = SegmentIds(segments, segments)
    return jax.lax.switch(choice, [jax.vmap(branch) for branch in branches], q, k, v, ids)


def _for_window(heads: int, seq: int, window: int, softcap: float, interpret: bool) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    local = masks.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0) if window < seq else None
    mask = masks.CausalMask((seq, seq)) if local is None else local
    return splash_attention_kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**block_sizes(seq, window)),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def block_sizes(seq: int, window: int) -> dict[str, Any]:
    """Settings of the kernels for rows of ``seq`` tokens, a multiple of 128, that see ``window`` before them.

    Blocks are a quarter of the row at most, and half of the window. One kernel makes all gradients, with five products
    instead of the seven of two kernels, but where a window leaves few products and not fewer of the sums behind it.
    """
    seen = min(window, seq)
    fitting = [size for size in _BLOCKS if seq % size == 0 and 4 * size <= seq and (seen == seq or 2 * size <= seen)]
    block = max(fitting, default=_LANES)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    if seen == seq and seq // block <= _MOST_PARTS:
        return dict.fromkeys(names, block) | {"use_fused_bwd_kernel": True}
    return dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)


def computed_pairs(seq: int, window: int) -> float:
    """Pairs of a query and a key that the kernels compute for a row: those of all blocks of which any is seen."""
    block = block_sizes(seq, window)["block_q"]
    before = -(-(min(window, seq) - 1) // block)  # blocks of keys before the diagonal's that a block of queries sees
    return float(sum(min(i, before) + 1 for i in range(seq // block)) * block * block)
