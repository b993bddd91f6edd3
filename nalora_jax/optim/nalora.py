"""The optimizer: clipping, an inner optimizer with its schedule, and the mechanisms on the gates' updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from nalora_jax import trees
from nalora_jax.config import OptimizerConfig
from nalora_jax.errors import NaloraError
from nalora_jax.optim.columns import find_gates, scale_by_channel
from nalora_jax.optim.gate_state import (
    GateState,
    Mechanisms,
    channel_factors,
    gate_shapes,
    init_gate_state,
    make_mechanisms,
    mask_collection,
    update_gate_state,
)
from nalora_jax.optim.projection_rates import scale_by_projection

__all__ = [
    "GateState",
    "Mechanisms",
    "channel_factors",
    "find_gates",
    "gate_shapes",
    "init_gate_state",
    "make_mechanisms",
    "make_optimizer",
    "make_schedule",
    "mask_collection",
    "nalora",
    "scale_by_channel",
    "update_gate_state",
]


def nalora(
    inner: optax.GradientTransformation | OptimizerConfig,
    gates: Mapping[str, str],
    mechanisms: Mechanisms,
    *,
    total_steps: int | None = None,
    plus_ratio: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates of the gates' B pass through the mechanisms.

        [factors on gradients] -> inner (clip, preconditioner, weight decay, learning rate) -> [factors on updates]

    Args:
      inner: any optax optimizer, or the settings of one (then ``total_steps`` is needed, as by `make_optimizer`).
      gates: block of each adapted gate (`find_gates`), e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}``.
      mechanisms: those of the run (`make_mechanisms`). A place where none acts leaves no trace in the chain: without
        any mechanism the updates are those of ``inner`` to the bit.
      plus_ratio: LoRA+ ratio of an ``inner`` given by its settings.

    Returns:
      A transform whose ``update`` takes ``gate_factors`` (`channel_factors`) and ignores other keyword arguments.

    Example:
      >>> optimizer = nalora(optax.adamw(1e-3), find_gates(lora), mechanisms)
      >>> state = optimizer.init(lora)
      >>> updates, state = optimizer.update(grads, state, lora, gate_factors=channel_factors(gate_state, mechanisms))
    """
    if isinstance(inner, OptimizerConfig):
        if total_steps is None:
            raise NaloraError("nalora(total_steps=)", expected="the number of optimizer steps", found=None)
        inner = make_optimizer(inner, total_steps, plus_ratio)
    before, after = (
        [scale_by_channel(gates, place)] if place in mechanisms.places else [] for place in ("gradient_b", "update_b")
    )
    chain = optax.chain(*before, inner, *after) if before or after else inner
    return optax.with_extra_args_support(chain)


def make_optimizer(
    config: OptimizerConfig, total_steps: int, plus_ratio: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """The plain optimizer of LoRA: clip by global norm, then the named optimizer with its schedule.

    Args:
      total_steps: optimizer steps of the run, which the schedule spans.
      plus_ratio: LoRA+ (arXiv 2402.12354): factor on the learning rate of every leaf named "b".

    Raises:
      NaloraError: an unknown optimizer, or weight decay with one that has none.
    """
    stages = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    stages.append(_named_optimizer(config, make_schedule(config, total_steps)))
    if plus_ratio != 1:
        # After learning rate and weight decay, so that B trains as with its own, larger learning rate.
        stages.append(_scale_leaves("b", plus_ratio))
    if config.rates:
        stages.append(scale_by_projection(config.rates))
    return optax.with_extra_args_support(optax.chain(*stages))


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up to the peak, then constant or a decay to ``final_ratio`` of it.

    Warm-up covers ``warmup_steps``, or ``ceil(warmup_share * total_steps)`` steps. It begins above 0, so that no step
    is wasted; with ``warmup_from_zero`` and a final ratio of 0 the rates equal transformers'.
    """
    if not config.learning_rate:
        remedy = "nalora_jax.optim.learning_rate decides it"
        raise NaloraError("--optimizer.learning-rate", expected="a number above 0", found="auto", remedy=remedy)
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup = config.warmup_steps or math.ceil(config.warmup_share * total_steps)
    warmup = warmup if config.warmup_from_zero else min(warmup, total_steps - 1)
    decay_steps = max(1, total_steps - warmup)
    decays: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_ratio),
    }
    if config.schedule not in decays:
        raise NaloraError("--optimizer.schedule", expected=f"one of {', '.join(decays)}", found=config.schedule)
    if warmup <= 0:
        return decays[config.schedule]
    start = 0.0 if config.warmup_from_zero else peak / (warmup + 1)
    rise = optax.linear_schedule(start, peak, warmup)
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def _named_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay
    match config.name:
        case "adamw":
            return optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=decay)
        case "adam" if decay == 0:
            return optax.adam(schedule, config.b1, config.b2, config.eps)
        case "adam":
            raise NaloraError("--optimizer.weight-decay", expected="0 with adam", found=decay, remedy="use adamw")
        case "lion":
            return optax.lion(schedule, config.b1, config.b2, weight_decay=decay)
        case "sgd":
            return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule))
        case "adafactor":
            # Not optax.adafactor, whose step follows the parameter's size (B starts at 0) and whose decay ignores the
            # learning rate.
            factored = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
            return optax.chain(*factored, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(schedule))
    known = "adamw, adam, sgd, lion, adafactor"
    raise NaloraError("--optimizer.name", expected=f"one of {known}", found=config.name)


def _scale_leaves(name: str, factor: float) -> optax.GradientTransformation:
    def scale(path: str, update: jax.Array) -> jax.Array:
        return update * factor if path.split("/")[-1] == name else update

    def update_fn(updates: Any, params: Any = None) -> Any:
        del params
        return trees.map_named(scale, updates)

    return optax.stateless(update_fn)
