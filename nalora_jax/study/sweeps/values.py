"""Runs that share a program, and the values in which they differ, as arrays ``[runs, ...]`` that
the step reads.

Runs whose settings need different programs are trained by different programs. A setting that is
equal in all runs of a program stays a constant of it, as in a solo run.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.assembly.optimizers import NUMBERS, make_schedule, resolve_learning_rate
from nalora_jax.assembly.program import Assembly
from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.method import statistics
from nalora_jax.method.rules import Mechanism
from nalora_jax.method.transform import Mechanisms, make_mechanisms, own_factors
from nalora_jax.models.targets import AdapterSpec, TargetSpec

T = TypeVar("T")

# Settings by dotted name that are values of a program, or that the program does not read.
_VALUES = re.compile(
    r"^((output|resume|seed|steps|epochs|callbacks)$"
    r"|optimizer\.(learning_rate|schedule|warmup_\w+|final_ratio|weight_decay|b1|b2)$"
    r"|train\.(log_every|eval_every|save_every|keep|patience)$"
    r"|mechanisms\b|lora\.rules\b"  # see `_rules` and `_adapters`
    r"|(optimizer\.clip_norm|lora\.plus_ratio)$)"  # see `program_key`
)
# By kind, then by name: arrays [runs, ...].
RunValues = dict[str, dict[Any, Any]]


# ---------------------------------------------------------------- runs of one program


def group_by_key(runs: Sequence[T], key: Callable[[T], str]) -> list[list[T]]:
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
    fixed: dict[str, Any] = {}
    for path, value in trees.flatten(config.to_dict()).items():
        name = path.replace("/", ".")
        if not _VALUES.search(name):
            fixed[name] = value
    if _is_static(config):  # ranks are allocated by the step count
        fixed |= {"steps": config.steps, "clip_norm": config.optimizer.clip_norm}
    if config.optimizer.name == "adam":  # refuses weight decay
        fixed["weight_decay"] = config.optimizer.weight_decay
    stages = [config.optimizer.clip_norm > 0, config.lora.plus_ratio != 1]
    return json.dumps(
        [fixed, stages, _adapters(config, spec), _rules(config)],
        sort_keys=True,
        default=str,
    )


def widest(specs: Sequence[AdapterSpec]) -> AdapterSpec:
    """Returns the adapters with the largest rank of every layer; scales come from the first."""
    first = specs[0]
    targets = []
    for path, target in first.targets:
        ranks = [dict(spec.targets)[path].ranks for spec in specs]  # by run, then layer
        largest = tuple(map(max, zip(*ranks, strict=True)))
        scales = target.scales(rslora=first.rslora)
        targets.append((path, TargetSpec(largest, target.alphas, scales)))
    return replace(first, targets=tuple(targets))


def _is_static(config: RunConfig) -> bool:
    """Returns True if ranks cannot be padded, because AdaLoRA or Adafactor depends on them."""
    return bool(config.adalora.target_rank) or config.optimizer.name == "adafactor"


def _adapters(config: RunConfig, spec: AdapterSpec | None) -> list[Any]:
    """Returns the adapted projections of a run, in which runs of one program agree.

    Each has its number of layers or, if ranks cannot be padded, the rank of each layer. Without
    ``spec`` it returns the rules, by which the projections will be adapted.
    """
    if spec is None:
        return list(config.lora.rules)
    if _is_static(config):
        return [(path, target.ranks) for path, target in spec.targets]
    return [(path, len(target.ranks)) for path, target in spec.targets]


def _rules(config: RunConfig) -> list[Any]:
    """Returns the label and class of each mechanism, and its settings that runs must share.

    Runs may differ in settings that the mechanism's rule takes as arrays.
    """
    mechanisms = make_mechanisms(config.mechanisms, activation="silu")
    described = []
    for label, mechanism in mechanisms.entries:
        facts = {"seed": config.seed, "total_steps": config.steps}
        fixed = vars(mechanism) | facts
        fixed.pop("permute", None)  # see `_orders`
        for name in [*numeric_settings(mechanism), *facts]:
            if accepts_traced(mechanism, name, mechanisms.activation):
                fixed.pop(name, None)
        kind = type(mechanism)
        described.append((label, f"{kind.__module__}.{kind.__qualname__}", fixed))
    return described


# ---------------------------------------------------------------- values


def values_of(runs: Sequence[Assembly], width: int) -> RunValues:
    """Returns the values of runs that share a program (`program_key`).

    Args:
      runs: assemblies, in the order of the axis ``[runs]``.
      width: of the model, for automatic learning rates; 0 for image and text encoders.

    Returns:
      ``numbers`` of the optimizer, ``scales`` of the adapters by path, ``settings`` of the
      mechanisms by (label, field), ``orders`` of permuted channels by (label, path), and ``facts``:
      seed and total steps.
    """
    configs = [resolve_learning_rate(run.config, width) for run in runs]
    numbers = []
    for config in configs:
        of_run = {"plus_ratio": config.lora.plus_ratio}
        for name in NUMBERS:
            if hasattr(config.optimizer, name):
                of_run[name] = getattr(config.optimizer, name)
        numbers.append(of_run)
    settings = []
    scales = []
    facts = []
    for run in runs:
        mechanisms = run.mechanisms
        paths = [path for path, _ in run.spec.targets]
        scales.append({path: run.spec.scales(path) for path in paths})
        settings.append(_settings(mechanisms))
        facts.append({"seed": mechanisms.seed, "total_steps": mechanisms.total_steps})
    return {
        "numbers": _differing(numbers) | _rates(configs),
        "scales": _differing(scales),
        "settings": _differing(settings),
        "orders": _orders(runs),
        "facts": _differing(facts),
    }


def _settings(mechanisms: Mechanisms) -> dict[tuple[str, str], Any]:
    """Returns the numeric settings of all mechanisms by (label, field)."""
    settings = {}
    for label, mechanism in mechanisms.entries:
        for name in numeric_settings(mechanism):
            settings[label, name] = getattr(mechanism, name)
    return settings


def mechanisms_with(
    mechanisms: Mechanisms, values: Mapping[str, Mapping[Any, Any]]
) -> Mechanisms:
    """Returns mechanisms with one run's values in place of their settings.

    ``values`` are of `values_of`, without the axis ``[runs]``.
    """
    settings = values["settings"]
    entries = tuple(
        (label, _with_settings(label, m, settings)) for label, m in mechanisms.entries
    )
    facts: dict[str, Any] = dict(values["facts"])
    return replace(mechanisms, entries=entries, orders=values["orders"], **facts)


def spec_with(spec: AdapterSpec, scales: Mapping[str, Any]) -> AdapterSpec:
    """Returns adapters with one run's scales by path."""
    targets = dict(spec.targets)
    scaled = {
        path: TargetSpec(targets[path].ranks, targets[path].alphas, scales[path])
        for path in scales
    }
    return replace(spec, targets=tuple((targets | scaled).items()))


def accepts_traced(mechanism: Mechanism, name: str, activation: str) -> bool:
    """Returns True if a rule can be traced with an array in place of its setting ``name``.

    ``name`` may also be a fact of `nalora_jax.method.rules.Context`: seed or total_steps.
    """
    context = Mechanisms((("", mechanism),), activation).context(
        jnp.zeros((), jnp.int32), "layers/ffn"
    )
    memory = jax.eval_shape(partial(mechanism.init, (2, 8)))  # 2 layers of 8 channels
    counts = {statistics.get_statistic(key).count for key in mechanism.statistics}
    sums = memory | {key: jax.ShapeDtypeStruct((2,), "float32") for key in counts}

    def rule(value: Any, memory: Any, sums: Any, updates: Any) -> Any:
        """Applies the rule with ``value`` in place of the setting or fact."""
        traced = mechanism
        traced_context = context
        if name in context._fields:
            traced_context = context._replace(**{name: value})
        else:
            traced = _with_settings("", mechanism, {("", name): value})
        factor = traced.factor(memory, traced_context)
        return factor, traced.advance(memory, sums, updates)

    try:
        value = jax.tree.map(jnp.asarray, getattr(mechanism, name, 0))
        jax.eval_shape(rule, value, memory, sums, jax.ShapeDtypeStruct((2,), "int32"))
    except (TypeError, ValueError, KeyError, AttributeError):
        return False  # a TypeError if the rule makes the array a concrete value
    return True


def numeric_settings(mechanism: Mechanism) -> list[str]:
    """Returns the names of the settings that may be traced: numbers and tuples of numbers.

    A tuple may be empty, and None counts as an empty one. `permute` is no quantity but the seed of
    an order that is drawn before the program is compiled.
    """
    names = []
    for field in fields(mechanism):
        numbers = jax.tree.leaves(getattr(mechanism, field.name))
        if field.name == "permute":
            continue
        if all(type(number) in (int, float) for number in numbers):
            names.append(field.name)
    return names


def _with_settings(
    label: str, mechanism: Mechanism, settings: Mapping[tuple[str, str], Any]
) -> Mechanism:
    """Returns a copy with traced settings, whose ranges the runs have checked already."""
    traced = copy.copy(mechanism)
    for (owner, name), value in settings.items():
        if owner == label:
            object.__setattr__(traced, name, value)
    return traced


def _differing(runs: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Returns stacked values of the names whose values differ between runs."""
    differing = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if any(not np.array_equal(value, first) for value in values):
            differing[name] = _stack(values)
    return differing


def _stack(values: Sequence[Any]) -> Any:
    """Returns the values of all runs as one array ``[runs, ...]``, int32 or float32.

    Tuples give a tuple of arrays.
    """
    if isinstance(values[0], tuple):
        return tuple(_stack(fields) for fields in zip(*values, strict=True))
    array = np.stack([np.asarray(value) for value in values])
    if array.dtype.kind in "iu":
        return array.astype(np.int32)
    return array.astype(np.float32)


def _rates(configs: Sequence[RunConfig]) -> dict[str, np.ndarray]:
    """Returns ``rate_of_step``, the learning rates ``[runs, steps]``, if the schedules differ.

    It is empty if all runs have the same schedule.
    """
    steps = jnp.arange(max(config.steps for config in configs))
    schedules = [make_schedule(config.optimizer, config.steps) for config in configs]
    rates = np.stack(
        [np.broadcast_to(schedule(steps), steps.shape) for schedule in schedules]
    )
    if np.all(rates == rates[0]):
        return {}
    return {"rate_of_step": rates.astype(np.float32)}


def _orders(runs: Sequence[Assembly]) -> dict[tuple[str, str], np.ndarray]:
    """Returns the channel orders of permutation controls that differ between runs.

    Returns:
      int ``[runs, ..., d_ff]`` by (label of the mechanism, path of its factors).
    """
    orders = {}
    first = runs[0]
    if first.state.gate is None:
        return {}
    factors = jax.eval_shape(
        partial(own_factors, mechanisms=first.mechanisms), first.state.gate
    )
    for index, (label, _) in enumerate(first.mechanisms.entries):
        controls = [
            (run.mechanisms.entries[index][1], run.mechanisms.seed) for run in runs
        ]
        drawn = {(control.permute, seed) for control, seed in controls}
        # the same order in all runs, or no permutation (below 0) in any
        if len(drawn) == 1 or all(permute < 0 for permute, _ in drawn):
            continue
        for path, factor in factors[label].items():
            stacked = [
                control.permutation(factor.shape, path, seed)
                for control, seed in controls
            ]
            orders[label, path] = np.stack(stacked)
    return orders
