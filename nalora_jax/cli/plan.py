"""``nalora plan``: plans a run for hardware that is not attached."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from etils import epy
from tyro.conf import arg

from nalora_jax.common.downloads import cache_dir
from nalora_jax.config import DataConfig, RunConfig, TrainConfig
from nalora_jax.config.structured import AMOUNT, COUNT, TOKEN_COUNT, check_ranges
from nalora_jax.errors import NaloraError

# on first use: help needs no JAX, and `_prepare` comes before it
with epy.lazy_imports():
    from nalora_jax.kinds import record as kinds
    from nalora_jax.planner import abstract_step, layouts, machines, plan_report


log = logging.getLogger(__name__)


# The defaults of the run's flags: those of ``nalora train``, without its model and rows.
_RUN = RunConfig(
    model="", data=DataConfig(max_length=4096), train=TrainConfig(batch_size=0)
)


@dataclass(frozen=True)
class PlanArgs:
    """Compile a run's training step for TPUs or GPUs that are not attached: memory and maximum
    speed."""

    # One or more: v5e:16x16 or v5litepod-256, v6e:16x16, v5p:8x8x16, 2xv6e:16x16 (two slices),
    #   8xh100, 64xh200.
    topology: tuple[str, ...] = ()
    # Short for --train.batch-size: rows per step over all chips. By default one per chip and
    # micro-batch.
    batch: Annotated[int, COUNT] = 0
    # Short for --data.max-length: tokens per row. By default 4096.
    seq: Annotated[int | None, TOKEN_COUNT] = None
    # Images per row, for the config.json of a model with image input (LLaVA, Gemma 3); 0: its text
    # model alone.
    images: Annotated[int, COUNT] = 0
    # Rows of the embedding and the head for added tokens.
    added_tokens: Annotated[int, COUNT] = 0
    # Price of one chip per hour: shows the cost of a million tokens, and of the --steps of the run.
    price: Annotated[float | None, AMOUNT] = None
    # Also write the figures to this file, one JSON line per topology.
    json: Path | None = None
    # Print the layout that would be chosen, without compiling.
    estimate: bool = False
    # Plan a sweep of this number of runs, each with --batch rows a step; 0: one run. Hours and,
    # with --price, the price of all runs are those of --steps.
    sweep: Annotated[int, COUNT] = 0
    run: Annotated[RunConfig, arg(name="")] = _RUN

    def config(self, chips: int) -> RunConfig:
        """Returns the settings of the planned run on a number of chips.

        By default it has a row for each chip and micro-batch. Its ``data.max_length`` is the length
        of the planned rows.

        Raises:
          NaloraError: a setting of the run is out of range, or its model is a dual encoder.
        """
        train = self.run.train
        vision = self.run.vision
        if vision.trains_encoders:
            expected = "a language model: dual encoders are not planned"
            raise NaloraError("--vision.task", expected=expected, found=vision.task)
        # before rows are counted
        check_ranges(replace(self.run, train=replace(train, batch_size=1)))
        rows = self.batch or train.batch_size or chips * train.accumulate
        data = replace(self.run.data, max_length=self.seq or self.run.data.max_length)
        if self.images:
            vision = replace(vision, task="chat")
        batch = replace(train, batch_size=rows)
        return kinds.check_run_config(
            replace(self.run, data=data, train=batch, vision=vision)
        )


def plan(args: PlanArgs) -> None:
    """Prints the plan of each topology."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise NaloraError(
            "--json", expected="a file in an existing folder", found=args.json
        )
    topologies = [machines.topology(name) for name in args.topology]
    if not topologies:
        raise NaloraError("--topology", expected="at least one machine", found="none")
    _prepare(gpus=any(machine.chip.platform == "gpu" for machine in topologies))
    if args.estimate:
        _print_plans(args, topologies)
        return
    file = cache_dir() / "plan-compiler.log"
    log.info("messages of the compilers: %s", file)
    with compiler_messages_in(file):
        _print_plans(args, topologies)


@contextmanager
def compiler_messages_in(file: Path) -> Iterator[None]:
    """Writes the standard error of the compilers into a file; Python's stays where it is.

    libtpu reports on any machine without a TPU that it finds none.

    Raises:
      NaloraError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        messages = file.open("w")
    except OSError as error:
        raise NaloraError(
            str(file),
            expected="a file that can be written",
            found=error,
            remedy="set NALORA_CACHE to another folder",
        ) from error
    shown = sys.stderr
    terminal = os.dup(2)
    with messages, os.fdopen(terminal, "w", buffering=1) as python:
        os.dup2(messages.fileno(), 2)
        if shown is sys.__stderr__:
            sys.stderr = python
        try:
            yield
        finally:
            sys.stderr = shown
            os.dup2(terminal, 2)


def _print_plans(args: PlanArgs, topologies: Sequence[machines.Topology]) -> None:
    """Prints the plan of each topology, and appends its record to the file of ``--json``.

    Raises:
      NaloraError: there is no model, or the rows have no length or exceed the model's positions.
    """
    run = args.run
    seq = args.seq or args.run.data.max_length
    if not run.model:
        raise NaloraError("--model", expected="a model", found="none")
    base = abstract_step.architecture(
        run.model, images=args.images > 0, rope_scaling=run.rope_scaling
    )
    base = replace(base, vocab_size=base.vocab_size + args.added_tokens)
    if seq == 0:
        expected = "the tokens of a row: a plan reads no data"
        raise NaloraError("--data.max-length", expected=expected, found="auto")
    if seq > base.max_positions:
        expected = f"at most the model's {base.max_positions:,} positions"
        raise NaloraError(
            "--seq",
            expected=expected,
            found=seq,
            remedy="--model.rope-scaling extends them",
        )
    shown: dict[str, Any] = {"steps": run.steps, "price": args.price}
    for machine in topologies:
        chips = machine.size
        if args.sweep:  # rows of one run
            chips = 1
        config = args.config(chips)
        if args.sweep:
            sweep = plan_report.plan_sweep(
                config, base, machine, args.sweep, compiles=not args.estimate
            )
            record = sweep.to_dict()
            lines = plan_report.describe_sweep(sweep, **shown)
        elif args.estimate:
            layout = layouts.fastest(layouts.fitting_layouts(config, base, machine))
            rate = config.train.batch_size * config.data.max_length / layout.seconds
            record = plan_report.common_fields(config, machine) | {
                "memory": layout.memory,
                "seconds": layout.seconds,
                "mfu": layout.mfu,
                "layout": layout.record(),
                "estimate": True,
                "limit": machine.chip.memory,
                "tokens_per_second": rate,
            }
            print(f"{run.model} on {machine.name}: {layout}")
            lines = plan_report.cost_lines(machine, layout.seconds, rate, **shown)
        else:
            planned = plan_report.make_plan(config, base, machine, args.images)
            record = planned.to_dict()
            lines = plan_report.plan_lines(planned, **shown)
        for line in lines:
            print(line, flush=True)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _prepare(*, gpus: bool) -> None:
    """Sets the compilers' environment: JAX on the CPU, and the GPU compiler's path to its tools."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    if not gpus:
        return
    # No device can be timed here, so XLA must not try; its default choices are compiled.
    flags = ["--xla_gpu_autotune_level=0"]
    tools = None
    with suppress(ModuleNotFoundError):
        tools = importlib.util.find_spec("nvidia.cuda_nvcc")
    if tools is not None and tools.submodule_search_locations:
        folder = next(iter(tools.submodule_search_locations))
        flags.append(f"--xla_gpu_cuda_data_dir={folder}")
    requested = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([requested, *flags]).strip()
