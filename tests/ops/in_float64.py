"""Attention by its formula, in NumPy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def packed_rows(batch: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 positions and segments of rows with three segments and padding, or left padding
    and one."""
    lengths = [[seq // 2, seq // 4, seq - seq // 2 - seq // 4 - 3, 3], [5, seq - 5]]
    segments = [np.repeat([1, 2, 3, 0], lengths[0]), np.repeat([0, 1], lengths[1])]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in lengths]
    return np.resize(np.int32(positions), (batch, seq)), np.resize(np.int32(segments), (batch, seq))


def visible(positions: Any, segments: Any, window: int) -> np.ndarray:
    """Returns whether a query sees a key, ``[batch, query, key]``."""
    positions, segments = np.asarray(positions), np.asarray(segments)
    ahead = positions[:, :, None] - positions[:, None, :]
    return (segments[:, :, None] == segments[:, None, :]) & (ahead >= 0) & (ahead < window)


def attention64(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    seen: np.ndarray,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Any = None,
) -> list[np.ndarray]:
    """Returns result, log-sum-exps ``[batch, heads, seq]``, and gradients of q, k and v for the
    cotangent ``g``."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores, slope = np.einsum("bqhd,bkhd->bhqk", q, k) * scale, scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
        slope = scale * (1 - (scores / softcap) ** 2)
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - top)
    weights = np.exp(scores - top) / total
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    back = np.einsum("bqhd,bkhd->bhqk", g, v) - np.einsum("bqhd,bqhd->bhq", g, out)[..., None]
    slope = weights * back * slope
    dk, dv = np.einsum("bhqk,bqhd->bkhd", slope, q), np.einsum("bhqk,bqhd->bkhd", weights, g)
    dk, dv = (x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3) for x in (dk, dv))
    return [out, (top + np.log(total))[..., 0], np.einsum("bhqk,bkhd->bqhd", slope, k), dk, dv]
