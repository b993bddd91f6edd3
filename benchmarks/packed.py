"""Useful tokens per second on data of mixed lengths, against PEFT with padding and packing.

    python benchmarks/packed.py --dtype bfloat16

The examples are prompts with completions from all tasks of the commonsense suite (lengths from 10
to 250 tokens), in random order; the loss is on completions alone. This library trains on its packed
sequences of 8 x 256. PEFT trains with padding to the longest example of a batch: 16 examples drawn
at random, which padded are about as many positions, or 48, sorted by length within 16 batches,
which are about as many useful tokens; and packed, on sequences of 8 x 256 by TRL's `pack_dataset`
(best fit decreasing) or, without TRL, by this library. PEFT gets these with restarting positions
and a mask that separates examples, as in this library. Useful tokens are those of examples, without
padding.

--trl-path names the folders with TRL and its dependency `datasets`, if they are not installed in
this Python's environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import add_rounds, compare, save_batches, script
from tables import Row, at_least, compared, requirements

TITLE = "Packed data of mixed lengths against PEFT with padding and with packing"
SHORT = "Packed rows"
ROWS, LENGTH = 8, 256
SIDES = ("nalora_jax", "padded", "padded, sorted by length", "packed")
MIX = ("boolq", "piqa", "socialiqa", "hellaswag", "arc_easy", "openbookqa", "winogrande", "csqa")
Examples = list[tuple[np.ndarray, np.ndarray]]  # ids, and loss mask


def examples(count: int) -> Examples:
    """Returns ``count`` training examples of the mixed tasks in random order."""
    from nalora_jax.config import DataConfig
    from nalora_jax.data.sources import open_source
    from nalora_jax.data.store import open_store
    from nalora_jax.weights.base import load_model

    tokenizer = load_model("smollm2-135m-instruct", dtype="bfloat16").tokenizer
    rows: Examples = []
    for task in MIX:
        config = DataConfig(dataset=task, max_length=LENGTH - 1, train_limit=-(-count // len(MIX)))
        store = open_store(open_source(config, "train"), config, tokenizer, 0, None)
        pairs = zip(store.offsets[:-1], store.offsets[1:], strict=True)
        rows += [(np.array(store.tokens[a:b]), np.array(store.answer[a:b], bool)) for a, b in pairs]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]


def our_batches(data: Examples, steps: int) -> list[dict[str, np.ndarray]]:
    """Returns packed sequences of this library's pipeline."""
    from nalora_jax.data.packing import fill_rows, pack, plan

    lengths = np.array([len(ids) - 1 for ids, _ in data])
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    tokens, answer = (np.concatenate(parts) for parts in zip(*data, strict=True))
    pattern = pack(lengths, LENGTH)
    epoch = plan(pattern, lengths, 0, 0)
    batches = []
    for step in range(steps):
        rows = [epoch.row(step * ROWS + i) for i in range(ROWS)]
        flat = fill_rows(rows, tokens, answer, offsets, LENGTH)
        batches.append({name: value[None] for name, value in flat.items()})
    return batches


def padded_batches(
    data: Examples, steps: int, per_batch: int, *, by_length: bool
) -> list[dict[str, np.ndarray]]:
    """Returns batches padded to their longest example, for the warm-up and the timed steps."""
    if by_length:
        window = 32 * per_batch
        chunks = [data[i : i + window] for i in range(0, len(data), window)]
        ordered = [sorted(chunk, key=lambda example: len(example[0])) for chunk in chunks]
        batches = [chunk[i : i + per_batch] for chunk in ordered for i in range(0, len(chunk), per_batch)]
        batches = [
            batches[i]
            for i in np.random.default_rng(0).permutation(len(batches))
            if len(batches[i]) == per_batch
        ]
    else:
        batches = [data[i : i + per_batch] for i in range(0, len(data), per_batch)]
    return [_padded(batch) for batch in batches[:steps]]


def _padded(batch: Examples) -> dict[str, np.ndarray]:
    shape = (len(batch), max(len(ids) for ids, _ in batch))
    arrays = {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    arrays["labels"] = np.full(shape, -100, np.int64)
    for row, (ids, answer) in enumerate(batch):
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["attention_mask"][row, : len(ids)] = 1
        arrays["labels"][row, : len(ids)] = np.where(answer, ids, -100)
    return arrays


def packed_batches(data: Examples, steps: int) -> list[dict[str, np.ndarray]]:
    """Returns sequences packed by TRL, or by this library without TRL, for transformers."""
    rows = _trl_rows(data) or _own_rows(data)
    return [_joined(rows[i : i + ROWS]) for i in range(0, steps * ROWS, ROWS)]


def _trl_rows(data: Examples) -> list[Examples]:
    try:
        from datasets import Dataset
        from trl.data_utils import pack_dataset
    except ImportError:
        return []
    table = Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in data],
            "labels": [answer.astype(int).tolist() for _, answer in data],
        }
    )
    rows = []
    for row in pack_dataset(table, LENGTH, "bfd"):
        ends = np.cumsum(row["seq_lengths"])[:-1]
        parts = zip(
            np.split(np.array(row["input_ids"]), ends), np.split(np.array(row["labels"]), ends), strict=True
        )
        rows.append([(ids, answer.astype(bool)) for ids, answer in parts])
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def _own_rows(data: Examples) -> list[Examples]:
    from nalora_jax.data.packing import pack, plan

    lengths = np.array([len(ids) for ids, _ in data])
    epoch = plan(pack(lengths, LENGTH), lengths, 0, 0)
    return [[data[i] for i in epoch.row(row)] for row in range(epoch.pattern.rows)]


def _joined(rows: list[Examples]) -> dict[str, np.ndarray]:
    """Returns input ids, labels, positions, and a mask [batch, 1, queries, keys] by example."""
    shape = (len(rows), LENGTH)
    ids, positions, segments = (np.zeros(shape, np.int64) for _ in range(3))
    labels = np.full(shape, -100, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, (tokens, answer) in enumerate(row, start=1):
            here = slice(at, at + len(tokens))
            ids[r, here], segments[r, here], positions[r, here] = tokens, number, np.arange(len(tokens))
            labels[r, here] = np.where(answer, tokens, -100)
            labels[r, at] = -100  # the token before it belongs to another example
            at += len(tokens)
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    mask = (segments[:, :, None] == segments[:, None, :]) & causal
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask[:, None]}


def useful_tokens(batch: dict[str, np.ndarray]) -> int:
    """Returns the number of a batch's tokens that belong to examples."""
    if "segment_ids" in batch:  # the last token of each example is only a target
        return int((batch["segment_ids"] > 0).sum() + batch["segment_ids"].max(axis=-1).sum())
    if batch["attention_mask"].ndim == 2:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].astype(bool).sum())  # only padding contains token 0


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row for each of PEFT's batchings."""
    found_rows = []
    for case, result in record["cases"].items():
        speeds = {name: _speeds(result, name) for name in result["runs"]}
        ours = speeds.pop("nalora_jax")
        for name, speed in speeds.items():
            packed = name == "packed"
            by = f" by {result['packer']}" if packed else ""
            limit = at_least(1.0 if packed else 2.0)
            found_rows.append(
                compared(f"useful tokens/s, {case}, against PEFT {name}{by}", ours, speed, limit)
            )
    return found_rows


def _speeds(result: dict[str, Any], name: str) -> list[float]:
    """Returns each run's useful tokens per second over its timed steps.

    Each run gives one value, because batches differ.
    """
    useful = sum(result["useful_tokens"][name])
    return [useful / sum(run["seconds"]) for run in result["runs"][name]]


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--examples", type=int, default=4000, help="to draw from")
    parser.add_argument("--trl-path", help="folders that have TRL and datasets")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="run these alone (with --add)"
    )
    add_rounds(parser, 2)
    options = parser.parse_args()
    if options.trl_path:
        sys.path.extend(options.trl_path.split(os.pathsep))
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Writes every side's batches and runs all of them."""
    warmup = 2
    steps = warmup + options.steps
    data = examples(options.examples)
    sides = {
        "nalora_jax": our_batches(data, steps),
        "padded": padded_batches(data, steps, 16, by_length=False),
        "padded, sorted by length": padded_batches(data, steps, 48, by_length=True),
        "packed": packed_batches(data, steps),
    }
    commands = {}
    for number, (name, batches) in enumerate(sides.items()):
        path = folder / f"{number}.npz"
        save_batches(path, batches)
        work = ["--dtype", options.dtype, "--batches", path, "--steps", options.steps, "--warmup", warmup]
        program = "training.py" if name == "nalora_jax" else "peft_baseline.py"
        commands[name] = script(program, *work, *(["--method", "nalora"] if name == "nalora_jax" else []))
        if name.startswith("padded"):  # lengths vary: compiling for each takes minutes
            commands[name] += ["--no-compile", "--attention", "sdpa"]
    more = {
        "useful_tokens": {
            name: [useful_tokens(batch) for batch in batches[warmup:]] for name, batches in sides.items()
        },
        "packer": "TRL" if "trl" in sys.modules else "this library",
    }
    commands = {name: command for name, command in commands.items() if name in options.sides}
    print(table(compare("packed", options.dtype, commands, options, more)))


if __name__ == "__main__":
    main()
