"""Builds the mechanisms of a run from its settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from nalora_jax.config import RunConfig
from nalora_jax.method.transform import Mechanisms, make_mechanisms

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
