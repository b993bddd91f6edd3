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
    from nalora_jax.config import MaskConfig, StepScaleConfig

    if method == "lora":
        return config.without_mechanisms()
    settings = {} if warmup is None else {"warmup": warmup}
    mask, scale = {
        "nalora": (MaskConfig("soft", **settings), StepScaleConfig("homogeneity", **settings)),
        "default": (MaskConfig(**settings), StepScaleConfig(**settings)),
    }[method]
    return dataclasses.replace(config, mask=mask, step_scale=scale)
