"""Slices of arrays, and host buffers that JAX uses without a copy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes; XLA's requirement for a host buffer that it uses without a copy
Index = tuple[slice, ...]  # start and stop are set; a step only where columns of several leaves alternate
Key = tuple[tuple[int, int], ...]  # the same, hashable


def span(index: Index | None, shape: tuple[int, ...]) -> Key:
    """Returns start and stop along every axis."""
    return tuple(place.indices(size)[:2] for place, size in zip(index or (), shape, strict=True))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialized array that JAX can use on a CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
