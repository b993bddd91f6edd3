"""Splash attention of rows that are split over devices (`nalora_jax.ops.split_attention`) on a TPU.

Every shard has its queries' part of the causal mask of the row, so that it skips the blocks that
its early and its late queries do not see.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import CONTEXT
from nalora_jax.ops.blockwise_attention import AttentionConfig, saved_heads
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.splash_attention import LANES, LARGEST, SPLASH, largest_block, takes
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import (
    Row,
    by_block,
    by_part,
    gathered,
    gathered_exactly,
    shards_of,
    with_preceding,
)
from nalora_jax.ops.split_shard import Spread, on_shards, reach
from nalora_jax.ops.storage import SAVED

_SUMS_ENTIRE_ARRAYS = ("TPU v5 lite", "TPU v5e")  # see `gathered_exactly`


@SPLASH.implements(split_attention)
def split_splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Computes `split_attention` if the kernels support the blocks.

    Each window is compiled as a branch, as in `nalora_jax.ops.splash_attention`.
    """
    sharding, block = config.sharding, q.shape[1] // 2
    assert sharding is not None
    if not takes(block, q.shape[-1]) or row.starts is not None:
        return NotImplemented
    scaled = saved_heads(q * config.scale, k, v, config, numerics)
    q, k, v = (x.astype(numerics.operand) for x in scaled)
    shards = shards_of(sharding)
    heads = q.shape[2] // sharding.mesh.shape.get("tensor", 1)
    windows = config.windows or (2 * shards * block,)
    far = [size for size in windows if not reach((size,), block, row)]
    kernels = tuple(_of_row((heads, q.shape[3]), block, shards, size, config) for size in far)
    by_query = NamedSharding(sharding.mesh, P(None, CONTEXT))
    specs = tuple(kernel.manual_sharding_spec(by_query) for kernel in kernels)
    spread = gathered_exactly if numerics.platform.kind in _SUMS_ENTIRE_ARRAYS else gathered
    attend = partial(_on_shard, config=config, windows=windows, far=tuple(far), spread=spread)
    out = on_shards(attend, q, k, v, row, window, config, sinks, *kernels, more_specs=specs)
    return out.astype(jnp.float32).astype(numerics.result)


def _on_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array,
    sinks: jax.Array | None,
    *kernels: Any,
    config: AttentionConfig,
    windows: tuple[int, ...],
    far: tuple[int, ...],
    spread: Spread,
) -> jax.Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``."""
    by_size = dict(zip(far, kernels, strict=True))

    def branch(size: int) -> Any:
        if size in by_size:
            return partial(_attend_row, by_size[size], row, sinks, spread)
        return partial(_attend_near, size, config, row, sinks)

    choice = jnp.sum(window > np.asarray(windows[:-1], np.int32))  # 0 if there is one window
    out: jax.Array = lax.switch(choice, [branch(size) for size in windows], q, k, v)
    return out


def _attend_row(
    kernel: Any, row: Row, sinks: jax.Array | None, spread: Spread, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Computes attention to the keys of the whole row."""
    return _called(kernel, q, spread(k), spread(v), by_part(row.slices(0).segments), row.segments, sinks)


def _attend_near(
    window: int,
    config: AttentionConfig,
    row: Row,
    sinks: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Computes attention to the keys that a window within a block reaches."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = q.shape[1] // 2
    ahead = -(-(window - 1) // LANES) * LANES
    segments = row.slices(ahead).segments
    mask = masks.LocalMask((block, ahead + block), window_size=(window - 1, 0), offset=ahead)
    kernel = _kernel(mask, q.shape[2], 1, _sizes(block, ahead + block, window, q.shape[3]), config)
    keys, values = (with_preceding(x, ahead) for x in (k, v))
    return by_part(_called(kernel, by_block(q), keys, values, segments[:, ahead:], segments, sinks))


def _called(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    of_queries: jax.Array,
    of_keys: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    attend = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    out: jax.Array = attend(q, k, v, SegmentIds(of_queries, of_keys), sinks)
    return out.swapaxes(1, 2)


def _of_row(heads: tuple[int, int], block: int, shards: int, window: int, config: AttentionConfig) -> Any:
    """Returns the kernel of all shards' queries; ``heads`` are their number and size."""
    from nalora_jax.ops.splash_masks import PartsMask

    seq = 2 * shards * block
    mask = PartsMask(block, shards, window if window < seq else None)
    return _kernel(mask, heads[0], shards, _sizes(block, block, window, heads[1]), config)


def _kernel(mask: Any, heads: int, shards: int, sizes: dict[str, Any], config: AttentionConfig) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=config.softcap or None,
        residual_checkpoint_name=SAVED,
        interpret=config.interpret,
    )


def _sizes(queries: int, keys: int, window: int, head_dim: int) -> dict[str, Any]:
    """Returns the kernels' block sizes, which divide the lengths; at most half of the window."""
    most = min(LARGEST // head_dim, max(window // 2, LANES))
    of_queries = ("block_q", "block_q_dkv", "block_q_dq")
    of_keys = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
    sizes = dict.fromkeys(of_queries, largest_block(queries, most))
    return sizes | dict.fromkeys(of_keys, largest_block(keys, most))
