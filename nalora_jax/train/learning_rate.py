"""The peak learning rate of a run whose settings name none."""

from __future__ import annotations

import math
from dataclasses import replace

from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError

# What plain LoRA chose on SmolLM2-135M in each of studies/stability (rank 2), studies/full_ffn_table (rank 8) and
# studies/gate_only_small_rank, of grids that double.
# Wider models: in inverse proportion, which lies near a public sweep of others (docs/method.md); not measured here.
_TUNED, _WIDTH = 4e-3, 576
_ENCODERS = 1e-3  # image and text encoders: what plain LoRA chose for each task of studies/few_shot_seeds
# What this is multiplied by. For preference losses (docs/preference.md):
_PAIRS = 1 / 8
# Starts that take part of the base out of its kernels, A and B both far from zero: studies/full_ffn_table chose 5e-4
# and 1e-3 for them, where plain LoRA chose 4e-3.
_STARTS = {"lora_ga": 1 / 8, "pissa": 1 / 4}
_ADALORA = 4  # the same study chose 1.6e-2
_ADAPTIVE = ("adamw", "adam", "adafactor")


def with_learning_rate(config: RunConfig, width: int = 0) -> RunConfig:
    """``config`` with the learning rate that it leaves to the library (0) decided.

    4e-3 up to a width of 576, as the studies chose; of wider models ``4e-3 * 576 / width``; of preference losses an
    eighth of it, of LoRA-GA too, of PiSSA a quarter, of AdaLoRA four times as much; with LoRA+ divided by the root of
    its ratio, so that the product of A's and B's rates stays. The rank does not matter to it. Of image and text
    encoders 1e-3.

    Args:
      config: of the run.
      width: of the decoder's hidden states; 0 for image and text encoders.

    Raises:
      NaloraError: there is none for the optimizer.
    """
    settings = config.optimizer
    if settings.learning_rate:
        return config
    if settings.name not in _ADAPTIVE:
        expected = f"a learning rate with {settings.name}"
        raise NaloraError("--optimizer.learning-rate", expected=expected, found="auto", remedy="name it")
    rate = _TUNED * min(1.0, _WIDTH / width) if width else _ENCODERS
    rate *= _STARTS.get(config.lora.init, 1) / math.sqrt(config.lora.plus_ratio)
    if config.preference.loss != "none":
        rate *= _PAIRS
    if config.adalora.target_rank:
        rate *= _ADALORA
    rate = float(f"{rate:.2g}")
    return replace(config, optimizer=replace(settings, learning_rate=rate))
