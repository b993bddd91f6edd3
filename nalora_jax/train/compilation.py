"""Compiled programs, kept from process to process.

JAX finds an entry of its cache that was damaged only where its way of compressing does: zlib's does, zstandard's does
not. So each entry ``NAME-cache`` has its SHA-256 beside it, ``NAME-cache.sha256``, written as soon as the entry is.
"""

from __future__ import annotations

import contextlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import jax

from nalora_jax.distributed.devices import platform_name
from nalora_jax.downloads import cache_dir, private_dir
from nalora_jax.errors import NaloraError
from nalora_jax.files import file_digest, write_atomically
from nalora_jax.method.step import Batch, Step, TrainState
from nalora_jax.ops.dispatch import Platform, hooks_of

log = logging.getLogger(__name__)

_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_ENTRY, _DIGEST = "-cache", ".sha256"  # the first is JAX's


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder; said and not done where others could write into that.

    Entries that are not what was written are removed first, and those of which that cannot be known.
    """
    try:
        folder = private_dir(cache_dir() / "compiled")
        _remove_damaged(folder)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update(_SECONDS, 1.0)
    _write_digests(folder)


def _remove_damaged(folder: Path) -> None:
    """Leaves entries with their digests; other processes may do the same, and add to them, meanwhile."""
    damaged = 0
    for entry in folder.glob(f"*{_ENTRY}"):
        with contextlib.suppress(FileNotFoundError):
            found, digest = file_digest(entry), _beside(entry)
            listed = digest.read_bytes() if digest.exists() else None
            if listed == found.encode():
                continue
            damaged += listed is not None
            digest.unlink(missing_ok=True)  # first: an entry is not written where there is one
            entry.unlink(missing_ok=True)
    for digest in folder.glob(f"*{_ENTRY}{_DIGEST}"):
        if not digest.with_suffix("").exists():
            digest.unlink(missing_ok=True)
    if damaged:
        log.warning("compiled programs in %s were damaged (%d): compiling them again", folder, damaged)


@cache
def _write_digests(folder: Path) -> None:
    """From now on, after each compilation that is kept; not at the end of the process, which may be killed."""

    def listen(event: str, duration_secs: float, **more: Any) -> None:
        del more
        if event != "/jax/core/compile/backend_compile_duration" or duration_secs < getattr(jax.config, _SECONDS):
            return
        with contextlib.suppress(OSError, NaloraError):  # an entry without a digest is compiled again the next time
            for entry in folder.glob(f"*{_ENTRY}"):
                if not _beside(entry).exists():
                    write_atomically(_beside(entry), file_digest(entry))

    jax.monitoring.register_event_duration_secs_listener(listen)


def _beside(entry: Path) -> Path:
    return entry.with_name(entry.name + _DIGEST)


def compile_ahead(step: Step, params: Any, state: TrainState, batch: Batch) -> Any:
    """Compiles ``step`` for arguments of these shapes before its first call.

    The first call would allocate its buffers on top of the compiler's memory, which the platform may
    return to the system here. A second call with these shapes does not compile again.

    Returns:
      The ``jax.stages.Compiled``; None if the step is not jitted.
    """
    if not hasattr(step, "lower"):
        return None
    compiled = step.lower(params, state, batch).compile()  # the call of the step finds this program
    (device, *_) = jax.tree.leaves(batch)[0].devices()
    hooks_of(Platform(platform_name(device))).after_compilation()
    return compiled
