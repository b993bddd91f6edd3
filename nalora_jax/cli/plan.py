"""``nalora plan``: plans a run for hardware that is not attached."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    Remat,
    RunConfig,
    TrainConfig,
    check,
)
from nalora_jax.config.ranges import COUNT, MESH, ROWS, TOKENS, Range
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.plan.machines import Topology


@dataclass(frozen=True)
class PlanArgs:
    """Compile a training step for TPUs or GPUs that are not attached: memory and maximum speed."""

    # A released checkpoint by name, without download (llama-3.1-8b, gpt-oss-20b, qwen3.5-9b; an unknown
    # name lists all); or a config.json, or its folder.
    model: str = ""
    # One or more: v5e:16x16 or v5litepod-256, v6e:16x16, v5p:8x8x16, 2xv6e:16x16 (two slices), 8xh100, 64xh100.
    topology: tuple[str, ...] = ()
    # Plan all runs of a study, a folder with protocol.toml, with its first model and its settings.
    study: Path | None = None
    # Rows per step over all chips (0: one per chip).
    batch: int = 0
    # Tokens per row.
    seq: int = 4096
    # RoPE scaling in place of the model's, for longer rows, as for nalora train: yarn:factor=4.
    rope_scaling: Annotated[str, arg(name="model.rope-scaling")] = ""
    # Images per row, for the config.json of a model with image input (LLaVA, Gemma 3); 0: its text
    # model alone.
    images: int = 0
    # Micro-batches that are accumulated in each step.
    accumulate: int = 1
    # Adapters: PATTERN:RANK[:ALPHA] ..., as for nalora train.
    rules: tuple[LoRARule, ...] = LoRAConfig().rules
    # Also train all weights of token embedding and output head: embed_tokens, lm_head, as for
    # nalora train.
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    # Rows of the embedding and the head for added tokens.
    added_tokens: int = 0
    # Rematerialization; "auto" chooses it together with the mesh.
    remat: Remat = "auto"
    # Quantize the adapted model's projections.
    quantize: Literal["none", "int8", "nf4", "mxfp4"] = "none"
    # Price of one chip per hour: shows the cost of a million tokens and, with --steps, of the run.
    price: float | None = None
    # Also write the figures to this file, one JSON line per topology.
    json: Path | None = None
    # Print the layout that would be chosen, without compiling.
    estimate: bool = False
    # Plan a sweep of this number of runs, each with --batch rows a step; 0: one run.
    sweep: int = 0
    # Steps of the run, or of each run of the sweep: shows hours and, with --price, the cost.
    steps: int = 0
    # Axes of the mesh; axes without a size are chosen automatically.
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # Rules that weigh the gates' gradients and updates, as for nalora train.
    mechanisms: tuple[str, ...] = RunConfig().mechanisms


RANGES = {
    "batch": COUNT,
    "seq": TOKENS,
    "images": COUNT,
    "accumulate": ROWS,
    "added_tokens": COUNT,
    "sweep": COUNT,
    "steps": COUNT,
    "price": Range("a number", "[0, 1e6]"),
    **MESH,
}


def plan(args: PlanArgs) -> None:
    """Prints the plan of each topology."""
    from nalora_jax.plan.machines import topology

    machines = [topology(name) for name in args.topology]
    if not machines:
        raise NaloraError("--topology", expected="at least one machine", found="none")
    _prepare(gpus=any(machine.chip.platform == "gpu" for machine in machines))
    from nalora_jax.models.adapters import adapter_spec
    from nalora_jax.plan.layouts import choose, decoder_alone
    from nalora_jax.plan.models import architecture
    from nalora_jax.plan.report import describe, describe_costs, estimate_record
    from nalora_jax.plan.report import plan as compiled

    if args.study is not None:
        _plan_study(args, machines)
        return
    if not args.model:
        raise NaloraError("--model", expected="a model", found="none")
    base = architecture(args.model, images=args.images > 0, rope_scaling=args.rope_scaling)
    base = replace(base, vocab_size=base.vocab_size + args.added_tokens)
    _check_length(args.seq, base.max_positions)
    if args.sweep:
        _plan_sweep(args, base, machines)
        return
    for machine in machines:
        config = _config(args, args.batch or machine.size * args.accumulate)
        if args.estimate:
            layout = choose(config, *decoder_alone(base, adapter_spec(config, base)), machine, args.seq)
            record = estimate_record(args.model, machine, layout, config.train.batch_size, args.seq)
            lines = [f"{args.model} on {machine.name}: {layout}"]
            rate, seconds = record["tokens_per_second"], record["seconds"]
            costs = describe_costs(machine, rate, seconds, args.steps, args.price)
            lines += [f"  {line}" for line in costs]
        else:
            planned = compiled(config, base, machine, args.seq, args.images)
            record, lines = planned.to_dict(), list(describe(planned, steps=args.steps, price=args.price))
        print("\n".join(lines), flush=True)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _plan_sweep(args: PlanArgs, base: ModelConfig, machines: Sequence[Topology]) -> None:
    """Prints the plan of a sweep on each topology."""
    from nalora_jax.plan.sweep import describe_sweep, estimate_sweep, plan_sweep

    plan_one = estimate_sweep if args.estimate else plan_sweep
    for machine in machines:
        planned = plan_one(
            _config(args, args.batch or args.accumulate), base, machine, args.seq, args.sweep
        )
        print("\n".join(describe_sweep(planned, steps=args.steps, price=args.price)), flush=True)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(planned.to_dict()) + "\n")


def _plan_study(args: PlanArgs, machines: Sequence[Topology]) -> None:
    """Prints the plan of a study on each topology."""
    from nalora_jax.plan.models import architecture
    from nalora_jax.plan.sweep import describe_study, estimate_sweep, plan_study, plan_sweep
    from nalora_jax.study.protocol import read_protocol

    assert args.study is not None
    protocol = read_protocol(args.study)
    base = architecture(args.model or protocol.models[0].rpartition("/")[2])
    plan_one = estimate_sweep if args.estimate else plan_sweep
    for machine in machines:
        planned = plan_study(protocol, base, machine, plan_one)
        print("\n".join(describe_study(planned, args.price)), flush=True)


def _check_length(seq: int, positions: int) -> None:
    """Raises unless the model has a position for every token of a row."""
    if seq > positions:
        raise NaloraError(
            "--seq",
            expected=f"at most the model's {positions:,} positions",
            found=seq,
            remedy="--model.rope-scaling extends them",
        )


def _config(args: PlanArgs, rows: int) -> RunConfig:
    return check(
        replace(
            RunConfig(),
            model=args.model,
            lora=LoRAConfig(rules=args.rules, modules_to_save=args.modules_to_save),
            mesh=args.mesh,
            mechanisms=args.mechanisms,
            train=TrainConfig(batch_size=rows, accumulate=args.accumulate),
            compute=ComputeConfig(remat=args.remat, quantize=args.quantize),
        )
    )


def _prepare(*, gpus: bool) -> None:
    """Sets the compilers' environment: JAX on the CPU, and the GPU compiler's path to its tools."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    if not gpus:
        return
    # No device can be timed here, so XLA must not try; its default choices are compiled.
    flags = ["--xla_gpu_autotune_level=0"]
    try:
        tools = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        tools = None
    if tools is not None and tools.submodule_search_locations:
        flags.append(f"--xla_gpu_cuda_data_dir={next(iter(tools.submodule_search_locations))}")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
