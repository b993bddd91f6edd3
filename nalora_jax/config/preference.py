"""Settings of preference tuning: the fields of a pair, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented
from nalora_jax.errors import NaloraError

# Values of --lora.init that read no batches and keep the base's weights.
UNCHANGED = ("default", "zero_a")


@documented
@dataclass(frozen=True)
class PreferenceConfig:
    """Preference tuning on pairs of a chosen and a rejected response.

    The reference is the base without the adapter.
    """

    # "none" (train on the data set's responses) or "dpo" (direct preference optimization, arXiv
    # 2305.18290).
    loss: Literal["none", "dpo"] = "none"
    # Beta: weight of the log-ratio to the reference; with small values the model may move further
    # from it.
    beta: float = 0.1
    # Assumed share of pairs with swapped labels (conservative DPO).
    label_smoothing: float = 0.0
    # Divide each log-ratio by the number of tokens of its response, so that long responses do not
    # count more; beta is then larger, 1 to 10 (TRL's "sigmoid_norm").
    per_token: bool = False
    # Field of a record that holds the preferred response: a text, or chat messages.
    chosen_field: str = "chosen"
    # Field that holds the other response.
    rejected_field: str = "rejected"


def check_preference(preference: PreferenceConfig, *, init: str, task: str) -> None:
    """Raises an error for settings that are incompatible with preference tuning.

    Args:
      preference: the settings, each number in its range.
      init: initialization of the adapters.
      task: of images; empty for text.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    if preference.loss == "none":
        return
    if init not in UNCHANGED:
        remedy = "the reference is the base with the adapter off, which these adapters change"
        expected = f"{' or '.join(UNCHANGED)} with --preference.loss"
        raise NaloraError("--lora.init", expected=expected, found=init, remedy=remedy)
    if task:
        raise NaloraError(
            "--preference.loss", expected="none for image and text encoders", found=preference.loss
        )
