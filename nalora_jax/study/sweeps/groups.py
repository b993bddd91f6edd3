"""Grouping: runs whose settings need different programs are trained by different programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.method.transform import make_mechanisms
from nalora_jax.models.targets import AdapterSpec, ScaledTarget
from nalora_jax.study.sweeps.values import accepts_traced, numeric_settings

T = TypeVar("T")

# Settings by dotted name that are values of a program, or that the program does not read.
_VALUES = (
    r"^(output|resume|seed|steps|epochs|callbacks)$",
    r"^optimizer\.(learning_rate|schedule|warmup_\w+|final_ratio|weight_decay|b1|b2)$",
    r"^train\.(log_every|eval_every|save_every|keep|patience)$",
    r"^mechanisms\b",  # see `_rules`
    r"^lora\.rules\b",  # see `_adapters`
    r"^(optimizer\.clip_norm|lora\.plus_ratio)$",  # see `program_key`
)


def grouped(runs: Sequence[T], key: Callable[[T], str]) -> list[list[T]]:
    """Returns the runs with equal keys together, in the order of their first run."""
    groups: dict[str, list[T]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def program_key(config: RunConfig, spec: AdapterSpec | None) -> str:
    """Returns the settings that runs of one program have in common, as text.

    Args:
      config: settings of a run, with concrete steps and sequence length.
      spec: its adapters; None if they are not known yet, so that the rules must be equal.
    """
    named = trees.flatten(config.to_dict())
    named = {path.replace("/", "."): value for path, value in named.items()}
    fixed: dict[str, Any] = {
        n: v for n, v in named.items() if not any(re.search(value, n) for value in _VALUES)
    }
    if _is_static(config):  # ranks are allocated by the step count
        fixed |= {"steps": config.steps, "clip_norm": config.optimizer.clip_norm}
    if config.optimizer.name == "adam":  # refuses weight decay
        fixed["weight_decay"] = config.optimizer.weight_decay
    stages = [config.optimizer.clip_norm > 0, config.lora.plus_ratio != 1]
    return json.dumps([fixed, stages, _adapters(config, spec), _rules(config)], sort_keys=True, default=str)


def widest(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """Returns the adapters with the largest rank of every layer; scales come from the first."""

    def target(path: str, first: Any) -> Any:
        ranks = [dict(spec.targets)[path].ranks for spec in specs]
        largest = tuple(map(max, zip(*ranks, strict=True)))
        return ScaledTarget(largest, first.alphas, first.scales(rslora=specs[0].rslora))

    first = specs[0]
    return replace(first, targets=tuple((path, target(path, each)) for path, each in first.targets))


def _is_static(config: RunConfig) -> bool:
    """Returns True if ranks cannot be padded, because AdaLoRA or Adafactor depends on them."""
    return bool(config.adalora.target_rank) or config.optimizer.name == "adafactor"


def _adapters(config: RunConfig, spec: AdapterSpec | None) -> list[Any]:
    """Returns the adapted projections, with ranks if these cannot be padded."""
    if spec is None:
        return list(config.lora.rules)
    ranks = _is_static(config)
    return [(path, target.ranks if ranks else len(target.ranks)) for path, target in spec.targets]


def _rules(config: RunConfig) -> list[Any]:
    """Returns each mechanism's label, class and settings that its rule cannot take as arrays."""
    mechanisms = make_mechanisms(config.mechanisms, activation="silu")
    described = []
    for label, mechanism in mechanisms.entries:
        facts = {"seed": config.seed, "total_steps": config.steps}
        fixed = {name: value for name, value in vars(mechanism).items() if name != "permute"}
        values = [*numeric_settings(mechanism), *facts]
        traced = {name for name in values if accepts_traced(mechanism, name, mechanisms.activation)}
        fixed = {name: value for name, value in (fixed | facts).items() if name not in traced}
        described.append((label, f"{type(mechanism).__module__}.{type(mechanism).__qualname__}", fixed))
    return described
