"""``nalora eval --needle``: accuracy of needle retrieval, with and without an adapter."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_jax.cli.outputs import labelled, mesh_of
from nalora_jax.config import config_from_dict
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.cli.evaluate import EvalArgs
    from nalora_jax.train.adapted import AdaptedModel

_PER_CELL = 10


def evaluate_needle(args: EvalArgs) -> None:
    """Prints the accuracy by length and depth; of an adapter also its base's and the difference.

    The results of a run are also written to its ``needle.json``, and shown in its report.
    """
    from nalora_jax.cli.evaluate import load_model, other_side, write_results
    from nalora_jax.evaluate.evaluator import compare_records, describe_paired
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.evaluate.needle import (
        needle_answers,
        needle_items,
        needle_summary,
    )
    from nalora_jax.report.sections import needle_cells
    from nalora_jax.report.tables import text_table
    from nalora_jax.train.located import locate

    lengths = _lengths(args)
    located = locate(args.model, args.adapter)
    against = args.against
    if not against and located.adapter is not None:
        against = "base"
    mesh = mesh_of(args.mesh)
    model = load_model(args, mesh)
    sides = [("", model, model.module, model.variables)]
    if against is not None:
        sides.append((against, *other_side(replace(args, against=against), model, mesh)))
    chat = args.chat
    if chat is None:
        chat = config_from_dict(located.run).data.chat
    results: list[list[dict[str, Any]]] = []
    summaries, records = [], []
    for label, side, module, variables in sides:
        questions = needle_items(side.base.tokenizer, lengths, per_cell=args.limit or _PER_CELL, chat=chat)
        generator = Generator(module, variables, side.base.tokenizer, mesh=mesh)
        results.append(needle_answers(generator, questions))
        grid = needle_summary(results[-1])
        summaries.append(grid)
        title = labelled("needle retrieval", label)
        print(f"{title}: {_summary(grid)}\n{text_table(*needle_cells(grid))}", flush=True)
        records += [{"model": label, **record} for record in results[-1]]
    grids: dict[str, Any] = {"after" if against else "before": summaries[0]}
    if against is not None:
        grids |= {"before": summaries[1], "comparison": compare_records(*results[::-1])["accuracy"]}
        print(f"difference: {describe_paired(grids['comparison'])}", flush=True)
    write_results(
        args, {"model": located.base, "adapter": located.adapter, "against": against, **grids}, records
    )
    if against == "base":
        _report(model, grids)


def _lengths(args: EvalArgs) -> list[int]:
    for flag, value in (("--tasks", args.tasks), ("--dataset", args.dataset), ("--harness", args.harness)):
        if value:
            raise NaloraError("--needle", expected=f"--needle or {flag}", found="both")
    texts = [text.strip() for text in args.needle.split(",")]
    if not all(re.fullmatch(r"0*[1-9]\d{0,7}", text) for text in texts):
        expected = "lengths of 1 to 8 digits in tokens, separated by commas"
        raise NaloraError("--needle", expected=expected, found=repr(args.needle))
    return sorted(set(map(int, texts)))


def _summary(grid: dict[str, Any]) -> str:
    interval = f"95% interval {grid['low']:.3f} to {grid['high']:.3f}, n {grid['n']}"
    return f"exact match {grid['accuracy']:.3f} ({interval})"


def _report(model: AdaptedModel, grids: dict[str, Any]) -> None:
    """Writes the results and the report again to the folder of the adapter's run, if it has one."""
    from nalora_jax.common.files import write_atomically
    from nalora_jax.evaluate.run_log import to_json
    from nalora_jax.report.html import write_report
    from nalora_jax.report.sections import NEEDLE_FILE

    if not model.located.run or model.located.adapter is None:
        return
    folder: Path = model.located.adapter.parent
    write_atomically(folder / NEEDLE_FILE, json.dumps(to_json(grids), indent=2) + "\n")
    print(f"{write_report(folder)}: with these results")
