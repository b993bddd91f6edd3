"""Compiled programs, kept from process to process."""

from __future__ import annotations

import jax

from nalora_jax.downloads import cache_dir


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
