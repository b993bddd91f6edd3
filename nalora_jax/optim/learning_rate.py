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
_PAIRS = 8  # preference losses: by how much their rate is lower (docs/preference.md)
_ENCODERS = 1e-3  # image and text encoders: what plain LoRA chose for each task of studies/few_shot_seeds
# Starts that take part of the base out of its kernels, A and B both far from zero: by how much their rate is lower.
# What they chose in studies/full_ffn_table, where plain LoRA chose 4e-3: 5e-4 and 1e-3.
_STARTS = {"lora_ga": 8, "pissa": 4}
_ADALORA = 2  # from the same study, whose grid found no end: 4e-3 is worse than 8e-3
_ADAPTIVE = ("adamw", "adam", "adafactor")


def with_learning_rate(config: RunConfig, width: int = 0) -> RunConfig:
    """``config`` with the learning rate that it leaves to the library (0) decided.

    4e-3 up to a width of 576, as the studies chose; of wider models ``4e-3 * 576 / width``; of preference losses an
    eighth of it, of LoRA-GA too, of PiSSA a quarter, of AdaLoRA twice as much; with LoRA+ divided by the root of its
    ratio, so that the product of A's and B's rates stays. The rank does not matter to it. Of image and text encoders
    1e-3.

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
    rate /= math.sqrt(config.lora.plus_ratio) * (_PAIRS if config.preference.loss != "none" else 1)
    rate *= (_ADALORA if config.adalora.target_rank else 1) / _STARTS.get(config.lora.init, 1)
    rate = float(f"{rate:.2g}")
    return replace(config, optimizer=replace(settings, learning_rate=rate))
