"""Settings of the methods that benchmarks compare by name, equal in every benchmark."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nalora_jax.config import RunConfig

METHODS = ("lora", "nalora", "default")


def with_method(config: RunConfig, method: str, *, warmup: int | None = 0) -> RunConfig:
    """Returns ``config`` with one of `METHODS`.

    The methods are plain LoRA, mask and step scale by homogeneity, and the library's default.
    ``warmup`` is the number of steps before the mechanisms act: 0 for timed steps, which are few;
    None for the library's default.
    """
    rules = {"lora": (), "nalora": ("soft:power=2", "homogeneity"), "default": type(config).mechanisms}[
        method
    ]
    if warmup is not None:
        rules = tuple(f"{rule}{',' if ':' in rule else ':'}warmup={warmup}" for rule in rules)
    return dataclasses.replace(config, mechanisms=rules)
