"""Settings of preference tuning: what a pair of answers is, and how the loss weighs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented
from nalora_jax.errors import NaloraError


@documented
@dataclass(frozen=True)
class PreferenceConfig:
    """Preference tuning on pairs of a chosen and a rejected answer; the reference is the base without the adapter."""

    # "none" (the data set's answers are learned) or "dpo" (direct preference optimisation, arXiv 2305.18290).
    loss: Literal["none", "dpo"] = "none"
    # Beta: how much a log-ratio to the reference counts; small values let the model move further.
    beta: float = 0.1
    # Share of pairs that are taken to be labelled the wrong way round (conservative DPO).
    label_smoothing: float = 0.0
    # Log-ratios per token of their answer instead of per answer, so that long answers do not count more; beta is then
    # larger, 1 to 10 (TRL's "sigmoid_norm").
    per_token: bool = False
    # Field of a record that holds the preferred answer: a text, or chat messages.
    chosen_field: str = "chosen"
    # Field that holds the other answer.
    rejected_field: str = "rejected"


def check_preference(preference: PreferenceConfig, *, init: str, task: str) -> None:
    """Refuses settings that do not go with preference tuning.

    Args:
      preference: the settings, each number in its range.
      init: how the adapters begin.
      task: of images; empty for text.

    Raises:
      NaloraError: names the flag, what was expected and what was found.
    """
    if preference.loss == "none":
        return
    if init != "default":
        remedy = "the reference is the base with the adapter off, which these adapters change"
        raise NaloraError("--lora.init", expected="default with --preference.loss", found=init, remedy=remedy)
    if task:
        raise NaloraError("--preference.loss", expected="none for image and text encoders", found=preference.loss)
