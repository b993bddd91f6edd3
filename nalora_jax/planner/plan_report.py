"""``nalora plan``: the resources of a run or a sweep on absent hardware, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax

from nalora_jax.common.devices import FSDP, RUN_AXIS
from nalora_jax.config import RunConfig
from nalora_jax.kinds.record import run_kind
from nalora_jax.mesh import distributed
from nalora_jax.mesh.distributed import prompt_shards
from nalora_jax.method.transform import replace_gate_state
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner import accounting, estimates, machines
from nalora_jax.planner.abstract_step import (
    devices,
    moved_weights,
    rollout_and_arguments,
    step_and_arguments,
)
from nalora_jax.planner.decide import Compiled, decide
from nalora_jax.planner.figures import (
    Figures,
    Roofline,
    bound_program,
    figures,
    kernel_flops,
    roofline,
)
from nalora_jax.planner.layouts import fastest, fitting_layouts, fitting_sweep_layouts


@dataclass(frozen=True)
class RolloutPlan:
    """The program that draws the samples of a run with rewards."""

    figures: Figures
    bound: Roofline  # of one execution, in which every sample has the largest length
    programs: int  # executions in a step
    resident: (
        float  # bytes of a chip for the optimizer, which the program does not read
    )
    moved: float  # bytes of weights that are in other places than in the update

    @property
    def memory(self) -> float:
        """Bytes of a chip during a rollout."""
        return self.figures.memory + self.resident

    @property
    def seconds(self) -> float:
        """An upper bound of the speed: the least seconds of a step's samples."""
        return self.programs * self.bound.seconds


@dataclass(frozen=True)
class Plan:
    """A run on a topology: the chosen layout and the figures of the compiled program."""

    config: RunConfig
    where: machines.Topology
    layout: estimates.Layout
    nalora: Figures
    lora: Figures  # the same run without the mechanisms and their statistics
    bound: Roofline  # of a micro-batch of NA-LoRA
    rollout: RolloutPlan | None = None  # of a run with rewards

    @property
    def fits(self) -> bool:
        """True if the chip and its share of the host have enough memory."""
        chip = self.where.chip
        if self.rollout is not None and self.rollout.memory > chip.memory:
            return False
        return self.nalora.fits(chip)

    @property
    def seconds(self) -> float:
        """The least seconds of a step; with rewards, of an update and its share of a rollout."""
        if self.rollout is None:
            drawn = 0.0
        else:
            drawn = self.rollout.seconds / self.config.rl.updates
        return self.bound.seconds + drawn

    @property
    def tokens_per_second(self) -> float:
        """An upper bound of the tokens per second of all chips."""
        return self.config.train.batch_size * self.config.data.max_length / self.seconds

    def ratios(self) -> dict[str, float]:
        """Returns the ratios of NA-LoRA's step to LoRA's: of work, traffic and memory."""
        ours = self.nalora
        other = self.lora
        pairs = {
            "flops": (ours.flops, other.flops),
            "HBM bytes": (ours.memory_bytes, other.memory_bytes),
            "collective bytes": (ours.moved(), other.moved()),
            "memory": (ours.memory, other.memory),
        }
        ratios = {}
        for name, (first, second) in pairs.items():
            ratios[name] = 1.0  # neither has any
            if second:
                ratios[name] = first / second
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of the plan as JSON values.

        Sizes are in bytes of a chip, times in seconds.
        """
        nalora = self.nalora
        record = common_fields(self.config, self.where)
        if self.rollout is not None:
            record["rollout"] = {
                "programs": self.rollout.programs,
                "memory": self.rollout.memory,
                "seconds": self.rollout.seconds,
                "moved": self.rollout.moved,
                "bound": asdict(self.rollout.bound),
            }
        return record | {
            "layout": self.layout.record(),
            "fits": self.fits,
            "memory": nalora.memory,
            "arguments": nalora.arguments,
            "host": nalora.host,
            "limit": self.where.chip.memory,
            "moved": nalora.moved(),
            "hidden": nalora.moved(overlapped=True),
            "seconds": self.bound.seconds,
            "mfu": self.bound.mfu,
            "tokens_per_second": self.tokens_per_second,
            "bound": asdict(self.bound),
            "kernels": dict(nalora.custom_calls),
            "scopes": {name: asdict(work) for name, work in nalora.scopes.items()},
            "over_lora": self.ratios(),
        }


@dataclass(frozen=True)
class SweepPlan:
    """A sweep on a topology."""

    config: RunConfig  # of each run
    where: machines.Topology
    runs: int  # of the sweep
    layout: estimates.Layout
    memory: float  # bytes of a chip
    seconds: float  # of a step of all runs of a program, by roofline
    mfu: float
    # of the compiled step; None for an estimate
    collectives: tuple[accounting.Collective, ...] | None

    @property
    def programs(self) -> int:
        """The number of times that the program runs from start to end."""
        return math.ceil(self.runs / self.layout.together)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of the plan as JSON values.

        ``collectives`` is their number in a step, null for an estimate.
        """
        collectives = None
        if self.collectives is not None:
            collectives = len(self.collectives)
        return common_fields(self.config, self.where) | {
            "runs": self.runs,
            "programs": self.programs,
            "memory": self.memory,
            "seconds": self.seconds,
            "mfu": self.mfu,
            "mesh": {
                RUN_AXIS: self.layout.run,
                "runs_per_device": self.layout.runs_per_device,
                FSDP: self.layout.fsdp,
            },
            "remat": self.layout.remat,
            "collectives": collectives,
        }


def common_fields(config: RunConfig, where: machines.Topology) -> dict[str, Any]:
    """Returns the fields that the records of all plans have."""
    rows = config.train.batch_size
    seq = config.data.max_length
    return {"model": config.model, "topology": where.name, "rows": rows, "seq": seq}


def make_plan(
    config: RunConfig, base: ModelConfig, where: machines.Topology, images: int = 0
) -> Plan:
    """Decides a layout by compiled steps of NA-LoRA, compiles LoRA's step and bounds the time.

    Args:
      config: the run, whose rows have ``data.max_length`` tokens; open settings of its mesh and
        remat are chosen.
      base: the model.
      where: the machine.
      images: images per row, for a vision-language model; bounds and MFU count only the decoder's
        work.

    Raises:
      NaloraError: no layout fits, or the compiler is missing.
    """
    layouts = fitting_layouts(config, base, where)
    compiled = _compiler(config, base, where, images=images)
    layout, result, _ = decide(layouts, where.chip.memory, compiled, must_fit=False)
    placed = layout.into(config)
    concrete = placed.without_mechanisms()
    mesh = distributed.make_mesh(concrete.mesh, devices(where))
    step, arguments = step_and_arguments(concrete, base, mesh, images=images)
    other = figures(plain_lora_step(step, mesh), arguments)
    rollout = None
    if run_kind(config).draws_samples(config):
        rollout = _plan_rollout(placed, base, where, other, arguments)
    ours, bound = result.program
    return Plan(config, where, layout, ours, other, bound, rollout)


def _plan_rollout(
    config: RunConfig,
    base: ModelConfig,
    where: machines.Topology,
    update: Figures,
    arguments: Any,
) -> RolloutPlan:
    """Compiles the program of the samples in the layout of the update, and bounds its time.

    Args:
      config: of the run, in the layout of the update.
      base: the model.
      where: the machine.
      update: figures of the step of the update.
      arguments: the step's arguments.
    """
    mesh = distributed.make_mesh(config.mesh, devices(where))
    rl = config.rl
    shards = prompt_shards(mesh)
    draw, drawn, resident = rollout_and_arguments(config, base, mesh)
    found = figures(draw, drawn)
    wanted = config.train.batch_size // rl.samples
    prompts, count, _ = distributed.program_shape(wanted, rl.samples, shards)
    decoder, _ = estimates.decoder_alone(config, base)
    shape = (
        count / shards,
        config.data.max_length - rl.max_new_tokens,
        max(config.mesh.tensor, 1),
    )
    bound = bound_program(
        found, found.flops + kernel_flops(found, decoder, *shape), 0.0, where
    )
    moved = moved_weights(update, arguments, found, drawn)
    return RolloutPlan(found, bound, math.ceil(wanted / prompts), resident, moved)


def plan_sweep(
    config: RunConfig,
    base: ModelConfig,
    where: machines.Topology,
    runs: int,
    *,
    compiles: bool = True,
) -> SweepPlan:
    """Compiles the step of a sweep in the fastest layout that fits (`nalora_jax.planner.decide`).

    Args:
      config: settings of a run, whose rows belong to one run; ``mesh.run`` and
        ``mesh.runs_per_device`` are chosen if they are 0, the rematerialization policy if it is
        "auto".
      base: the model.
      where: the machine.
      runs: number of runs.
      compiles: if False, the layout and its figures are those of the estimates.

    Raises:
      NaloraError: no layout fits, or the compiler is missing.
    """
    layouts = fitting_sweep_layouts(config, base, where, runs)
    if not compiles:
        layout = fastest(layouts)
        seconds = layout.seconds / math.ceil(runs / layout.together)
        return SweepPlan(
            config, where, runs, layout, layout.memory, seconds, layout.mfu, None
        )
    layout, result, _ = decide(
        layouts, where.chip.memory, _compiler(config, base, where, runs=runs)
    )
    measured, bound = result.program
    resources = measured.memory, bound.seconds, bound.mfu, measured.collectives
    return SweepPlan(config, where, runs, layout, *resources)


def _compiler(
    config: RunConfig,
    base: ModelConfig,
    where: machines.Topology,
    *,
    images: int = 0,
    runs: int = 0,
) -> Callable[[estimates.Layout], Compiled]:
    """Returns a function that compiles the step of a layout.

    Its result has the pair (figures, roofline) as its program.
    """
    chips = devices(where)

    def compiled(layout: estimates.Layout) -> Compiled:
        """Returns the memory and the time of the compiled step of a layout."""
        concrete = layout.into(config)
        mesh = distributed.make_mesh(concrete.mesh, chips)
        together = 0
        programs = 1
        if runs:
            together = layout.together
            programs = math.ceil(runs / together)
        measured = figures(
            *step_and_arguments(concrete, base, mesh, images=images, runs=together)
        )
        bound = roofline(measured, concrete, base, where)
        seconds = bound.seconds * programs + layout.rollout
        return Compiled(
            measured.memory, measured.fits(where.chip), seconds, (measured, bound)
        )

    return compiled


def plain_lora_step(step: Any, mesh: Any) -> Any:
    """Returns a step of plain LoRA that computes no gate statistics.

    Outputs that read them are removed, so the compiler drops them.
    """
    inner = step.__wrapped__  # compiler options cannot be nested

    def plain(params: Any, state: Any, batch: Any) -> Any:
        """Returns the step's result with the old statistics and the loss alone."""
        new, metrics = inner(params, state, batch)
        opt_state = replace_gate_state(new.opt_state, state.gate)
        return new._replace(opt_state=opt_state), {"loss": metrics["loss"]}

    return jax.jit(
        plain, donate_argnums=1, compiler_options=distributed.compiler_options(mesh)
    )


def plan_lines(
    plan: Plan, *, steps: int = 0, price: float | None = None
) -> Iterator[str]:
    """Yields the plan as lines of text.

    Args:
      plan: the plan.
      steps: of the run; 0: hours and their price are not shown.
      price: of one chip and hour, in any currency.
    """
    chip = plan.where.chip
    nalora = plan.nalora
    bound = plan.bound
    where = plan.where
    rows = plan.config.train.batch_size
    seq = plan.config.data.max_length
    machine = f"{where.name} ({where.size} x {chip.name})"
    yield f"{plan.config.model} on {machine}, {rows} rows of {seq} tokens a step"
    yield f"  layout      {plan.layout}"
    verdict = "DOES NOT FIT"
    if plan.fits:
        verdict = "fits"
    available = f"{chip.memory / 1e9:.1f}"
    yield f"  memory      {nalora.memory / 1e9:.2f} GB a chip of {available}: {verdict}"
    arguments = f"{nalora.arguments / 1e9:.2f} GB"
    weights = f"{plan.layout.weights / 1e9:.2f}"
    temporary = f"{nalora.temporary / 1e9:.2f}"
    yield f"              arguments {arguments} (weights {weights}), temporary {temporary}"
    for kind in sorted({c.kind for c in nalora.collectives}):
        same = [c for c in nalora.collectives if c.kind == kind]
        received = sum(c.total for c in same) / 1e9
        hidden = sum(c.total for c in same if c.overlapped) / 1e9
        yield (
            f"  {kind:<11} {received:.2f} GB received a chip and step, "
            f"{hidden:.2f} of them overlapped with matmuls"
        )
    if nalora.custom_calls:
        calls = (
            f"{name} x {times:g}" for name, times in sorted(nalora.custom_calls.items())
        )
        yield "  kernels     " + ", ".join(calls)
    peak = f"{chip.flops / 1e12:.0f} TFLOP/s ({chip.source})"
    yield f"  matrix unit {_milliseconds(bound.matrix)}, at 75% of {peak}"
    yield f"  HBM         {_milliseconds(bound.hbm)}, at {chip.bandwidth / 1e9:,.0f} GB/s"
    for scope, work in nalora.scopes.items():
        matrix = _milliseconds(work.flops / chip.matrix_rate)
        hbm = _milliseconds(work.memory_bytes / chip.bandwidth)
        yield f"  {scope:<11} {matrix} of the matrix unit's and {hbm} of HBM's time"
    overlapped = _milliseconds(bound.hidden)
    exposed = _milliseconds(bound.exposed)
    speed = f"{chip.interconnect / 1e9:.0f} GB/s inbound"
    yield f"  interconn.  {overlapped} overlapped with matmuls, {exposed} not, at {speed}"
    if nalora.host:
        out = sum(t.total for t in nalora.transfers if t.to_host)
        back = sum(t.total for t in nalora.transfers if not t.to_host)
        moved = f"({out / 1e9:.2f} GB out and {back / 1e9:.2f} back a step)"
        available = f"{chip.host_memory / 1e9:.0f}"
        yield f"  host        {nalora.host / 1e9:.2f} GB a chip of {available} {moved}"
        overlapped = _milliseconds(bound.host)
        exposed = _milliseconds(bound.host_exposed)
        speed = f"{chip.host_link / 1e9:.0f} GB/s ({chip.host_source})"
        yield f"  host link   {overlapped} overlapped with matmuls, {exposed} not, at {speed}"
    if plan.rollout is not None:
        yield from _describe_rollout(plan, plan.rollout)
    rate = plan.tokens_per_second
    a_chip = f"{rate / where.size:,.0f}"
    yield f"  at most     {rate:,.0f} tokens/s ({a_chip} a chip), {plan.seconds:.3g} s a step"
    yield f"  implied MFU {bound.mfu:.1%}"
    yield "  over LoRA   " + ", ".join(
        f"{name} {ratio:.4f}" for name, ratio in plan.ratios().items()
    )
    yield from cost_lines(where, plan.seconds, rate, steps, price)


def _milliseconds(seconds: float) -> str:
    """Returns a time in milliseconds as text."""
    return f"{seconds * 1e3:.0f} ms"


def _describe_rollout(plan: Plan, rollout: RolloutPlan) -> Iterator[str]:
    """Yields the lines of a plan on the update and the rollout of a step with rewards."""
    rl = plan.config.rl
    bound = rollout.bound
    chip = plan.where.chip
    prompts = plan.config.train.batch_size // rl.samples
    yield f"  update      at least {plan.bound.seconds:.3g} s, as above"
    yield (
        f"  rollout     at least {rollout.seconds:.3g} s for {prompts} prompts x "
        f"{rl.samples} samples x {rl.max_new_tokens:,} tokens, "
        f"{rollout.programs} program(s) after each other"
    )
    yield (
        f"              {rollout.memory / 1e9:.2f} GB a chip of {chip.memory / 1e9:.1f}; "
        f"a program takes {bound.matrix:.3g} s of the matrix unit's "
        f"and {bound.hbm:.3g} s of HBM's time, "
        f"{bound.hidden + bound.exposed:.3g} s of the interconnect's"
    )
    yield (
        f"  between     {rollout.moved:,.0f} bytes of weights moved, "
        "by the weights' shardings in both programs"
    )


def describe_sweep(
    plan: SweepPlan, *, steps: int = 0, price: float | None = None
) -> Iterator[str]:
    """Yields the plan as lines of text; arguments as of `plan_lines`."""
    chip = plan.where.chip
    rows = plan.config.train.batch_size
    seq = plan.config.data.max_length
    work = f"{plan.runs} runs of {rows} x {seq} tokens a step"
    yield f"{plan.config.model} on {plan.where.name} ({plan.where.size} x {chip.name}), {work}"
    yield f"  mesh        {plan.layout.short}; {plan.programs} program(s) after each other"
    yield f"  memory      {plan.memory / 1e9:.2f} GB a chip of {chip.memory / 1e9:.1f}"
    if plan.collectives is None:
        yield "  by estimates, not compiled"
    else:
        joined = max((each.devices for each in plan.collectives), default=1)
        yield f"  collectives {len(plan.collectives)} in a step, of at most {joined} chip(s)"
    rate = plan.layout.together * rows * seq / plan.seconds
    yield f"  at most     {rate:,.0f} tokens/s, {plan.seconds:.3g} s a step"
    yield f"  implied MFU {plan.mfu:.1%}"
    if steps:
        hours = plan.programs * steps * plan.seconds / 3600
        yield _time_line(plan.where, hours, f"{steps} steps of every run", price)


def cost_lines(
    where: machines.Topology,
    seconds: float,
    tokens_per_second: float,
    steps: int,
    price: float | None,
) -> Iterator[str]:
    """Yields lines with the hours of a run, and with costs at ``price`` for a chip and hour.

    Args:
      where: the machine.
      seconds: of a step.
      tokens_per_second: of all chips.
      steps: of the run; 0: no hours.
      price: None: no costs.
    """
    if steps:
        yield _time_line(where, steps * seconds / 3600, f"{steps:,} steps", price)
    if price is not None:
        cost = price * where.size / (tokens_per_second * 3600 / 1e6)
        yield f"  cost        at least {cost:.4g} a million tokens, at {price:g} a chip and hour"


def _time_line(
    where: machines.Topology, hours: float, work: str, price: float | None
) -> str:
    """Returns the line with the hours of some work and, with ``price``, their cost."""
    cost = ""
    if price is not None:
        cost = f", {hours * where.size * price:,.2f} at {price:g} a chip and hour"
    return f"  time        at least {hours:.2f} hours for {work}{cost}"
