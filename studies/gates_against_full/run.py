"""How far the gates of LoRA, NA-LoRA and full tuning are apart, at each method's best rate.

    python studies/gates_against_full/run.py tune      # chooses each method's rate on validation items
    python studies/gates_against_full/run.py test      # runs the test seeds, and compares gates with full tuning
    python studies/gates_against_full/run.py report    # writes results.md from records.jsonl, with scipy alone

Interrupt at will: a finished run is a line of records.jsonl and is not repeated. README.md has the question and
the protocol.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECORDS = FOLDER / "records.jsonl"
DATA = FOLDER.parent / "gate_data.py"
MODEL = "smollm2-135m-instruct"
DATASET = "synthetic:4000"
TRAIN = "train[:-512]"
VALIDATION = "train[-512:-256]"
TEST = "train[-256:]"
STEPS = 80
TUNING_SEED = 0
TEST_SEEDS = (1, 2, 3)
FIRST_RATES = {"full": (1e-4, 2e-4), "lora": (2e-3, 4e-3)}
EXTENSIONS = 3  # further rates, each twice or half of the one that wins at an end
REFERENCE = "full"


def lora(rank: int, mechanisms: str) -> list[str]:
    """Returns the flags of adapters of a rank on the feed-forward blocks, with alpha twice the rank."""
    return ["--lora.rules", f"ffn/(gate|up|down)_proj:{rank}", "--mechanisms", mechanisms]


METHODS = {
    "full": ["--tune", "full"],
    "rank_1": lora(1, "none"),
    "rank_4": lora(4, "none"),
    "rank_16": lora(16, "none"),
    "rank_64": lora(64, "none"),
    "na_lora_16": lora(16, "curvature_cap"),
    "na_lora_permuted_16": lora(16, "curvature_cap:permute=1"),
}


def nalora(*arguments: str) -> None:
    """Runs a subcommand of nalora, or ends the study with its message."""
    command = [sys.executable, "-m", "nalora_jax", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")


def train(method: str, rate: float, seed: int, held_out: str, output: Path) -> dict[str, Any]:
    """Trains one run from the start, and returns its losses on held-out records and its seconds."""
    shutil.rmtree(output, ignore_errors=True)
    nalora(
        "train", "--import", str(DATA), "--model", MODEL, "--data.dataset", DATASET,
        "--data.train-split", TRAIN, "--data.eval-split", held_out, "--data.eval-limit", "128",
        "--data.max-length", "128", "--train.batch-size", "4", "--steps", str(STEPS), "--seed", str(seed),
        "--train.eval-every", "0", "--optimizer.learning-rate", repr(rate), "--output", str(output),
        *METHODS[method],
    )  # fmt: skip
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    final = next(record for record in records if record.get("final"))
    done = next(record for record in records if "done" in record)
    before = json.loads((output / "before.json").read_text())
    return {
        "loss": final["eval"]["loss"],
        "loss_before": _find_loss(before),
        "seconds": sum(done["done"]["seconds"].values()),
    }


def _find_loss(record: Any) -> float | None:
    """Returns the loss of the evaluation before training, wherever the file keeps it."""
    if isinstance(record, dict):
        if isinstance(record.get("loss"), float):
            return float(record["loss"])
        for value in record.values():
            loss = _find_loss(value)
            if loss is not None:
                return loss
    return None


def compare(adapter: Path, reference: Path) -> dict[str, Any]:
    """Returns the gates of a run beside those of full tuning on 64 test records, by block and layer."""
    target = adapter / "gates.json"
    nalora(
        "inspect", str(adapter), "--import", str(DATA), "--against", str(reference), "--dataset", DATASET,
        "--split", TEST, "--limit", "64", "--max-length", "128", "--json", str(target),
    )  # fmt: skip
    gates: dict[str, Any] = json.loads(target.read_text())
    return gates


def records() -> list[dict[str, Any]]:
    """Returns the finished runs."""
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def find(phase: str, method: str, seed: int, rate: float) -> dict[str, Any] | None:
    """Returns the record of a run, or None."""
    for record in records():
        same = (record["phase"], record["method"], record["seed"]) == (phase, method, seed)
        if same and math.isclose(record["rate"], rate):
            return record
    return None


def store(record: dict[str, Any]) -> None:
    """Appends a finished run."""
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(
        json.dumps({name: record[name] for name in ("phase", "method", "seed", "rate", "loss")}), flush=True
    )


def tuned(method: str) -> list[dict[str, Any]]:
    """Returns the tuning runs of a method, by rate."""
    found = [r for r in records() if r["phase"] == "tune" and r["method"] == method]
    return sorted(found, key=lambda record: record["rate"])


def next_rates(method: str) -> Iterator[float]:
    """Yields the rates that are still to be tried: two, then further ones while an end wins."""
    first = FIRST_RATES.get(method, FIRST_RATES["lora"])
    yield from first
    for _ in range(EXTENSIONS):
        grid = tuned(method)
        best = min(grid, key=lambda record: record["loss"])
        if best is grid[0]:
            yield best["rate"] / 2
        elif best is grid[-1]:
            yield best["rate"] * 2
        else:
            return


def chosen_rate(method: str) -> float:
    """Returns the rate with the lowest validation loss."""
    grid = tuned(method)
    if not grid:
        sys.exit(f"{method} has no tuning run: first run this file with `tune`")
    return float(min(grid, key=lambda record: record["loss"])["rate"])


def tune(scratch: Path) -> None:
    """Runs what is missing to choose the rates."""
    for method in METHODS:
        for rate in next_rates(method):
            if find("tune", method, TUNING_SEED, rate) is None:
                figures = train(method, rate, TUNING_SEED, VALIDATION, scratch / "tune")
                store({"phase": "tune", "method": method, "seed": TUNING_SEED, "rate": rate, **figures})


def test(scratch: Path) -> None:
    """Runs the test seeds at the chosen rates; each adapter is compared with full tuning on the same rows."""
    for seed in TEST_SEEDS:
        missing = [m for m in METHODS if find("test", m, seed, chosen_rate(m)) is None]
        reference = scratch / f"full-{seed}"
        if missing and not (reference / "model").exists() and REFERENCE not in missing:
            train(REFERENCE, chosen_rate(REFERENCE), seed, TEST, reference)  # its record exists
        for method in missing:
            output = reference if method == REFERENCE else scratch / "test"
            figures = train(method, chosen_rate(method), seed, TEST, output)
            gates = {} if method == REFERENCE else compare(output, reference)
            rate = chosen_rate(method)
            store(
                {"phase": "test", "method": method, "seed": seed, "rate": rate, **figures, "gates": gates}
            )
        shutil.rmtree(reference, ignore_errors=True)


def layer_means(gates: dict[str, Any], name: str) -> list[float]:
    """Returns the layers' values of a figure, of all blocks."""
    values: list[float] = []
    for block in gates.values():
        if isinstance(block, dict) and name in block:
            values += block[name]
    return values


def mean(values: list[float]) -> float:
    """Returns the mean."""
    return sum(values) / len(values)


def interval(values: list[float]) -> str:
    """Returns mean and 95% t interval of paired differences."""
    from scipy import stats

    if len(values) < 2:
        return f"{mean(values):+.4f} (one seed)"
    middle = mean(values)
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{middle:+.4f} ({middle - spread:+.4f} to {middle + spread:+.4f})"


FIGURES = (
    "misalignment",
    "misalignment_of_reference",
    "feature",
    "selection",
    "size",
    "followed",
    "homogeneity",
)


def report() -> None:
    """Writes results.md."""
    tests = [record for record in records() if record["phase"] == "test"]
    full = {record["seed"]: record for record in tests if record["method"] == REFERENCE}
    lines = ["# Results", "", f"{len(records())} runs; written by `run.py report`.", ""]
    lines += ["## Rates", "", "| method | validation loss by rate | chosen |", "|---|---|--:|"]
    for method in METHODS:
        grid = tuned(method)
        if grid:
            shown = ", ".join(f"{record['rate']:g}: {record['loss']:.4f}" for record in grid)
            lines.append(f"| {method} | {shown} | {chosen_rate(method):g} |")
    lines += [
        "",
        "## Test losses",
        "",
        "| method | seeds | loss | minus full tuning |",
        "|---|--:|--:|--:|",
    ]
    for method in METHODS:
        runs = [record for record in tests if record["method"] == method]
        if runs:
            paired = [r["loss"] - full[r["seed"]]["loss"] for r in runs if r["seed"] in full]
            difference = "" if method == REFERENCE else interval(paired)
            lines.append(
                f"| {method} | {len(runs)} | {mean([r['loss'] for r in runs]):.4f} | {difference} |"
            )
    lines += [
        "",
        "## Gates beside full tuning",
        "",
        "Means over layers and seeds; `nalora inspect --against` explains them.",
        "",
    ]
    lines += ["| method | " + " | ".join(FIGURES) + " |", "|---|" + "--:|" * len(FIGURES)]
    for method in METHODS:
        runs = [record for record in tests if record["method"] == method and record["gates"]]
        if runs:
            cells = [mean([mean(layer_means(r["gates"], name)) for r in runs]) for name in FIGURES]
            lines.append(f"| {method} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    (FOLDER / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Runs the named part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["tune", "test", "report"])
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/gates_against_full"), help="folder of the runs"
    )
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parts = {"tune": lambda: tune(options.scratch), "test": lambda: test(options.scratch), "report": report}
    parts[options.part]()


if __name__ == "__main__":
    main()
