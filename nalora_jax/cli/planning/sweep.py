"""The plan of a sweep: the compiled step of many runs on a machine that is not attached."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from nalora_jax.cli.planning.program import devices, step_and_arguments
from nalora_jax.cli.planning.report import describe_hours
from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.collectives import Collective
from nalora_jax.layout.decide import Compiled, Search, decide
from nalora_jax.layout.figures import figures
from nalora_jax.layout.layouts import Layout, decoder_alone, preferred
from nalora_jax.layout.machines import Topology
from nalora_jax.layout.roofline import bound_of
from nalora_jax.layout.sweep_layouts import fitting_sweep, shown
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig


@dataclass(frozen=True)
class SweepPlan:
    """A sweep on a topology."""

    model: str
    where: Topology
    runs: int  # of the sweep
    mesh: MeshConfig
    remat: str
    rows: int  # of each run and step
    seq: int
    memory: float  # bytes of a chip
    seconds: float  # of a step of all runs of a program, by roofline
    mfu: float
    collectives: tuple[Collective, ...] | None  # of the compiled step; None for an estimate

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
        return self.programs * steps * self.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "model": self.model,
            "topology": self.where.name,
            "runs": self.runs,
            "mesh": {name: getattr(self.mesh, name) for name in ("run", "runs_per_device", "fsdp")},
            "remat": self.remat,
            "programs": self.programs,
            "rows": self.rows,
            "seq": self.seq,
            "memory": self.memory,
            "collectives": None if self.collectives is None else len(self.collectives),
            "seconds": self.seconds,
            "mfu": self.mfu,
        }


def plan_sweep(config: RunConfig, base: ModelConfig, where: Topology, seq: int, runs: int) -> SweepPlan:
    """Compiles the step of a sweep in the fastest layout that fits, as `nalora_jax.layout.decide` does.

    Args:
      config: settings of a run, whose rows belong to one run; ``mesh.run`` and
        ``mesh.runs_per_device`` are chosen if they are 0, the rematerialization policy if it is "auto".
      base: the model.
      where: the machine.
      seq: tokens of a row.
      runs: number of runs.

    Raises:
      NaloraError: no layout fits, or the compiler is missing.
    """
    chips, decoder = devices(where), decoder_alone(base, adapter_spec(config, base))
    candidates = fitting_sweep(config, base, where, seq, runs)

    def compiled(layout: Layout) -> Compiled:
        mesh = candidates[layout]
        together = mesh.run * mesh.runs_per_device
        compute: Any = replace(config.compute, remat=cast(Any, layout.remat))
        concrete = replace(config, mesh=mesh, compute=compute)
        built = distributed.make_mesh(mesh, chips)
        measured = figures(*step_and_arguments(concrete, base, built, seq=seq, runs=together))
        train = replace(config.train, batch_size=config.train.batch_size * together)
        bound = bound_of(measured, where, *decoder, replace(concrete, train=train), seq)
        seconds = bound.seconds * math.ceil(runs / together)
        return Compiled(measured.memory, measured.fits(where.chip), seconds, (measured, bound))

    search = Search(list(candidates), where.chip.memory)
    layout, chosen = decide(search, compiled)
    if not chosen.fits:
        raise search.refusal()
    mesh = candidates[layout]
    measured, bound = chosen.program
    return SweepPlan(
        config.model, where, runs, mesh, layout.remat, config.train.batch_size, seq,
        measured.memory, bound.seconds, bound.mfu, measured.collectives,
    )  # fmt: skip


def estimate_sweep(config: RunConfig, base: ModelConfig, where: Topology, seq: int, runs: int) -> SweepPlan:
    """Returns the fastest layout by estimates alone; see `plan_sweep`."""
    candidates = fitting_sweep(config, base, where, seq, runs)
    layout = preferred(list(candidates))
    mesh = candidates[layout]
    programs = math.ceil(runs / (mesh.run * mesh.runs_per_device))
    return SweepPlan(
        config.model, where, runs, mesh, layout.remat, config.train.batch_size, seq,
        layout.memory, layout.seconds / programs, layout.mfu * mesh.run, None,
    )  # fmt: skip


def describe_sweep(plan: SweepPlan, *, steps: int = 0, price: float | None = None) -> Iterator[str]:
    """Yields the plan as lines of text.

    Args:
      plan: the plan.
      steps: of each run; 0: hours and price are not shown.
      price: of one chip and hour, in any currency.
    """
    chip = plan.where.chip
    work = f"{plan.runs} runs of {plan.rows} x {plan.seq} tokens a step"
    yield f"{plan.model} on {plan.where.name} ({plan.where.size} x {chip.name}), {work}"
    yield f"  mesh        {shown(plan.mesh)}, remat {plan.remat}; {plan.programs} program(s) after each other"
    yield f"  memory      {plan.memory / 1e9:.2f} GB a chip of {chip.memory / 1e9:.1f}"
    if plan.collectives is None:
        yield "  by estimates, not compiled"
    else:
        joined = max((each.devices for each in plan.collectives), default=1)
        yield f"  collectives {len(plan.collectives)} in a step, of at most {joined} chip(s)"
    rate = plan.together * plan.rows * plan.seq / plan.seconds
    yield f"  at most     {rate:,.0f} tokens/s, {plan.seconds:.3g} s a step"
    yield f"  implied MFU {plan.mfu:.1%}"
    if steps:
        yield "  " + describe_hours(plan.where, plan.hours(steps), f"{steps} steps of every run", price)
