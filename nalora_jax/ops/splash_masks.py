"""Masks of splash attention for rows that are split over devices (`nalora_jax.ops.split_rows`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


class PartsMask(masks.LocalMask):
    """Causal mask of the queries of all shards, in the order of the shards, and the keys of the row.

    The kernel computes the mask of a block from the queries' indices. On the host only two facts of
    a block are used: whether it has a seen pair, and whether it has an unseen pair. They follow from
    the ends of the block, so that its pairs need not be enumerated.
    """

    def __init__(self, block: int, shards: int, window: int | None) -> None:
        """Creates the mask of rows of ``2 * shards`` blocks; ``window`` is None without a limit."""
        seq = 2 * shards * block
        super().__init__((seq, seq), (None if window is None else window - 1, 0), 0)
        shard = np.arange(shards)
        blocks = np.stack([shard, 2 * shards - 1 - shard], axis=1).reshape(-1, 1)
        self.q_sequence = (blocks * block + np.arange(block)).reshape(-1).astype(np.int32)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns an array whose ``any()`` and ``all()`` are those of the mask of neighbouring queries and keys."""
        queries, keys = self.q_sequence[index[0]], range(self.shape[1])[index[1]]
        left = self.shape[1] if self.window_size[0] is None else self.window_size[0]
        some = keys[0] <= queries[-1] and keys[-1] >= queries[0] - left
        return np.array([[some, keys[-1] <= queries[0] and keys[0] >= queries[-1] - left]])
