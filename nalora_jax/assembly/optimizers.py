"""Builds the optimizer of plain LoRA from its settings: schedule, LoRA+ and rates by projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nalora_jax.common import trees
from nalora_jax.common.trees import first_match, match_rules
from nalora_jax.config import LoRAConfig, OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import adapter_scale

_OF_CONFIG = ("b1", "b2", "weight_decay", "clip_norm")
# Numbers that may differ between runs of a program; "rate_of_step" is the schedule as a table.
NUMBERS = ("rate_of_step", "plus_ratio", *_OF_CONFIG)


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    plus_ratio: float = 1.0,
    numbers: Mapping[str, Any] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of plain LoRA: clip by global norm, then the named optimizer.

    Args:
      config: the optimizer and its schedule.
      total_steps: optimizer steps of the run, which the schedule spans.
      plus_ratio: LoRA+ (arXiv 2402.12354): factor on the learning rate of every leaf named "b".
      numbers: traced values of `NUMBERS`, as a sweep has one for each of its runs. They replace
        the values of ``config`` and ``plus_ratio``; which stages the optimizer has is decided by
        ``config`` and ``plus_ratio``, whose values are known when the program is compiled.

    Raises:
      NaloraError: an unknown optimizer, or weight decay with one that has none.
    """
    traced = {name: value for name, value in numbers.items() if name in _OF_CONFIG}
    values = replace(config, **traced)
    schedule = make_schedule(config, total_steps)  # checks the settings of the schedule
    if "rate_of_step" in numbers:
        # The schedules of a sweep's runs were computed before, as tables of rates.
        schedule = partial(_rate_of_step, numbers["rate_of_step"])
    stages = []
    if config.clip_norm > 0:
        stages = [optax.clip_by_global_norm(values.clip_norm)]
    stages.append(_named_optimizer(config.name, values, schedule))
    if plus_ratio != 1:
        ratio = numbers.get("plus_ratio", plus_ratio)
        # After learning rate and weight decay: equivalent to a larger learning rate of B.

        def factor(path: str) -> Any:
            """Returns the factor on the rate of one leaf."""
            if path.split("/")[-1] == "b":
                return ratio
            return 1.0

        stages.append(_scale_leaves(factor))
    if config.rates:
        stages.append(scale_by_projection(config.rates))
    return optax.with_extra_args_support(optax.chain(*stages))


def _rate_of_step(rates: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, of ``rates [steps]``; later steps have the last rate."""
    return jnp.take(rates, step, mode="clip")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up to the peak, then constant or a decay to
    ``final_ratio`` of it.

    Warm-up covers ``warmup_steps``, or ``ceil(warmup_share * total_steps)`` steps. It starts above
    0, so that the first step has an effect; with ``warmup_from_zero`` and a final ratio of 0 the
    rates are equal to transformers' rates.
    """
    if not config.learning_rate:
        remedy = "set a rate: only a training run has an automatic one"
        raise NaloraError(
            "--optimizer.learning-rate",
            expected="a number above 0",
            found="auto",
            remedy=remedy,
        )
    peak = config.learning_rate
    final = config.learning_rate * config.final_ratio
    warmup = config.warmup_steps or math.ceil(config.warmup_share * total_steps)
    if not config.warmup_from_zero:
        warmup = min(warmup, total_steps - 1)
    decay_steps = max(1, total_steps - warmup)
    decays: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "cosine": optax.cosine_decay_schedule(
            peak, decay_steps, alpha=config.final_ratio
        ),
    }
    if config.schedule not in decays:
        expected = f"one of {', '.join(decays)}"
        raise NaloraError(
            "--optimizer.schedule", expected=expected, found=config.schedule
        )
    if warmup <= 0:
        return decays[config.schedule]
    start = peak / (warmup + 1)
    if config.warmup_from_zero:
        start = 0.0
    rise = optax.linear_schedule(start, peak, warmup)
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def _named_optimizer(
    name: str, config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer called ``name``, learning rate and weight decay included.

    Raises:
      NaloraError: an unknown name, or a weight decay with "adam".
    """
    decay = config.weight_decay
    match name:
        case "adamw":
            return optax.adamw(
                schedule,
                config.b1,
                config.b2,
                config.eps,
                mu_dtype=config.first_moment,
                weight_decay=decay,
            )
        case "adam" if decay == 0:
            return optax.adam(
                schedule, config.b1, config.b2, config.eps, mu_dtype=config.first_moment
            )
        case "adam":
            raise NaloraError(
                "--optimizer.weight-decay",
                expected="0 with adam",
                found=decay,
                remedy="use adamw",
            )
        case "lion":
            return optax.lion(schedule, config.b1, config.b2, weight_decay=decay)
        case "sgd":
            return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule))
        case "adafactor":
            # Not optax.adafactor: its step is proportional to the parameter's size (B starts at
            # 0), and its weight decay ignores the learning rate.
            # Updates are clipped to a root mean square of 1, Adafactor's default.
            factored = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
            return optax.chain(
                *factored,
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(schedule),
            )
    names = "adamw, adam, sgd, lion, adafactor"
    raise NaloraError("--optimizer.name", expected=f"one of {names}", found=name)


def _scale_leaves(factor: Callable[[str], Any]) -> optax.GradientTransformation:
    """Returns a transform that multiplies each update by the factor of its path.

    It comes after preconditioner, learning rate and weight decay, so that a factor is a ratio of
    learning rates. Before Adam, which divides by the gradient's size, it would have almost no
    effect.
    """

    def update_fn(updates: Any, params: Any = None) -> Any:
        return trees.map_named(lambda path, update: update * factor(path), updates)

    return optax.stateless(update_fn)


def scale_by_projection(
    rates: Sequence[tuple[str, float]],
) -> optax.GradientTransformation:
    """Returns a transform that multiplies the updates of A and B by the factor of the first
    matching rule.

    Args:
      rates: (regular expression, factor) pairs, searched in stacked paths such as
        ``layers/ffn/gate_proj``.

    Raises:
      NaloraError: in ``init``, if a pattern matches no adapter or is not a regular expression.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        """Checks the rules; the transform has no state."""
        projections = {path.rpartition("/")[0] for path in trees.flatten(params)}
        match_rules(rates, projections, where="--optimizer.rates")
        return optax.EmptyState()

    def factor(path: str) -> float:
        """Returns the factor of the first rule that matches a leaf's projection; 1 without one."""
        match = first_match(rates, path.rpartition("/")[0])
        return 1.0 if match is None else match[1]

    return optax.GradientTransformation(init_fn, _scale_leaves(factor).update)


# Best rate of plain LoRA on SmolLM2-135M in each of studies/stability (rank 2),
# studies/full_ffn_table (rank 8) and studies/gate_only_small_rank, from grids of factor 2.
# Wider models: inversely proportional to the width, close to a public sweep (docs/method.md); not
# measured here.
_TUNED = 4e-3
_WIDTH = 576
# Largest alpha with this rate. Above it the best rate falls with this power of alpha, at any rank
# (studies/rate_by_rank, ranks 2 to 64).
_ALPHA = 16
_POWER = 1 / 2
# Gradient-subspace initialization has half of that from this alpha on
# (studies/rate_by_rank_gradient, rank 64; at rank 16 its fixed criterion holds for one of two
# tasks).
_GRADIENT_ALPHA = 128
_GRADIENT = 1 / 2
# Image and text encoders: best rate of plain LoRA in each task of studies/few_shot_seeds.
_ENCODERS = 1e-3
# Factors on these rates. Non-zero initializations of A and B, with lowered kernels: best rates
# 5e-4 and 1e-3 in studies/full_ffn_table, compared with 4e-3 of plain LoRA.
_STARTS = {"lora_ga": 1 / 8, "pissa": 1 / 4}
_ADALORA = 4  # best rate 1.6e-2 in studies/full_ffn_table
_ADAPTIVE = ("adamw", "adam", "adafactor")


def resolve_learning_rate(
    config: RunConfig, width: int = 0, of_kind: float = 1.0
) -> RunConfig:
    """Returns ``config`` with a concrete learning rate in place of 0, the automatic choice.

    The rate is 4e-3 up to a width of 576, as the studies found, and ``4e-3 * 576 / width`` for
    wider models, times ``sqrt(16 / alpha)`` if the largest alpha of the rules is above 16 (not with
    AdaLoRA), and half of that for gradient-subspace initialization with an alpha of 128 or more;
    1e-3 for image and text encoders. It is divided by 8 for LoRA-GA and by 4 for PiSSA, multiplied
    by 4 for AdaLoRA and by the factor of the run's kind (1/8 for preference losses and rewards),
    and divided by the square root of LoRA+'s ratio, which keeps the product of A's and B's rates.

    Args:
      config: the run's settings.
      width: width of the decoder's hidden states; 0 for image and text encoders.
      of_kind: the factor of the run's kind, `nalora_jax.kinds.record.Kind.rate`.

    Raises:
      NaloraError: the optimizer, or a run with ``--tune``, has no automatic rate.
    """
    settings = config.optimizer
    if settings.learning_rate:
        return config
    if config.tune:
        raise NaloraError(
            "--optimizer.learning-rate",
            expected="a learning rate with --tune",
            found="auto",
            remedy="name it; all weights take a tenth of an adapter's rate or less (1e-4)",
        )
    if settings.name not in _ADAPTIVE:
        expected = f"a learning rate with {settings.name}"
        raise NaloraError(
            "--optimizer.learning-rate",
            expected=expected,
            found="auto",
            remedy="name it",
        )
    rate = _ENCODERS
    if width:
        rate = _TUNED * min(1.0, _WIDTH / width)
        if not config.adalora.target_rank:
            rate *= _by_alpha(config.lora)
    rate *= _STARTS.get(config.lora.init, 1) / math.sqrt(config.lora.plus_ratio)
    rate *= of_kind
    if config.adalora.target_rank:
        rate *= _ADALORA
    # Two digits, so that the log shows the exact rate.
    rate = float(f"{rate:.2g}")
    return replace(config, optimizer=replace(settings, learning_rate=rate))


def _by_alpha(lora: LoRAConfig) -> float:
    """Returns the factor of the automatic rate by the largest alpha of the rules, at most 1.

    With rsLoRA, alpha is the value that gives the same scale without it: the scale times the rank.
    """
    alphas = [
        rule.rank
        * adapter_scale(
            # Default alpha: twice the rank.
            2 * rule.rank if rule.alpha is None else rule.alpha,
            rule.rank,
            rslora=lora.rslora,
        )
        for rule in lora.rules
    ]
    alpha = max(_ALPHA, *alphas)
    factor: float = (_ALPHA / alpha) ** _POWER
    if lora.init == "gradient" and alpha >= _GRADIENT_ALPHA:
        factor *= _GRADIENT
    return factor
