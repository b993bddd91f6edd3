"""Attention on a TPU by JAX's Pallas kernel splash attention, of whole rows and of rows split over
devices.

The kernel skips blocks by segment, causality and window, and stores no ``[seq, seq]``
probabilities. Rematerialized layers that save the results of matmuls also save its result and
log-sum-exps, so that the backward pass does not run the forward kernel again. Cached keys, dropout,
and shapes that the kernel does not support use the plain functions.

Pallas is imported inside functions, because it costs every process 5 MB and a tenth of a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import CONTEXT, TENSOR
from nalora_jax.ops.attention import (
    QKV,
    AttentionConfig,
    Keys,
    is_mapped,
    map_over_devices,
    save_heads,
    self_attention,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import mesh_sharding
from nalora_jax.ops.split_attention import attend_on_shards, reach, split_attention
from nalora_jax.ops.split_rows import (
    Row,
    gather_rows,
    gather_rows_exactly,
    join_blocks,
    prepend_context,
    shards_of,
    split_blocks,
)
from nalora_jax.ops.storage import SAVED

SPLASH = "splash"
REGISTER_LANES = 128  # width of a TPU register; block sizes must be multiples of it
# Queries and keys per block. A block is computed entirely if any of its pairs is seen: large blocks
# waste work along the diagonal, small blocks cost time between them.
BLOCKS = (1024, 512, 256, REGISTER_LANES)
# Most numbers in a block of queries, keys or values: the backward pass holds several blocks in a
# TPU's vector memory, and with 1,024 queries and heads of 256 v5p has too little of it.
LARGEST = 1024 * REGISTER_LANES
# The fused kernel writes one partial gradient of the queries per block of keys. With more parts
# they take gigabytes.
_MOST_PARTS = 8
_SUMS_ENTIRE_ARRAYS = ("TPU v5 lite", "TPU v5e")  # see `gather_rows_exactly`


@self_attention.implements(SPLASH)
def splash_attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `self_attention`; on a mesh, each device computes its own examples and heads.

    Positions must grow by one along each segment, and the window must be one of ``config.windows``:
    each is compiled as a branch, and a traced window selects one.
    """
    if not takes(q.shape[1], q.shape[-1]) or not is_mapped(config, numerics):
        return NotImplemented
    q, k, v = save_heads((q, keys.k, keys.v), config, numerics)
    # splash attention has no scale parameter
    arrays = tuple(x.astype(numerics.operand) for x in (q * config.scale, k, v))
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    attend = partial(_one_device, config=config)
    mapped = map_over_devices(attend, config, config.rows, P(), P(config.head_axis))
    out: Array = mapped(arrays, segments, _index(window, config.windows), keys.sinks)
    return out.astype(jnp.float32).astype(numerics.result)


def _index(window: Array | int, windows: tuple[int, ...]) -> Array:
    """Returns the index of a window among the ascending ``windows``, int32 ``[]``; 0 if there are
    none."""
    return jnp.sum(jnp.asarray(window) > np.asarray(windows[:-1], np.int32))


def takes(seq: int, head_dim: int) -> bool:
    """Returns True if the kernels support rows of ``seq`` tokens and heads of size ``head_dim``."""
    return seq % REGISTER_LANES == 0 and head_dim % 64 == 0


def _one_device(
    heads: QKV,
    segments: Array,
    choice: Array,
    sinks: Array | None,
    *,
    config: AttentionConfig,
) -> Array:
    """Computes one device's part ``[batch, seq, heads, head_dim]``; ``choice`` is the index of the
    window in ``config.windows``."""
    _, seq, n, head_dim = heads[0].shape

    def of_window(window: int) -> Any:
        """Returns attention limited to ``window`` tokens, as a function of q, k and v."""
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as masks,
        )

        mask: Any = masks.CausalMask((seq, seq))
        if window < seq:
            mask = masks.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0)
        kernel = _kernel(mask, n, 1, block_sizes(seq, window, head_dim), config)
        return partial(
            _called, kernel, of_queries=segments, of_keys=segments, sinks=sinks
        )

    branches = [of_window(size) for size in config.windows or (seq,)]
    out: Array = lax.switch(choice, branches, heads)
    return out


def block_sizes(seq: int, window: int, head_dim: int) -> dict[str, Any]:
    """Returns the kernels' block sizes for rows of ``seq`` tokens, a multiple of 128.

    Blocks are at most a quarter of the row and half of the ``window``, and smaller for heads of
    more than 128. One fused kernel computes all gradients with five matmuls instead of the seven of
    two kernels. It is not used with more than `_MOST_PARTS` blocks of keys, or with windows, which
    leave fewer matmuls but as many partial gradients to sum.
    """
    span = min(window, seq)
    most = min(seq // 4, LARGEST // head_dim)
    if span < seq:
        most = min(most, span // 2)
    block = largest_block(seq, most)
    names = [
        f"block_{name}"
        for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    ]
    if span == seq and seq // block <= _MOST_PARTS:
        return dict.fromkeys(names, block) | {"use_fused_bwd_kernel": True}
    return dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)


def largest_block(length: int, most: int) -> int:
    """Returns the largest block size that divides ``length`` and is at most ``most``; at least
    128."""
    sizes = [size for size in BLOCKS if length % size == 0 and size <= most]
    return max(sizes, default=REGISTER_LANES)


def computed_pairs(seq: int, window: int, head_dim: int) -> float:
    """Returns the query-key pairs that the kernels compute for a row: of every block of which any
    pair is seen."""
    block = block_sizes(seq, window, head_dim)["block_q"]
    # Blocks of keys before the diagonal block that a block of queries sees.
    before = -(-(min(window, seq) - 1) // block)
    computed = sum(min(i, before) + 1 for i in range(seq // block))
    return float(computed * block * block)


# ---------------------------------------------------------------- rows split over devices


@split_attention.implements(SPLASH)
def split_splash_attention(
    heads: QKV,
    row: Row,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    sinks: Array | None = None,
) -> Array:
    """Computes `split_attention` if the kernels support the blocks.

    Every shard has its queries' part of the causal mask of the row, so that it skips the blocks
    that its early and its late queries do not see. Each window is compiled as a branch, as in
    `splash_attention`.
    """
    q, k, v = heads
    sharding = config.sharding
    block = q.shape[1] // 2
    assert sharding is not None
    if not takes(block, q.shape[-1]) or row.starts is not None:
        return NotImplemented
    scaled = save_heads((q * config.scale, k, v), config, numerics)
    q, k, v = (x.astype(numerics.operand) for x in scaled)
    shards = shards_of(sharding)
    device_heads = q.shape[2] // sharding.mesh.shape.get(TENSOR, 1)
    seq = 2 * shards * block
    windows = config.windows or (seq,)
    # Windows that need the keys of the entire row.
    far = [size for size in windows if not reach((size,), block, row)]

    def of_row(window: int) -> Any:
        """Returns the kernel of all shards' queries."""
        limit = window if window < seq else None
        mask = _parts_mask()(block, shards, limit)
        sizes = _sizes(block, block, window, q.shape[3])
        return _kernel(mask, device_heads, shards, sizes, config)

    def on_shard(
        heads: QKV, row: Row, window: Array, sinks: Any, *kernels: Any
    ) -> Array:
        """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``."""
        by_size = dict(zip(far, kernels, strict=True))

        def attend(size: int, q: Array, k: Array, v: Array) -> Array:
            """Computes attention with a window of ``size`` tokens, for the shard's queries."""
            if size not in by_size:
                return _attend_near(size, config, row, sinks, (q, k, v))
            of_queries = join_blocks(row.slices(0).segments)
            of_row = (q, spread(k), spread(v))
            return _called(by_size[size], of_row, of_queries, row.segments, sinks)

        branches = [partial(attend, size) for size in windows]
        out: Array = lax.switch(_index(window, windows), branches, *heads)
        return out

    kernels = tuple(of_row(size) for size in far)
    by_query = mesh_sharding(sharding, None, CONTEXT)
    specs = tuple(kernel.manual_sharding_spec(by_query) for kernel in kernels)
    spread: Callable[[jax.Array], jax.Array] = gather_rows
    if numerics.platform.kind in _SUMS_ENTIRE_ARRAYS:
        spread = gather_rows_exactly
    out = attend_on_shards(
        on_shard, (q, k, v), row, window, config, sinks, *kernels, more_specs=specs
    )
    return out.astype(jnp.float32).astype(numerics.result)


def _attend_near(
    window: int, config: AttentionConfig, row: Row, sinks: Array | None, heads: QKV
) -> Array:
    """Computes a shard's part with a window that fits in a block, ``[batch, 2 * block, heads,
    head_dim]``; neighbouring shards exchange the tokens before a block."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    q, k, v = heads
    block = q.shape[1] // 2
    ahead = -(-(window - 1) // REGISTER_LANES) * REGISTER_LANES  # rounded up
    segments = row.slices(ahead).segments
    mask = masks.LocalMask(
        (block, ahead + block), window_size=(window - 1, 0), offset=ahead
    )
    sizes = _sizes(block, ahead + block, window, q.shape[3])
    kernel = _kernel(mask, q.shape[2], 1, sizes, config)
    near = split_blocks(q), prepend_context(k, ahead), prepend_context(v, ahead)
    return join_blocks(_called(kernel, near, segments[:, ahead:], segments, sinks))


def _called(
    kernel: Any, heads: QKV, of_queries: Array, of_keys: Array, sinks: Array | None
) -> Array:
    """Runs a kernel per example: heads and result are ``[batch, seq, heads, head_dim]``, segments
    ``[batch, seq]``, sinks ``[heads]`` or None."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
        SegmentIds,
    )

    q, k, v = (x.swapaxes(1, 2) for x in heads)
    attend = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    out: Array = attend(q, k, v, SegmentIds(of_queries, of_keys), sinks)
    return out.swapaxes(1, 2)


@functools.cache
def _parts_mask() -> Any:
    """Returns a subclass of Pallas's mask, which is defined on first use."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    class PartsMask(masks.LocalMask):
        """Causal mask of the queries of all shards, in the order of the shards, and the keys of the
        row.

        The kernel computes the mask of a block from the queries' indices. On the host only two
        facts of a block are used: whether it has a seen pair, and whether it has an unseen pair.
        They follow from the ends of the block, so that its pairs need not be enumerated.
        """

        def __init__(self, block: int, shards: int, window: int | None) -> None:
            """Creates the mask of rows of ``2 * shards`` blocks; ``window`` is None without a
            limit."""
            seq = 2 * shards * block
            left = None if window is None else window - 1
            super().__init__((seq, seq), (left, 0), 0)
            early = np.arange(shards)
            late = 2 * shards - 1 - early
            # [2 * shards, 1], in the order of the shards
            blocks = np.stack([early, late], axis=1).reshape(-1, 1)
            queries = blocks * block + np.arange(block)
            self.q_sequence = queries.reshape(-1).astype(np.int32)

        def __getitem__(self, index: Any) -> np.ndarray:
            """Returns ``[[some, all]]``: whether any and whether every pair of the indexed queries
            and keys is seen.

            Its ``any()`` and ``all()`` are those of the mask, for queries and keys that are
            neighbours.
            """
            queries = self.q_sequence[index[0]]
            keys = range(self.shape[1])[index[1]]
            left = self.window_size[0]
            if left is None:
                left = self.shape[1]
            some = keys[0] <= queries[-1] and keys[-1] >= queries[0] - left
            every = keys[-1] <= queries[0] and keys[0] >= queries[-1] - left
            return np.array([[some, every]])

    return PartsMask


def _kernel(
    mask: Any, heads: int, shards: int, sizes: dict[str, Any], config: AttentionConfig
) -> Any:
    """Returns Pallas's splash attention with the same ``mask`` for every head.

    ``shards`` is the number of devices that the queries are split over; ``sizes`` are the arguments
    of ``BlockSizes``.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

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
    """Returns the kernels' block sizes for two blocks of queries and keys of these lengths.

    They divide the lengths and are at most half of the window.
    """
    most = min(LARGEST // head_dim, max(window // 2, REGISTER_LANES))
    of_queries = ("block_q", "block_q_dkv", "block_q_dq")
    of_keys = (
        "block_kv",
        "block_kv_compute",
        "block_kv_dkv",
        "block_kv_dkv_compute",
        "block_kv_dq",
    )
    sizes = dict.fromkeys(of_queries, largest_block(queries, most))
    return sizes | dict.fromkeys(of_keys, largest_block(keys, most))
