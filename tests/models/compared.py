"""The families that transformers has, too."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nalora_jax.models.families import BUILT_IN, supported

# Families that transformers has, too: it reads a Kimi-K2 as a DeepSeek-V3.
COMPARED = [family for family in supported() if family in CONFIG_MAPPING]
# Text models of vision-language models, which transformers has no causal model of:
# tests/models/vision/test_patch_decoder.py compares them together with their towers.
TEXT_HALVES = {name for name, family in BUILT_IN.items() if not family.class_name}
# Sections of their rotary embeddings, for a head of eight dimensions.
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def model_class(family: str) -> Any:
    """Returns transformers' class of causal models of a family."""
    return getattr(transformers, BUILT_IN[family].class_name)
