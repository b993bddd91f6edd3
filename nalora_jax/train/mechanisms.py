"""Builds the mechanisms of a run from its settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nalora_jax.config import RunConfig
from nalora_jax.config.former import groups_of, has_groups, translated
from nalora_jax.method.rules import make
from nalora_jax.method.transform import Mechanisms, labels, make_mechanisms

log = logging.getLogger(__name__)


def mechanisms_of(
    config: RunConfig, activation: str, blocks: Mapping[str, str], gates: Mapping[str, str]
) -> Mechanisms:
    """Returns the mechanisms of a run; none, with a warning, if no adapter is on a gate.

    Args:
      config: the run's settings.
      activation: of most blocks.
      blocks: activation of each measured block, by path.
      gates: see `nalora_jax.method.transform.find_gates`.
    """
    steps, seed = config.steps, config.seed
    mechanisms = make_mechanisms(config.mechanisms, activation=activation, total_steps=steps, seed=seed)
    if mechanisms.entries and not gates:
        names = ", ".join(label for label, _ in mechanisms.entries)
        message = "no adapter sits on a gate (gate_proj or in_proj): no mechanism acts (%s)"
        log.warning(message, names)
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
    now = labels([(rule.label, rule.name) for rule in rules])
    return dict(zip(now, labels([(name, name) for name in names]), strict=True))
