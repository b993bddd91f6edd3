"""Training on your accelerators: tokens/s, MFU and memory, compared with PEFT on a GPU.

    # GPUs of one machine
    pip install '.[cuda]' torch transformers peft && python benchmarks/accelerator.py
    pip install '.[tpu]' && python benchmarks/accelerator.py               # TPU chips of one host
    python benchmarks/accelerator.py --model qwen3-32b --seq 8192
    # on any device, one minute
    python benchmarks/accelerator.py --tiny
    # a block for an issue
    python benchmarks/accelerator.py --report

Random weights of a published shape, rank 8 on gate, up and down, AdamW, loss on all tokens, full
sequences, bfloat16. This library runs as `python train.py` does, with automatic mesh and
rematerialization, on all chips, as NA-LoRA and as plain LoRA. PEFT runs on one GPU and
rematerializes every layer; speeds are per chip. Each run is a separate process. The record names
every comparison that was not possible, with the reason. MFU is useful flops (4 per frozen weight
and token, 6 per adapter weight, attention with causality used) over the data sheet's peak.

--peer-python names a Python that has PEFT, if it is not this one. --report prints, in place of the
table, a Markdown block to paste into an issue about docs/hardware_status.md: hardware, versions and
figures, without host names and paths.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import common
import machines
import numpy as np
from common import (
    markdown,
    parser_of,
    peak_rss_mb,
    random_tokens,
    script,
    spread,
    timed_steps,
    values,
)
from machines import versions

OURS, LORA = "nalora_jax", "nalora_jax, plain LoRA"
TINY = common.ARCHITECTURES["smollm2"] | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
}
TINY |= {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
RANK = 8


def shape_of(name: str) -> dict[str, Any]:
    """Returns the ``config.json`` of a model by name; "tiny" is `TINY`."""
    from nalora_jax.planner.abstract_step import CONFIGS

    return TINY if name == "tiny" else CONFIGS[name]


# ---------------------------------------------------------------- measured processes


def train_ours(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Trains this library on all devices."""
    import jax
    import training

    import nalora_jax.loading.adapted  # noqa: F401  which registers the CPU's implementations where they are, as a run does
    from nalora_jax import config as c
    from nalora_jax.assembly.program import assemble
    from nalora_jax.mesh import distributed, sharding
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.models.stacks import projection_shapes
    from nalora_jax.models.targets import resolve
    from nalora_jax.planner.estimates import useful_flops
    from nalora_jax.planner.layouts import choose_axes
    from nalora_jax.planner.machines import describe_machine

    devices, base = (
        jax.devices(),
        ModelConfig.from_hf(shape_of(options.model), options.model),
    )
    rows = options.rows * len(devices)
    fixed = {"rank": RANK, "learning_rate": 1e-3, "remat": "auto", "seed": 0}
    work = argparse.Namespace(**fixed, dtype=options.dtype, method=method)
    parts = {
        "train": c.TrainConfig(batch_size=rows),
        "data": c.DataConfig(max_length=options.seq),
    }
    config = choose_axes(training.run_config(work, warmup=None, **parts), base, devices)
    mesh = distributed.make_mesh(config.mesh, devices)
    shapes = jax.eval_shape(
        lambda key: training.random_params(base, key, options.dtype), jax.random.key(0)
    )
    places = sharding.shardings(shapes, mesh, sharding.PARAM_RULES)
    params = jax.jit(
        lambda key: training.random_params(base, key, options.dtype),
        out_shardings=places,
    )(jax.random.key(0))
    assembly = assemble(config, base, params, mesh)
    held, view = [assembly.state], assembly.view(assembly.params)

    def step(tokens: np.ndarray) -> float:
        held[0], metrics = assembly.step(view, held[0], training.batch_of(tokens, mesh))
        return float(metrics["loss"])

    record = timed(step, options, rows, base.vocab_size)
    spec, where = (
        resolve(config.lora, projection_shapes(base), base.n_layers),
        describe_machine(devices),
    )
    flops = useful_flops(base, spec, options.rows, options.seq)
    return {
        **record,
        "tokens_per_second": [
            speed / len(devices) for speed in record["tokens_per_second"]
        ],
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "remat": assembly.model.remat,
        "flops": flops,
        "mfu": None
        if where is None
        else flops / statistics.median(record["seconds"]) / where.chip.flops,
        **jax_memory(),
    }


def train_peft(options: argparse.Namespace) -> dict[str, Any]:
    """Trains transformers + PEFT on one GPU, or on the CPU."""
    import torch
    import transformers
    from peft_baseline import adapt, stepper

    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    where = "cuda" if cuda else "cpu"
    raw = dict(shape_of(options.model))
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    dtype = getattr(torch, options.dtype)
    with torch.device(where):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    work = {
        "rank": RANK,
        "dtype": options.dtype,
        "bf16_mode": "mixed",
        "learning_rate": 1e-3,
    }
    work |= {"checkpointing": True, "compile": False, "full": False}
    train = stepper(adapt(base, argparse.Namespace(**work)), argparse.Namespace(**work))

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).to(where)
        return train({"input_ids": ids, "labels": ids})  # waits for the GPU

    record = timed(step, options, options.rows, config.vocab_size)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_rss_mb() / 1e3
    return {
        **record,
        "chips": 1,
        "memory_gb": peak,
        "memory_of": "the GPU" if cuda else "the process",
    }


def timed(
    step: Callable[[np.ndarray], float],
    options: argparse.Namespace,
    rows: int,
    vocab: int,
) -> dict[str, Any]:
    """Returns seconds and speeds of the steps after two warm-up steps, with versions."""
    tokens = random_tokens(options.steps + 2, rows, options.seq, vocab)
    return timed_steps(step, tokens, warmup=2, tokens=rows * options.seq) | {
        "versions": versions()
    }


def jax_memory() -> dict[str, Any]:
    """Returns the peak memory of the fullest device, or the process's if devices report none."""
    import jax

    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use")
        for device in jax.local_devices()
    ]
    if None in peaks:
        return {"memory_gb": peak_rss_mb() / 1e3, "memory_of": "the process"}
    return {"memory_gb": max(peaks) / 1e9, "memory_of": "a chip"}


def describe() -> dict[str, Any]:
    """Returns platform, kind and number of this machine's accelerators."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "chips": len(devices),
    }


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the task of one measured process."""
    if options.one == "describe":
        return describe()
    runs: Mapping[str, Callable[[], dict[str, Any]]] = {
        OURS: lambda: train_ours(options, "nalora"),
        LORA: lambda: train_ours(options, "lora"),
        "PEFT": lambda: train_peft(options),
    }
    return runs[options.one]()


# ---------------------------------------------------------------- the report


def table(record: dict[str, Any]) -> str:
    """Returns a table of every run of every case, and the comparisons that were not possible."""
    lines, notes = [], []
    for case, result in record["cases"].items():
        for name, runs in result["runs"].items():
            mfu = [run["mfu"] for run in runs if run.get("mfu") is not None]
            layout = (
                " x ".join(map(str, runs[-1]["mesh"].values()))
                if "mesh" in runs[-1]
                else "1"
            )
            speed = spread(values(runs, "tokens_per_second"))
            memory = f"{max(values(runs, 'memory_gb')):.1f} ({runs[-1]['memory_of']})"
            lines.append(
                (
                    case,
                    name,
                    layout,
                    speed,
                    f"{statistics.median(mfu):.0%}" if mfu else "",
                    memory,
                )
            )
        notes += [
            f"{case}: {what} was not compared: {why}."
            for what, why in result["not_compared"].items()
        ]
    header = (
        "work",
        "library",
        "data x fsdp x tensor",
        "tokens/s a chip",
        "MFU",
        "GB, at most",
    )
    return "\n\n".join([markdown(header, lines), *notes])


def report(record: dict[str, Any], case: str) -> str:
    """Returns a Markdown block about one case, for users who measured it and open an issue."""
    measured = record["cases"][case]
    machine, here, run = (
        measured["machine"],
        measured["accelerator"],
        measured["runs"][OURS][-1],
    )
    losses = run["losses"]
    items = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": measured["command"],
        "accelerators": f"{here['chips']} x {here['kind']} ({here['platform']})",
        "host": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}",
        "versions": ", ".join(
            f"{name} {version}" for name, version in run["versions"].items()
        ),
        "python": machine["python"],
        "losses": f"{losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps",
    }
    parts = [f"### Hardware report: {items['accelerators']}"]
    parts += [
        "\n".join(f"- {name}: {value}" for name, value in items.items()),
        table({"cases": {case: measured}}),
    ]
    return "\n\n".join(["Paste this into a new issue:", *parts])


def not_measured(platform: str, kind: str, mfu: object) -> dict[str, str]:
    """Returns the comparisons that this machine cannot make, independent of installed packages."""
    notes = {"PEFT": "it is for GPUs"} if platform == "tpu" else {}
    if mfu is None:
        no_peak = (
            "a CPU's peak is not known"
            if platform == "cpu"
            else f"no data sheet of {kind} is known here"
        )
        notes["MFU"] = no_peak
    return notes


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(one(options)))
        return
    here = common.run_process(script("accelerator.py", "--one", "describe"))
    tiny = options.tiny or (here["platform"] == "cpu" and options.model is None)
    defaults = (
        {"model": "tiny", "seq": 64, "steps": 3}
        if tiny
        else {"model": "llama-3.1-8b", "seq": 4096, "steps": 10}
    )
    for name, value in defaults.items():
        setattr(options, name, getattr(options, name) or value)
    names = ("model", "rows", "seq", "steps", "dtype")
    work = [word for name in names for word in (f"--{name}", getattr(options, name))]
    commands = {
        name: script("accelerator.py", "--one", name, *work) for name in (OURS, LORA)
    }
    reasons: dict[str, str] = {}
    if here["platform"] != "tpu":
        commands["PEFT"] = script(
            "accelerator.py", "--one", "PEFT", *work, python=options.peer_python
        )
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, command in commands.items():
        print(f"running {name} ...", flush=True)
        try:
            runs[name] = [common.run_process(command) for _ in range(options.rounds)]
        except RuntimeError as error:
            if name == OURS:  # nothing to compare without it
                raise
            reasons[name] = f"it failed ({str(error).strip().splitlines()[-1][:200]})"
    reasons |= not_measured(here["platform"], here["kind"], runs[OURS][0]["mfu"])
    case = f"{options.model} {options.dtype}, {options.rows} x {options.seq} a chip"
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("one", "report")
    }
    result = {
        "settings": settings,
        "accelerator": here,
        "runs": runs,
        "not_compared": reasons,
    }
    record = save(case, result, here)
    print(report(record, case) if options.report else table(record))


def save(case: str, result: dict[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Records a case under the accelerator's name; a CPU's under its kind of machine."""
    described = machines.machine()
    if here["platform"] != "cpu":
        described["accelerator"] = f"{here['chips']} x {here['kind']}"
    folder = common.OWN / machines.machine_name(described)
    return common.save("accelerator", case, {"machine": described, **result}, folder)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--model",
        help="a model that `nalora plan` knows by name; llama-3.1-8b, on a CPU a tiny one",
    )
    parser.add_argument("--rows", type=int, default=1, help="rows a chip and step")
    parser.add_argument(
        "--seq", type=int, default=0, help="tokens of a row; 4,096 by default"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="timed steps; 10 by default"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="processes of each library"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two narrow layers"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, help="a Python that has PEFT"
    )
    parser.add_argument(
        "--report", action="store_true", help="print a block to paste into an issue"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
