"""The families that transformers has, too."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nalora_jax.models.families import BUILT_IN, supported

# Families that transformers has, too: it reads a Kimi-K2 as a DeepSeek-V3.
COMPARED = [family for family in supported() if family in CONFIG_MAPPING]


def model_class(family: str) -> Any:
    """Returns transformers' class of causal models of a family."""
    return getattr(transformers, BUILT_IN[family].class_name)
