"""The C library's heap: memory that this process no longer uses, handed back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Hands freed memory back where the C library is glibc, which keeps it otherwise; elsewhere does nothing.

    After the compilation of a step that is some 300 MB, which would stay beside the step's buffers for the whole run.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
