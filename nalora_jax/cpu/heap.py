"""The C library's heap: what this process no longer needs is handed back to the system, what it needs again is kept."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any


def release() -> None:
    """Hands freed memory back where the C library is glibc, which keeps it otherwise; elsewhere does nothing.

    After the compilation of a step that is some 300 MB, which would stay beside the step's buffers for the whole run.
    """
    gc.collect()
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def retain() -> None:
    """Keeps what is freed from now on, where the C library is glibc, which hands large blocks back; elsewhere nothing.

    A step's buffers on a CPU are one block, allocated in every step: the system would fill it with zeros each time.
    """
    option = _function("mallopt")
    if option is not None:
        option(_MMAP_MAX, 0)
        option(_TRIM_THRESHOLD, _NEVER)


# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _NEVER = -1, -4, 2**31 - 1


def _function(name: str) -> Any:
    """A function that glibc has; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
