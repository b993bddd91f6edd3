"""Builds the mechanisms of a run from its settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from nalora_jax.config import MaskConfig, StepScaleConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mechanism import MECHANISMS, Mechanism
from nalora_jax.method.rules import CurvatureCap, HardMask, HomogeneityStep, SoftMask
from nalora_jax.method.state import Mechanisms


def make_mechanisms(
    mask: MaskConfig | None = None,
    step_scale: StepScaleConfig | None = None,
    names: tuple[str, ...] = (),
    *,
    activation: str,
    total_steps: int = 0,
    seed: int = 0,
) -> Mechanisms:
    """Returns the mechanisms of a run.

    Args:
      mask: mechanism 1; None is the default.
      step_scale: mechanism 2; None is the default.
      names: further mechanisms (`make`).
      activation: activation function of the gates.
      total_steps: steps of the run, for rules that depend on its progress.
      seed: seed of the run, for rules that draw random numbers.

    Raises:
      NaloraError: an unknown name, setting or factor location.
    """
    entries: dict[str, Mechanism | None] = {
        "mask": _mask(mask or MaskConfig()),
        "step_scale": _step_scale(step_scale or StepScaleConfig()),
    }
    for text in names:
        mechanism = make(text)
        label, number = mechanism.name, 2
        while label in entries:
            label, number = f"{mechanism.name}_{number}", number + 1
        entries[label] = mechanism
    active = tuple((label, m) for label, m in entries.items() if m is not None)
    return Mechanisms(active, activation, total_steps=total_steps, seed=seed)


def mechanism_names() -> list[str]:
    """Returns the names of all mechanisms."""
    return MECHANISMS.names()


def make(text: str) -> Mechanism:
    """Returns the mechanism of a text such as ``"soft"`` or ``"soft:power=2,high=3"``.

    Tuples are written with slashes: ``"homogeneity:gains=0.5/0.75/1/1"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of the wrong type or out of range.
    """
    name, _, options = text.partition(":")
    kind = MECHANISMS.get(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            raise NaloraError(
                f"--mechanisms {text}",
                expected=f"NAME:setting=value, with a setting of {', '.join(fields)}",
                found=option,
            )
        settings[key] = _typed(text, key, value, fields[key].default)
    return kind(**settings)


def _typed(text: str, key: str, value: str, default: Any) -> Any:
    """Returns ``value`` with the type of the setting's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(type(default[0])(part) for part in value.split("/"))
        return type(default)(value)
    except (KeyError, ValueError):
        expected = f"{key} of type {type(default).__name__}"
        raise NaloraError(f"--mechanisms {text}", expected=expected, found=repr(value)) from None


def _mask(config: MaskConfig) -> Mechanism | None:
    """Returns mechanism 1; None if it is off."""
    names = ("decay", "warmup", "frozen_after", "permute", "mask_gradient")
    common: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.kind == "off":
        return None
    if config.kind == "hard":
        return HardMask(keep=config.keep, **common)
    return SoftMask(power=config.power, low=config.low, high=config.high, **common)


def _step_scale(config: StepScaleConfig) -> Mechanism | None:
    """Returns mechanism 2; None if it is off."""
    names = ("decay", "warmup", "frozen_after", "permute")
    common: dict[str, Any] = {name: getattr(config, name) for name in names}
    match config.kind:
        case "off":
            return None
        case "curvature":
            return CurvatureCap(tau=config.tau, **common)
        case "homogeneity":
            return HomogeneityStep(gains=config.gains, min_occupancy=config.min_occupancy, **common)
