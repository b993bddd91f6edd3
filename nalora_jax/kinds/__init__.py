"""Kinds of runs: one record and one file each (`nalora_jax.kinds.record`)."""

from __future__ import annotations

from nalora_jax.models import families  # noqa: F401  (enters the families that can be trained)
from nalora_jax.weights import gguf  # noqa: F401  (enters the files that a base can be)
