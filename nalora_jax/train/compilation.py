"""Compiled programs, kept from process to process."""

from __future__ import annotations

import logging

import jax

from nalora_jax.downloads import cache_dir, private_dir

log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder; said and not done where others could write into that."""
    try:
        folder = private_dir(cache_dir() / "compiled")
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
