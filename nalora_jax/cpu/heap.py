"""Settings of the C library's heap: free memory is returned, a step's buffers are kept."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any


def release() -> None:
    """Returns freed memory to the system if the C library is glibc, which keeps it by default.

    With other libraries it does nothing. After the compilation of a step this is some 300 MB, which
    would otherwise be held in addition to the step's buffers for the whole run.
    """
    gc.collect()
    trim = _function("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def retain() -> None:
    """Keeps memory that is freed later if the C library is glibc, which returns large blocks.

    With other libraries it does nothing. A step's buffers on a CPU are one block, allocated in
    every step; the system would fill it with zeros each time.
    """
    option = _function("mallopt")
    if option is not None:
        option(_MMAP_MAX, 0)
        option(_TRIM_THRESHOLD, _NEVER)


# From malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _NEVER = -1, -4, 2**31 - 1


def _function(name: str) -> Any:
    """Returns a function of glibc; None with other libraries."""
    if sys.platform == "linux":
        return getattr(ctypes.CDLL(None), name, None)
    return None
