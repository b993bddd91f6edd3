"""Persistent cache of compiled programs.

JAX detects a damaged cache entry only if the compression format does: zlib does, zstandard does
not. So each entry ``NAME-cache`` has its SHA-256 in ``NAME-cache.sha256``, written right after the
entry.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax

from nalora_jax.common.devices import platform_name
from nalora_jax.common.digests import file_digest
from nalora_jax.common.downloads import cache_dir, private_dir
from nalora_jax.common.files import write_atomically
from nalora_jax.errors import NaloraError
from nalora_jax.method.step import Batch, Step, TrainState

log = logging.getLogger(__name__)

_SECONDS = "jax_persistent_cache_min_compile_time_secs"
# "-cache" is JAX's suffix
_ENTRY = "-cache"
_DIGEST = ".sha256"


def use_compilation_cache() -> None:
    """Enables the persistent compilation cache; only warns if others can write to its folder.

    Entries that do not match their digest or have none are removed first.
    """
    try:
        folder = private_dir(cache_dir() / "compiled")
        _remove_damaged(folder)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # also those of tiny models, so that a second run compiles little
    jax.config.update(_SECONDS, 0.1)
    _write_digests(folder)


def _remove_damaged(folder: Path) -> None:
    """Removes entries without a matching digest, concurrently with other processes."""
    damaged = 0
    for entry in folder.glob(f"*{_ENTRY}"):
        with contextlib.suppress(FileNotFoundError):
            actual = file_digest(entry)
            digest = _beside(entry)
            listed = None
            if digest.exists():
                listed = digest.read_bytes()
            if listed == actual.encode():
                continue
            # Without a digest the entry is incomplete, e.g. after a kill, and not damaged.
            damaged += listed is not None
            # The digest first: JAX does not overwrite an existing entry, so until the entry is gone
            # no other process writes a new one with its digest.
            digest.unlink(missing_ok=True)
            entry.unlink(missing_ok=True)
    for digest in folder.glob(f"*{_ENTRY}{_DIGEST}"):
        if not digest.with_suffix("").exists():
            digest.unlink(missing_ok=True)
    if damaged:
        log.warning(
            "compiled programs in %s were damaged (%d): compiling them again",
            folder,
            damaged,
        )


@cache
def _write_digests(folder: Path) -> None:
    """Registers a listener that writes digests after each cached compilation.

    Writing them at the end of the process would lose them if the process is killed.
    """

    def listen(event: str, duration_secs: float, **more: Any) -> None:
        """Writes the missing digests after a compilation that was long enough to be cached."""
        if (
            event != "/jax/core/compile/backend_compile_duration"
            or duration_secs < getattr(jax.config, _SECONDS)
        ):
            return
        # An entry without a digest is compiled again by the next process.
        with contextlib.suppress(OSError, NaloraError):
            for entry in folder.glob(f"*{_ENTRY}"):
                if not _beside(entry).exists():
                    write_atomically(_beside(entry), file_digest(entry))

    jax.monitoring.register_event_duration_secs_listener(listen)


def _beside(entry: Path) -> Path:
    """Returns the path of an entry's digest."""
    return entry.with_name(entry.name + _DIGEST)


def compile_ahead(step: Step, params: Any, state: TrainState, batch: Batch) -> Any:
    """Compiles ``step`` for arguments of these shapes before its first call.

    If the first call compiled the step, it would allocate its buffers on top of the compiler's
    memory. After an ahead-of-time compilation, a CPU's heap returns that memory to the system
    first. A call with these shapes does not compile again.

    Returns:
      The ``jax.stages.Compiled``; None if the step is not jitted.
    """
    if not hasattr(step, "lower"):
        return None
    compiled = step.lower(
        params, state, batch
    ).compile()  # the call of the step finds this program
    (device, *_) = jax.tree.leaves(batch)[0].devices()
    if platform_name(device) == "cpu":
        settle_heap()
    return compiled


# From malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_NEVER = 2**31 - 1


def settle_heap() -> None:
    """Returns freed memory to the system and keeps later freed memory, if the C library is glibc.

    The compilation of a step leaves some 300 MB in the heap, which would otherwise be held in
    addition to the step's buffers for the whole run. A step's buffers on a CPU are one block,
    allocated in every step: glibc returns large blocks by default, and the system would fill it
    with zeros each time.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
        # Large blocks come from the heap, and the heap is never trimmed, so pages are reused.
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
