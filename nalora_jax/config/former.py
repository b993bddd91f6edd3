"""Translates mechanism settings of earlier versions, the groups ``mask`` and ``step_scale``, to rules.

They occur in logs and checkpoints of old runs and in protocols of studies.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from nalora_jax.config.types import first_wrong, type_name

GROUPS = ("mask", "step_scale")
# Rules no longer have frozen_after: a value other than 0 is an unknown setting of the rule.
_COMMON = ("decay", "warmup", "frozen_after", "permute")
# By group and kind: the rule, and the names of its settings.
RULES: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("mask", "hard"): ("hard", ("keep", "mask_gradient", *_COMMON)),
    ("mask", "soft"): ("soft", ("power", "low", "high", "mask_gradient", *_COMMON)),
    ("step_scale", "curvature"): ("curvature_cap", ("tau", *_COMMON)),
    ("step_scale", "homogeneity"): ("homogeneity", ("gains", "min_occupancy", *_COMMON)),
}


@dataclass(frozen=True)
class FormerMask:
    """The group ``mask`` with its last defaults."""

    kind: Literal["off", "hard", "soft"] = "off"
    keep: float = 0.5
    power: float = 2.0
    low: float = 0.0
    high: float = 4.0
    decay: float = 0.95
    warmup: int = 10
    mask_gradient: bool = True
    frozen_after: int = 0
    permute: int = -1


@dataclass(frozen=True)
class FormerStepScale:
    """The group ``step_scale`` with its last defaults."""

    kind: Literal["off", "curvature", "homogeneity"] = "curvature"
    tau: float = 0.1
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    min_occupancy: float = 0.02
    decay: float = 0.95
    warmup: int = 10
    frozen_after: int = 0
    permute: int = -1


@dataclass(frozen=True)
class FormerGroups:
    """Both groups, which preceded the rules in ``mechanisms``."""

    mask: FormerMask = field(default_factory=FormerMask)
    step_scale: FormerStepScale = field(default_factory=FormerStepScale)

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the groups that are on, which are the labels of their memory in checkpoints."""
        return tuple(name for name in GROUPS if getattr(self, name).kind != "off")

    @property
    def rules(self) -> tuple[str, ...]:
        """Returns the equal rules, as in ``RunConfig.mechanisms``."""
        return tuple(_rule(name, getattr(self, name)) for name in self.labels)


def _rule(name: str, group: FormerMask | FormerStepScale) -> str:
    """Returns a rule with the settings that differ from its defaults."""
    rule, names = RULES[name, group.kind]
    defaults = {setting.name: setting.default for setting in fields(group)}
    defaults |= {"power": 1.0}  # of the rule `soft`
    settings = {setting: getattr(group, setting) for setting in names}
    changed = ",".join(f"{key}={_text(value)}" for key, value in settings.items() if value != defaults[key])
    return ":".join(filter(None, (rule, changed)))


def _text(value: Any) -> str:
    """Returns the value of a setting as `nalora_jax.common.registry.from_text` reads it."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value)


def _tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value


def groups_of(settings: Mapping[str, Any]) -> FormerGroups:
    """Returns the groups in a run's settings; absent settings have their default.

    Raises:
      TypeError: a value has another type.
      AttributeError: a group is not a mapping.
    """
    groups: dict[str, Any] = {}
    for group, kind in {"mask": FormerMask, "step_scale": FormerStepScale}.items():
        names = {setting.name for setting in fields(kind)}
        values = {name: _tuple(value) for name, value in settings.get(group, {}).items() if name in names}
        groups[group] = kind(**values)
    former = FormerGroups(**groups)
    if (wrong := first_wrong(former)) is not None:
        raise TypeError(f"{wrong.field} = {reprlib.repr(wrong.value)}, which is no {type_name(wrong.hint)}")
    return former


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's settings with the rules of both groups in ``mechanisms``; equal without groups.

    Example:
      >>> translated({"mask": {"kind": "soft"}, "step_scale": {"kind": "off"}, "mechanisms": ["delta"]})
      {'mechanisms': ['soft:power=2.0', 'delta']}

    Raises:
      TypeError: a value of a group has another type.
      AttributeError: a group is not a mapping.
    """
    if not has_groups(settings):
        return dict(settings)
    return without_groups(settings) | {
        "mechanisms": [*groups_of(settings).rules, *settings.get("mechanisms", ())]
    }


def has_groups(settings: Mapping[str, Any]) -> bool:
    """Returns True if an earlier version wrote the settings of a run."""
    return any(name in settings for name in GROUPS)


def without_groups(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without the two groups."""
    return {name: value for name, value in settings.items() if name not in GROUPS}
