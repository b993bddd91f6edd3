"""Quantized base weights against bfloat16: bytes, peak memory, speed, and quality on two tasks.

    python benchmarks/quantized.py                       # bfloat16, int8, nf4: some minutes each on two cores
    python benchmarks/quantized.py --kinds bfloat16 nf4  # some of them; recorded results of others are kept

Each kind is a separate process: SmolLM2-135M-Instruct is loaded (quantized tensor by tensor),
evaluated on held-out questions of two tasks, fine-tuned on the first of them for a few steps, and
evaluated again. Questions, data order and adapters are equal, so that differences between kinds
come from the weights alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import load, peak_rss_mb, run_process, save, summary
from methods import with_method
from tables import Row, at_most

TITLE = "Quantized base weights"
SHORT = "Quantized base"
KINDS = ("bfloat16", "int8", "nf4")
TASKS = ("socialiqa", "openbookqa")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument(
        "--measure", choices=KINDS, help="measure one kind in this process, and print it as JSON"
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one kind: loads, evaluates, trains and evaluates again."""
    from nalora_jax import config as c
    from nalora_jax.data.pipeline import train_data
    from nalora_jax.data.questions import eval_examples
    from nalora_jax.evaluate.text import TextEvaluator
    from nalora_jax.layout import distributed
    from nalora_jax.train.assembly import assemble
    from nalora_jax.train.compilation import compile_ahead
    from nalora_jax.weights.base import load_model

    kind = None if options.measure == "bfloat16" else options.measure
    start, floor = time.perf_counter(), peak_rss_mb()
    loaded = load_model(options.model, dtype="bfloat16", quantized=kind)
    record = {"bytes": sizes(loaded.params), "load_seconds": time.perf_counter() - start}
    record["load_peak_mb"] = peak_rss_mb() - floor
    config = c.RunConfig(
        steps=options.steps,
        data=c.DataConfig(max_length=64),
        optimizer=c.OptimizerConfig(learning_rate=1e-3),
    )
    config = with_method(config, "nalora", warmup=None)
    mesh = distributed.make_mesh(c.MeshConfig())
    assembly = assemble(config, loaded.config, loaded.params, mesh)
    data = train_data(config.data, loaded.tokenizer, batch_size=options.batch, accumulate=1, seed=0)
    evaluators = {}
    for task in TASKS:
        items = eval_examples(c.DataConfig(dataset=task), loaded.tokenizer, limit=options.questions)
        evaluators[task] = TextEvaluator(assembly.eval_model, loaded.tokenizer, items)
    state, batches, params = assembly.state, iter(data.batches()), assembly.view(loaded.params)
    inputs = [distributed.make_global_batch(next(batches), mesh, rows_axis=1) for _ in range(options.steps)]
    compile_ahead(assembly.step, params, state, inputs[0])
    seconds = []
    for batch in inputs:
        began = time.perf_counter()
        state, metrics = assembly.step(params, state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    record["training"] = {
        "tokens_per_second": summary([options.batch * config.data.max_length / s for s in seconds[2:]]),
        "peak_mb": peak_rss_mb(),  # before evaluation
        "last_loss": loss,
    }
    record["before"] = {task: asked.measure(loaded.params, None) for task, asked in evaluators.items()}
    record["after"] = {task: asked.measure(loaded.params, state.lora) for task, asked in evaluators.items()}
    return record


def sizes(params: Any) -> dict[str, int]:
    """Returns the bytes of the projections' kernels, of the embedding, and of all weights."""
    from nalora_jax.common import trees

    flat = {path: leaf.nbytes for path, leaf in trees.flatten(params).items()}
    kernels = sum(size for path, size in flat.items() if re.search(r"layers/.*_proj/kernel", path))
    return {"kernels": kernels, "embedding": flat["embed/embedding"], "all": sum(flat.values())}


def rows(record: Mapping[str, Any]) -> list[Row]:
    """Returns a row per kind, compared with bfloat16: bytes of the projections' kernels."""
    plain = record["cases"]["bfloat16"]["bytes"]["kernels"] if "bfloat16" in record["cases"] else None
    return [
        Row(
            f"bytes of the projections, {kind}",
            f"{(size := record['cases'][kind]['bytes']['kernels']) / 1e6:.0f} MB",
            f"{plain / 1e6:.0f} MB",
            size / plain,
            at_most(0.35) if kind == "nf4" else None,
        )
        for kind in KINDS[1:]
        if plain and kind in record["cases"]
    ]


def table(record: Mapping[str, Any]) -> str:
    """Returns the results as Markdown, a row for each kind.

    Loading is the growth of the process's memory, peak is the peak of training.
    """
    kinds = {kind: record["cases"][kind] for kind in KINDS if kind in record["cases"]}
    plain = kinds["bfloat16"]["bytes"] if "bfloat16" in kinds else None  # may not be measured

    def megabytes(size: Mapping[str, int], what: str) -> str:
        share = f" ({size[what] / plain[what]:.2f})" if plain else ""
        return f"{size[what] / 1e6:.0f}{share}"

    first, second = TASKS
    lines = [
        "| base | kernels MB (of bf16) | embedding MB | all MB (of bf16) | loading MB | peak MB | tokens/s "
        f"| {first} accuracy, loss: before | after | {second} accuracy, loss: before | after |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, result in kinds.items():
        size, training = result["bytes"], result["training"]
        asked = [result[when][task] for task in TASKS for when in ("before", "after")]
        cells = [
            kind,
            megabytes(size, "kernels"),
            f"{size['embedding'] / 1e6:.0f}",
            megabytes(size, "all"),
            f"{result['load_peak_mb']:.0f}",
            f"{training['peak_mb']:.0f}",
            f"{training['tokens_per_second']['median']:.0f}",
            *(f"{values['accuracy']:.3f}, {values['loss']:.3f}" for values in asked),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    settings = {
        "model": options.model,
        "steps": options.steps,
        "batch": options.batch,
        "questions": options.questions,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    for kind in options.kinds:
        result = run_process([sys.executable, str(Path(__file__)), "--measure", kind, *flags]).record
        save("quantized", kind, {"settings": settings, **result})
    print(table(load("quantized")))


if __name__ == "__main__":
    main()
