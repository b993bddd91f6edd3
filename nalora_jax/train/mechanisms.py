"""Builds the mechanisms of a run from its settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nalora_jax.config import RunConfig
from nalora_jax.config.former import groups_of, has_groups, translated
from nalora_jax.mechanism import MECHANISMS, Mechanism
from nalora_jax.method.state import Mechanisms
from nalora_jax.settings_text import from_text

log = logging.getLogger(__name__)


def make_mechanisms(
    rules: Sequence[str | Mechanism], *, activation: str, total_steps: int = 0, seed: int = 0
) -> Mechanisms:
    """Returns the mechanisms of a run.

    Args:
      rules: in the order in which their factors are multiplied: ``"NAME"`` or
        ``"NAME:setting=value,..."`` as in ``RunConfig.mechanisms``, or rules themselves.
      activation: activation function of the gates.
      total_steps: steps of the run, for rules that depend on its progress.
      seed: seed of the run, for rules that draw random numbers.

    Raises:
      NaloraError: an unknown name, setting or factor location.
    """
    mechanisms = [make(rule) for rule in rules]
    labels = _labels([(mechanism.label, mechanism.name) for mechanism in mechanisms])
    entries = tuple(zip(labels, mechanisms, strict=True))
    return Mechanisms(entries, activation, total_steps=total_steps, seed=seed)


def mechanisms_of(
    config: RunConfig, activation: str, blocks: Mapping[str, str], gates: Mapping[str, str]
) -> Mechanisms:
    """Returns the mechanisms of a run; none, with a warning, if no adapter is on a gate.

    Args:
      config: the run's settings.
      activation: of most blocks.
      blocks: activation of each measured block, by path.
      gates: see `nalora_jax.method.optimizer.find_gates`.
    """
    steps, seed = config.steps, config.seed
    mechanisms = make_mechanisms(config.mechanisms, activation=activation, total_steps=steps, seed=seed)
    if mechanisms.entries and not gates:
        labels = ", ".join(label for label, _ in mechanisms.entries)
        message = "no adapter sits on a gate (gate_proj or in_proj): no mechanism acts (%s)"
        log.warning(message, labels)
        return replace(mechanisms, entries=())
    differing = tuple((path, name) for path, name in blocks.items() if name != activation)
    return replace(mechanisms, others=differing)


def first_step(mechanisms: Mechanisms) -> int:
    """Returns the first optimizer step in which a mechanism acts, counted from 1; 0 without mechanisms."""
    return min((mechanism.warmup + 1 for _, mechanism in mechanisms.entries), default=0)


def log_first_step(mechanisms: Mechanisms, steps: int) -> None:
    """Logs the step from which mechanisms act; warns if a run of ``steps`` steps ends before."""
    first = first_step(mechanisms)
    if first > steps:
        message = "mechanisms act from step %d, and the run ends at step %d: it is plain LoRA"
        log.warning(message, first, steps)
    elif first:
        log.info("mechanisms act from step %d", first)


def make(rule: str | Mechanism) -> Mechanism:
    """Returns the mechanism of a text such as ``"soft"`` or ``"soft:power=2,high=3"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of the wrong type or out of range.
    """
    if not isinstance(rule, str):
        return rule
    mechanism: Mechanism = from_text(MECHANISMS, rule)
    return mechanism


def former_labels(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the labels in the checkpoints of an earlier version, by their label today; or {}.

    Rules of the groups ``mask`` and ``step_scale`` had the group's label, all others their name.

    Args:
      settings: recorded settings of the run.
    """
    if not has_groups(settings):
        return {}
    rules = [make(text) for text in translated(settings)["mechanisms"]]
    groups = groups_of(settings).labels
    names = [*groups, *(rule.name for rule in rules[len(groups) :])]
    now = _labels([(rule.label, rule.name) for rule in rules])
    return dict(zip(now, _labels([(name, name) for name in names]), strict=True))


def _labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """Returns distinct labels of rules, given the label and the name of each.

    A rule has its label if no earlier rule has it, else its name; repeated names are numbered,
    starting at 2.
    """
    labels: list[str] = []
    for label, name in names:
        chosen, number = name if label in ("", *labels) else label, 2
        while chosen in labels:
            chosen, number = f"{name}_{number}", number + 1
        labels.append(chosen)
    return labels
