"""The plan of a sweep: the compiled step of many runs on a machine that is not attached."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from nalora_jax import distributed
from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.plan.decide import is_exhausted
from nalora_jax.plan.figures import Figures, figures
from nalora_jax.plan.layouts import decoder_alone
from nalora_jax.plan.machines import Topology
from nalora_jax.plan.program import devices, step_and_arguments
from nalora_jax.plan.roofline import Roofline, bound_of
from nalora_jax.study.protocol import Protocol


@dataclass(frozen=True)
class SweepPlan:
    """A sweep on a topology."""

    model: str
    where: Topology
    runs: int  # of the sweep
    mesh: MeshConfig
    rows: int  # of each run and step
    seq: int
    figures: Figures
    bound: Roofline  # of a step of all runs of a program

    @property
    def together(self) -> int:
        """The runs of a program."""
        return self.mesh.run * self.mesh.runs_per_device

    @property
    def programs(self) -> int:
        """The number of times that the program runs from start to end."""
        return math.ceil(self.runs / self.together)

    def hours(self, steps: int) -> float:
        """Returns the least hours of all runs of ``steps`` steps."""
        return self.programs * steps * self.bound.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "model": self.model,
            "topology": self.where.name,
            "runs": self.runs,
            "mesh": {name: getattr(self.mesh, name) for name in ("run", "runs_per_device", "fsdp")},
            "programs": self.programs,
            "rows": self.rows,
            "seq": self.seq,
            "memory": self.figures.memory,
            "collectives": len(self.figures.collectives),
            "seconds": self.bound.seconds,
            "mfu": self.bound.mfu,
        }


def plan_sweep(config: RunConfig, base: ModelConfig, where: Topology, seq: int, runs: int) -> SweepPlan:
    """Compiles the step of a sweep for the smallest groups of devices that hold a run.

    Args:
      config: settings of a run, whose rows belong to one run; ``mesh.run`` and
        ``mesh.runs_per_device`` are chosen if they are 0.
      base: the model.
      where: the machine.
      seq: tokens of a row.
      runs: number of runs.

    Raises:
      NaloraError: no group of devices holds a run, or the compiler is missing.
    """
    chips, decoder = devices(where), decoder_alone(base, adapter_spec(config, base))
    tried: list[str] = []
    for mesh in _meshes(config, base, where.size, runs):
        concrete = replace(config, mesh=mesh)
        together = mesh.run * mesh.runs_per_device
        built = distributed.make_mesh(mesh, chips)
        try:
            measured = figures(*step_and_arguments(concrete, base, built, seq=seq, runs=together))
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            tried.append(f"{_text(mesh)} (out of memory)")
            continue
        if not measured.fits(where.chip):
            tried.append(f"{_text(mesh)} ({measured.memory / 1e9:.1f} GB)")
            continue
        rows = config.train.batch_size
        train = replace(config.train, batch_size=rows * together)
        bound = bound_of(measured, where, *decoder, replace(concrete, train=train), seq)
        return SweepPlan(config.model, where, runs, mesh, rows, seq, measured, bound)
    raise NaloraError(
        "--sweep",
        expected=f"runs that fit in {where.chip.memory / 1e9:.1f} GB a chip",
        found="; ".join(tried),
        remedy="use shorter rows, --remat full, --quantize int8, or fewer runs on a device (--mesh.runs-per-device)",
    )


def _meshes(config: RunConfig, base: ModelConfig, size: int, runs: int) -> Iterator[MeshConfig]:
    """Yields meshes from the smallest group of devices to all, each with fewer and fewer runs.

    Within a group, "fsdp" splits as many rows as there are, and "tensor" takes the other devices.
    """
    rows = config.train.batch_size // config.train.accumulate
    groups = [size // n for n in range(1, size + 1) if size % n == 0 and size // n <= runs]
    if config.mesh.run:
        groups = [config.mesh.run]
    for run in groups:
        fsdp = math.gcd(rows, size // run)
        tensor = size // run // fsdp
        if base.n_heads % tensor or base.n_kv_heads % tensor:
            continue
        shared = config.mesh.runs_per_device or math.ceil(runs / run)
        while shared >= 1:
            yield MeshConfig(data=1, fsdp=fsdp, tensor=tensor, run=run, runs_per_device=shared)
            if config.mesh.runs_per_device:
                break
            shared //= 2


def _text(mesh: MeshConfig) -> str:
    return f"run {mesh.run} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, {mesh.runs_per_device} a group"


@dataclass(frozen=True)
class StudyPlan:
    """The plans of a study's runs, by method and stage."""

    where: Topology
    parts: dict[str, SweepPlan]
    steps: int

    @property
    def hours(self) -> float:
        """The least hours of all runs, without evaluation."""
        return sum(method_plan.hours(self.steps) for method_plan in self.parts.values())


def plan_study(protocol: Protocol, base: ModelConfig, where: Topology) -> StudyPlan:
    """Plans the runs that choose the rates, and the test runs, of every method of a study.

    Rates that are added at an end of a grid are not counted.

    Raises:
      NaloraError: see `plan_sweep`.
    """
    stages = {
        "tune": len(protocol.rates) * len(protocol.tuning_seeds),
        "test": len(protocol.test_seeds) * len(protocol.test_multiples),
    }
    model, parts, steps = protocol.models[0], {}, 0
    for task in protocol.tasks:
        for method in protocol.methods:
            config = protocol.config(model, task, method, protocol.rates[0], protocol.tuning_seeds[0])
            steps = config.steps
            for stage, runs in stages.items():
                parts[f"{task} {method} {stage}"] = plan_sweep(
                    config, base, where, config.data.max_length, runs
                )
    return StudyPlan(where, parts, steps)


def describe_study(plan: StudyPlan, price: float | None = None) -> Iterator[str]:
    """Yields the plan of a study as lines of text."""
    yield f"{len(plan.parts)} sweeps of {plan.steps} steps on {plan.where.name}"
    for name, method_plan in plan.parts.items():
        memory = method_plan.figures.memory / 1e9
        yield (
            f"  {name}: {method_plan.runs} runs, {_text(method_plan.mesh)}, {memory:.1f} GB a "
            f"chip, MFU {method_plan.bound.mfu:.0%}, {method_plan.hours(plan.steps):.2f} hours"
        )
    cost = ""
    if price is not None:
        cost = f", {plan.hours * plan.where.size * price:,.0f} at {price:g} a chip and hour"
    yield f"  in all at least {plan.hours:.2f} hours{cost}, without evaluation"


def describe_sweep(plan: SweepPlan, *, steps: int = 0, price: float | None = None) -> Iterator[str]:
    """Yields the plan as lines of text.

    Args:
      plan: the plan.
      steps: of each run; 0: hours and price are not shown.
      price: of one chip and hour, in any currency.
    """
    chip, measured, bound = plan.where.chip, plan.figures, plan.bound
    work = f"{plan.runs} runs of {plan.rows} x {plan.seq} tokens a step"
    yield f"{plan.model} on {plan.where.name} ({plan.where.size} x {chip.name}), {work}"
    yield f"  mesh        {_text(plan.mesh)}; {plan.programs} program(s) after each other"
    yield f"  memory      {measured.memory / 1e9:.2f} GB a chip of {chip.memory / 1e9:.1f}"
    joined = max((each.devices for each in measured.collectives), default=1)
    yield f"  collectives {len(measured.collectives)} in a step, of at most {joined} chip(s)"
    rate = plan.together * plan.rows * plan.seq / bound.seconds
    yield f"  at most     {rate:,.0f} tokens/s, {bound.seconds:.3g} s a step"
    yield f"  implied MFU {bound.mfu:.1%}"
    if steps:
        hours = plan.hours(steps)
        cost = ""
        if price is not None:
            cost = f", {hours * plan.where.size * price:,.0f} at {price:g} a chip and hour"
        yield f"  time        at least {hours:.2f} hours for {steps} steps of every run{cost}"
