"""``nalora eval``: evaluates a model on held-out data, tasks, the harness, or against another."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from nalora_jax.cli.outputs import check_new_file, data_settings, flags_of_verb, is_dual, labelled, mesh_of
from nalora_jax.config import DataConfig, MeshConfig, config_from_dict
from nalora_jax.config.structured import COUNT
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.models.decoder import Decoder
    from nalora_jax.train.adapted import AdaptedModel
    from nalora_jax.train.adapted_dual import AdaptedDual


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a model, or a model with an adapter: on held-out data, tasks, or against another."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Data set, as for --data.dataset of nalora train. By default the run's data set, else
    # socialiqa.
    dataset: str | None = None
    # Split. By default the run's; for another --dataset its "validation", or else all of "train".
    split: str | None = None
    # Maximum number of examples (0: all). By default the run's, else 400.
    limit: Annotated[int | None, COUNT] = None
    # Wrap prompts in the model's chat template. By default as in the run, else not.
    chat: bool | None = None
    # Data sets separated by commas, each as for --dataset, optionally with a split:
    # "boolq,mine.jsonl[:100]".
    tasks: str = ""
    # Tasks of EleutherAI's lm-evaluation-harness (the extra "eval"), separated by commas.
    harness: str = ""
    # Folder of additional harness tasks (YAML files).
    harness_tasks: Path | None = None
    # Needle retrieval: lengths of prompts in tokens, separated by commas, e.g. "1024,8192". Each has --limit questions
    # (10 by default) at depths of 0, 25, 50, 75 and 100%. An adapter is compared with its base.
    needle: str = ""
    # Worked examples before each question of the harness. By default as defined by the task.
    shots: Annotated[int | None, COUNT] = None
    # Compare item by item with "base" (without the adapter), another adapter or run, or another
    # model.
    against: str | None = None
    # Write one record per item to this new JSONL file.
    records: Path | None = None
    # Also write the metrics to this new JSON file.
    output: Path | None = None
    # Dtype of the base weights. By default the run's, else bfloat16.
    dtype: Literal["bfloat16", "float32"] | None = None
    # Quantize the adapted model's projections. By default as in the run, else not.
    quantize: Literal["none", "int8", "nf4", "mxfp4"] | None = None
    # Devices along each axis of the mesh; -1 or 0 takes whatever is left.
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, fsdp=1, tensor=1))


def evaluate(args: EvalArgs) -> None:
    """Prints metrics with their intervals, and writes metrics and records to files if requested.

    For a run, the defaults repeat the run's last evaluation, bit for bit on the same kind and
    number of devices. With PiSSA or LoRA-GA it is equal up to rounding, because the adapter is
    exported to another base than it was trained on.
    """
    from nalora_jax.train.located import holds_adapter, locate
    from nalora_jax.weights import hub

    for flag, path in (("--output", args.output), ("--records", args.records)):
        check_new_file(flag, path)
    if args.dataset is not None and args.tasks:
        raise NaloraError("--tasks", expected="--dataset or --tasks", found="both")
    if is_dual(args.model, args.adapter):
        _images(args)
        return
    if args.needle:
        _needle(args)
        return
    located = locate(args.model, args.adapter)
    if config_from_dict(located.run).preference.loss != "none" and not (
        args.tasks or args.dataset or args.harness
    ):
        _preference(args, located.run)
        return
    sets = []
    if args.tasks or args.dataset or not args.harness:
        sets = _data_sets(args, located.run)
    if args.harness:
        from nalora_jax.evaluate.harness import require_harness

        require_harness()
    if args.against not in (None, "base") and not holds_adapter(args.against):  # needs only the base
        hub.resolve_source(locate(args.against).base)  # reports a missing model before the first is loaded
    mesh = mesh_of(args.mesh)
    model = _load(args, args.model, mesh, adapter=args.adapter)
    if not (args.tasks or args.harness or args.against or args.records):
        _held_out(args, model, sets[0], mesh)
        return
    sides = [("", model, model.module, model.variables)]
    if args.against is not None:
        sides.append((args.against, *other_side(args, model, mesh)))
    results: dict[str, Any] = {"model": located.base, "adapter": located.adapter, "against": args.against}
    records: list[dict[str, Any]] = []
    if sets:
        results["tasks"] = _tasks(sets, sides, mesh, records, custom=not (args.tasks or _asked(args)))
    if args.harness:
        results["harness"] = _harness(args, sides, mesh, records)
    write_results(args, results, records)


def _asked(args: EvalArgs) -> dict[str, Any]:
    """Returns the settings that the user changed from the run's."""
    asked = {"dataset": args.dataset, "eval_split": args.split, "eval_limit": args.limit, "chat": args.chat}
    return {name: value for name, value in asked.items() if value is not None}


def _data_sets(args: EvalArgs, run: Mapping[str, Any]) -> list[DataConfig]:
    """Returns the data sets to evaluate on, after opening each."""
    from nalora_jax.data.sources import open_held_out, split_to_measure

    data = data_settings(run, _asked(args))
    if config_from_dict(run).vision.task == "chat":  # opened with the model
        return [data]
    with flags_of_verb("--dataset"):
        if args.dataset is not None and args.split is None:
            data = replace(data, eval_split=split_to_measure(data))
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.tasks and not names:
        raise NaloraError("--tasks", expected="names, separated by commas", found=repr(args.tasks))
    with flags_of_verb("--tasks" if args.tasks else "--dataset"):
        sets = [_task(name, args, data) for name in names] or [data]
        for dataset in sets:
            open_held_out(dataset, dataset.eval_split).read([0])  # fails before a model is loaded
    return sets


def _task(text: str, args: EvalArgs, like: DataConfig) -> DataConfig:
    """Parses ``NAME`` or ``NAME[SPLIT]``, where ``[:100]`` is a part of the default split."""
    from nalora_jax.data.sources import split_to_measure

    name, bracket, split = text.partition("[")
    limit = like.eval_limit if args.limit is None else args.limit
    data = replace(like, dataset=name, eval_limit=limit)
    chosen = split.removesuffix("]") if bracket else args.split or split_to_measure(data)
    if bracket and not chosen[:1].isalpha():
        chosen = f"{split_to_measure(data)}[{chosen}]"
    return replace(data, eval_split=chosen, train_split=chosen)


def other_side(
    args: EvalArgs, model: AdaptedModel, mesh: Any
) -> tuple[AdaptedModel, Decoder, dict[str, Any]]:
    """Returns the model to compare with, on the same base weights if it is an adapter or "base"."""
    from nalora_jax.models.targets import AdapterSpec
    from nalora_jax.train.adapted import put_on

    against = str(args.against)
    if against == "base":
        return model, model.module.clone(adapters=AdapterSpec()), {"params": model.base.params}
    adapted = put_on(model, against, mesh)
    if adapted is None:
        adapted = _load(args, against, mesh)
    return adapted, adapted.module, adapted.variables


def _load(args: EvalArgs, model: str, mesh: Any, adapter: Path | None = None) -> AdaptedModel:
    """Loads a model with the requested dtype and quantization."""
    from nalora_jax.train.adapted import load

    return load(model, adapter=adapter, dtype=args.dtype, quantize=args.quantize or "run", mesh=mesh)


Side = tuple[str, "AdaptedModel", "Decoder", dict[str, Any]]


def _tasks(
    sets: Sequence[DataConfig],
    sides: Sequence[Side],
    mesh: Any,
    records: list[dict[str, Any]],
    *,
    custom: bool,
) -> dict[str, Any]:
    """Prints and returns metrics by data set, with the comparison if there are two sides."""
    from nalora_jax.data.questions import eval_examples, held_out
    from nalora_jax.data.sources import open_pair
    from nalora_jax.evaluate.evaluator import compare_records, describe, describe_comparison
    from nalora_jax.evaluate.text import TextEvaluator

    tasks: dict[str, Any] = {}
    for data in sets:
        name = f"{data.dataset}[{data.eval_split}]"
        records_of: list[list[dict[str, Any]]] = []
        summaries: list[dict[str, Any]] = []
        for label, model, module, variables in sides:
            tokenizer = model.base.tokenizer
            # For a run's data set, the examples of its reported results.
            if custom:
                items, _ = held_out(open_pair(data)[1], data, tokenizer)
            else:
                items = eval_examples(data, tokenizer, split=data.eval_split)
            evaluator = TextEvaluator(module, tokenizer, items, mesh=mesh)
            records_of.append(evaluator.records(variables["params"], variables.get("lora")))
            summaries.append(evaluator.summary(records_of[-1]))
            print(f"{labelled(name, label)}: {describe(summaries[-1])}", flush=True)
            records += [{"task": name, "model": label, **record} for record in records_of[-1]]
        tasks[name] = dict(summaries[0])
        if len(summaries) == 2:
            tasks[name] |= {"against": summaries[1], "comparison": compare_records(*records_of[::-1])}
            print(f"{name}, difference: {describe_comparison(tasks[name]['comparison'])}", flush=True)
    return tasks


def _harness(
    args: EvalArgs, sides: Sequence[Side], mesh: Any, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Prints and returns the harness's results, with the comparison if there are two sides."""
    from nalora_jax.evaluate.harness import compare_samples, harness_model, run_harness

    tasks = [name.strip() for name in args.harness.split(",") if name.strip()]
    options: dict[str, Any] = {"folder": args.harness_tasks, "limit": args.limit or 0, "shots": args.shots}
    results = []
    for label, model, module, variables in sides:
        wrapped = harness_model(module, variables, model.base.tokenizer, mesh=mesh)
        results.append(run_harness(wrapped, tasks, chat=bool(args.chat), **options))
        for task, metrics in results[-1]["results"].items():
            numbers = ", ".join(
                f"{name.partition(',')[0]} {value:.4f}"
                for name, value in metrics.items()
                if "," in name and "stderr" not in name and isinstance(value, int | float)
            )
            print(f"{labelled(task, label)}: {numbers}", flush=True)
        for task, rows in results[-1]["samples"].items():
            records += [{"task": task, "model": label, **row} for row in rows]
    summary = {name: results[0][name] for name in ("results", "versions")}
    if len(results) == 2:
        summary["against"] = results[1]["results"]
        summary["comparison"] = {
            task: compare_samples(results[1]["samples"][task], rows)
            for task, rows in results[0]["samples"].items()
            if rows
        }
        for task, metrics in summary["comparison"].items():
            for metric, number in metrics.items():
                p = ""
                if "p_value" in number:
                    p = f", McNemar p = {number['p_value']:.2g}"
                interval = f"95% interval {number['low']:+.4f} to {number['high']:+.4f}"
                print(
                    f"{task}, difference: {metric} {number['difference']:+.4f} ({interval}{p})", flush=True
                )
    return summary


def _held_out(args: EvalArgs, model: AdaptedModel, data: DataConfig, mesh: Any) -> None:
    """Prints the held-out metric as a run computes it."""
    from nalora_jax.data.questions import eval_examples, held_out
    from nalora_jax.data.sources import open_pair
    from nalora_jax.evaluate.seeing import evaluator_of
    from nalora_jax.train.kinds.images import seen_sources

    tokenizer, source = model.base.tokenizer, None
    if model.base.processor is not None:
        vision = config_from_dict(model.located.run).vision
        splits = (data.eval_split,) if _asked(args) else (data.train_split, data.eval_split)
        with flags_of_verb("--dataset"):
            source = seen_sources(data, vision, tokenizer.images, splits=splits)
    if _asked(args):
        items = eval_examples(data, tokenizer, split=data.eval_split, source=source)
    else:  # the examples of the run's reported results
        items, _ = held_out(open_pair(data, source=source)[1], data, tokenizer)
    values = evaluator_of(model.base, model.module, items, mesh).measure(
        model.base.params, model.lora, samples=args.output is not None
    )
    _report(args, model, data, values)


def _images(args: EvalArgs) -> None:
    """Prints the held-out metric of a run on images, by default on the run's reported images."""
    from nalora_jax.data.images.opened import open_images
    from nalora_jax.evaluate.images import Images
    from nalora_jax.train.adapted_dual import load_adapted_dual
    from nalora_jax.train.kinds.dual import image_evaluator, image_indices

    if args.quantize not in (None, "none"):
        raise NaloraError("--quantize", expected="none for image and text encoders", found=args.quantize)
    model = load_adapted_dual(args.model, adapter=args.adapter, dtype=args.dtype)
    run, data = config_from_dict(model.located.run), data_settings(model.located.run, _asked(args))
    classes: tuple[str, ...] = ()
    if run.vision.task == "classify":
        classes = open_images(data, run.vision, data.train_split).classes()
    held = open_images(data, run.vision, data.eval_split)
    reported, _ = image_indices(replace(run, data=data), held)
    evaluator = image_evaluator(model.encoders, Images(held, reported), classes, run.vision)
    values = evaluator.measure(model.base.params, model.lora, samples=args.output is not None)
    _report(args, model, data, values)


def _preference(args: EvalArgs, run: Mapping[str, Any]) -> None:
    """Prints the held-out loss and rewards of a run on pairs, computed as in the run."""
    from nalora_jax.data.preference import held_out_pairs
    from nalora_jax.data.sources import open_held_out
    from nalora_jax.evaluate.preference import PreferenceEvaluator

    for flag, value in (("--against", args.against), ("--records", args.records)):
        if value is not None:
            remedy = "a run on pairs is compared with its base by itself: that is what its rewards are"
            raise NaloraError(
                flag, expected="--tasks or --dataset beside it", found="neither", remedy=remedy
            )
    data, preference = data_settings(run, _asked(args)), config_from_dict(run).preference
    mesh = mesh_of(args.mesh)
    model = _load(args, args.model, mesh, adapter=args.adapter)
    records = open_held_out(data, data.eval_split)
    context = model.base.config.max_positions
    pairs, _ = held_out_pairs(records, data, preference, model.base.tokenizer, context)
    evaluator = PreferenceEvaluator(model.module, model.base.tokenizer, pairs, preference, mesh=mesh)
    values = evaluator.measure(model.base.params, model.lora, samples=args.output is not None)
    _report(args, model, data, values)


def _report(
    args: EvalArgs, model: AdaptedModel | AdaptedDual, data: DataConfig, values: dict[str, Any]
) -> None:
    """Prints a held-out metric, and writes it if requested."""
    from nalora_jax.evaluate.evaluator import describe

    print(f"{data.dataset}[{data.eval_split}]: {describe(values)}")
    origin = {"model": model.located.base, "adapter": model.located.adapter, "data": vars(data)}
    write_results(args, origin | values, [])


def write_results(args: EvalArgs, results: dict[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Writes the files that the user requested."""
    from nalora_jax.common.files import write_atomically
    from nalora_jax.evaluate.run_log import to_json

    for path, text in (
        (args.output, json.dumps(to_json(results), indent=2) + "\n"),
        (args.records, "".join(json.dumps(to_json(record)) + "\n" for record in records)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)


# ---------------------------------------------------------------- needle retrieval

_PER_CELL = 10


def _needle(args: EvalArgs) -> None:
    """Prints the accuracy by length and depth; of an adapter also its base's and the difference.

    The results of a run are also written to its ``needle.json``, and shown in its report.
    """
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

    lengths = _needle_lengths(args)
    located = locate(args.model, args.adapter)
    against = args.against
    if not against and located.adapter is not None:
        against = "base"
    mesh = mesh_of(args.mesh)
    model = _load(args, args.model, mesh, adapter=args.adapter)
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
        interval = f"95% interval {grid['low']:.3f} to {grid['high']:.3f}, n {grid['n']}"
        print(f"{title}: exact match {grid['accuracy']:.3f} ({interval})")
        print(text_table(*needle_cells(grid)), flush=True)
        records += [{"model": label, **record} for record in results[-1]]
    grids: dict[str, Any] = {"after" if against else "before": summaries[0]}
    if against is not None:
        grids |= {"before": summaries[1], "comparison": compare_records(*results[::-1])["accuracy"]}
        print(f"difference: {describe_paired(grids['comparison'])}", flush=True)
    write_results(
        args, {"model": located.base, "adapter": located.adapter, "against": against, **grids}, records
    )
    if against == "base":
        _report_needle(model, grids)


def _needle_lengths(args: EvalArgs) -> list[int]:
    for flag, value in (("--tasks", args.tasks), ("--dataset", args.dataset), ("--harness", args.harness)):
        if value:
            raise NaloraError("--needle", expected=f"--needle or {flag}", found="both")
    texts = [text.strip() for text in args.needle.split(",")]
    if not all(re.fullmatch(r"0*[1-9]\d{0,7}", text) for text in texts):
        expected = "lengths of 1 to 8 digits in tokens, separated by commas"
        raise NaloraError("--needle", expected=expected, found=repr(args.needle))
    return sorted(set(map(int, texts)))


def _report_needle(model: AdaptedModel, grids: dict[str, Any]) -> None:
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
