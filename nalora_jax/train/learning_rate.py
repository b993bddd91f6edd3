"""The automatic peak learning rate of a run."""

from __future__ import annotations

import math
from dataclasses import replace

from nalora_jax.config import LoRAConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import adapter_scale

# Best rate of plain LoRA on SmolLM2-135M in each of studies/stability (rank 2),
# studies/full_ffn_table (rank 8) and studies/gate_only_small_rank, from grids of factor 2.
# Wider models: inversely proportional to the width, close to a public sweep (docs/method.md); not
# measured here.
_TUNED, _WIDTH = 4e-3, 576
# Largest alpha with this rate. Above it the best rate falls with this power of alpha, at any rank
# (studies/rate_by_rank, ranks 2 to 64).
_ALPHA, _POWER = 16, 1 / 2
# Gradient-subspace initialization has half of that from this alpha on (studies/rate_by_rank_gradient,
# rank 64; at rank 16 its fixed criterion holds for one of two tasks).
_GRADIENT_ALPHA, _GRADIENT = 128, 1 / 2
# Image and text encoders: best rate of plain LoRA in each task of studies/few_shot_seeds.
_ENCODERS = 1e-3
# Factors on these rates. For preference losses: a guess, without evidence (docs/data.md).
_PAIRS = 1 / 8
# Rewards: as long as --rl.beta is 0 and a step has one update; docs/rl.md has the runs.
_REWARDS = 1 / 8
# Non-zero initializations of A and B, with lowered kernels: best rates 5e-4 and 1e-3 in
# studies/full_ffn_table, compared with 4e-3 of plain LoRA.
_STARTS = {"lora_ga": 1 / 8, "pissa": 1 / 4}
_ADALORA = 4  # best rate 1.6e-2 in studies/full_ffn_table
_ADAPTIVE = ("adamw", "adam", "adafactor")


def with_learning_rate(config: RunConfig, width: int = 0) -> RunConfig:
    """Returns ``config`` with a concrete learning rate in place of 0, the automatic choice.

    The rate is 4e-3 up to a width of 576, as the studies found, and ``4e-3 * 576 / width`` for
    wider models, times ``sqrt(16 / alpha)`` if the largest alpha of the rules is above 16 (not with
    AdaLoRA), and half of that for gradient-subspace initialization with an alpha of 128 or more; 1e-3
    for image and text encoders. It is divided by 8 for preference losses, rewards and
    LoRA-GA and by 4 for PiSSA, multiplied by 4 for AdaLoRA, and divided by the square root of LoRA+'s
    ratio, which keeps the product of A's and B's rates.

    Args:
      config: the run's settings.
      width: width of the decoder's hidden states; 0 for image and text encoders.

    Raises:
      NaloraError: the optimizer has no automatic rate.
    """
    settings = config.optimizer
    if settings.learning_rate:
        return config
    if settings.name not in _ADAPTIVE:
        expected = f"a learning rate with {settings.name}"
        raise NaloraError("--optimizer.learning-rate", expected=expected, found="auto", remedy="name it")
    rate = _ENCODERS
    if width:
        rate = _TUNED * min(1.0, _WIDTH / width)
        if not config.adalora.target_rank:
            rate *= _by_alpha(config.lora)
    rate *= _STARTS.get(config.lora.init, 1) / math.sqrt(config.lora.plus_ratio)
    if config.preference.loss != "none":
        rate *= _PAIRS
    if config.rl.rewards:
        rate *= _REWARDS
    if config.adalora.target_rank:
        rate *= _ADALORA
    rate = float(f"{rate:.2g}")
    return replace(config, optimizer=replace(settings, learning_rate=rate))


def _by_alpha(lora: LoRAConfig) -> float:
    """Returns the factor of the largest alpha, which is the residual's scale times the rank."""
    alphas = [
        rule.rank
        * adapter_scale(2 * rule.rank if rule.alpha is None else rule.alpha, rule.rank, rslora=lora.rslora)
        for rule in lora.rules
    ]
    alpha = max(_ALPHA, *alphas)
    factor: float = (_ALPHA / alpha) ** _POWER
    if lora.init == "gradient" and alpha >= _GRADIENT_ALPHA:
        factor *= _GRADIENT
    return factor
