"""``nalora eval``: evaluates a model on held-out data, tasks, the harness, or against another."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from etils import epy

from nalora_jax.cli.outputs import (
    add_label,
    check_new_file,
    data_settings,
    is_dual,
    mesh_of,
    name_flags_of,
)
from nalora_jax.cli.parser import ModelArgs
from nalora_jax.common.files import write_atomically
from nalora_jax.config import DataConfig, RunConfig, config_from_dict
from nalora_jax.config.structured import COUNT
from nalora_jax.errors import NaloraError

with epy.lazy_imports():  # on first use: help needs no JAX
    from nalora_jax.data import questions, sources
    from nalora_jax.evaluate import evaluator as metrics
    from nalora_jax.evaluate import generate, harness, needle, run_log, text_evaluation
    from nalora_jax.kinds import record
    from nalora_jax.loading import adapted, adapted_dual, located
    from nalora_jax.models import targets
    from nalora_jax.report import html, sections, tables
    from nalora_jax.weights import hub


@dataclass(frozen=True)
class EvalArgs(ModelArgs):
    """Evaluate a model, or a model with an adapter: on held-out data, tasks, or against another."""

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
    # Needle retrieval: lengths of prompts in tokens, separated by commas, e.g. "1024,8192". Each
    # has --limit questions (10 by default) at depths of 0, 25, 50, 75 and 100%. An adapter is
    # compared with its base.
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
    # Quantize the adapted model's projections. By default as in the run, else not.
    quantize: Literal["none", "int8", "nf4", "mxfp4"] | None = None


class Side(NamedTuple):
    """A model in a comparison."""

    label: str  # "" or ``--against``
    model: adapted.AdaptedModel
    module: Any  # the decoder with or without adapters
    variables: Mapping[str, Any]


def evaluate(args: EvalArgs) -> None:
    """Prints metrics with their intervals, and writes metrics and records to files if requested.

    For a run, the defaults repeat the run's last evaluation, bit for bit on the same kind and
    number of devices. With PiSSA or LoRA-GA it is equal up to rounding, because the adapter is
    exported to another base than it was trained on.
    """
    for flag, path in (("--output", args.output), ("--records", args.records)):
        check_new_file(flag, path)
    if args.dataset is not None and args.tasks:
        raise NaloraError("--tasks", expected="--dataset or --tasks", found="both")
    if is_dual(args.model, args.adapter):
        return _images(args)
    if args.needle:
        return _needle(args)
    place = located.locate(args.model, args.adapter)
    named = args.tasks or args.dataset
    run = config_from_dict(place.run)
    if record.run_kind(run).compares_with_base and not (named or args.harness):
        return _compared_with_base(args, run)
    sets: list[DataConfig] = []
    if named or not args.harness:
        sets = _data_sets(args, place.run)
    if args.harness:
        harness.require_harness()
    # needs only the base
    if args.against not in (None, "base") and not located.holds_adapter(args.against):
        # reports a missing model before the first is loaded
        hub.resolve_source(located.locate(args.against).base)
    sides = _sides(args, args.against)
    if not (args.tasks or args.harness or args.against or args.records):
        return _held_out(args, sides[0].model, sets[0])
    results: dict[str, Any] = {
        "model": place.base,
        "adapter": place.adapter,
        "against": args.against,
    }
    records: list[dict[str, Any]] = []
    if sets:
        results["tasks"] = {}
    for data in sets:
        results["tasks"][f"{data.dataset}[{data.eval_split}]"] = _task_results(
            args, data, sides, records
        )
    if args.harness:
        results["harness"] = _harness(args, sides, records)
    _write(args, results, records)


def _collect_changes(args: EvalArgs) -> dict[str, Any]:
    """Returns the settings that the user changed from the run's."""
    asked = {
        "dataset": args.dataset,
        "eval_split": args.split,
        "eval_limit": args.limit,
        "chat": args.chat,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _data_sets(args: EvalArgs, run: Mapping[str, Any]) -> list[DataConfig]:
    """Returns the data sets to evaluate on, after opening each."""
    data = data_settings(run, _collect_changes(args))
    if config_from_dict(run).vision.reads_chats:  # opened with the model
        return [data]
    flag = "--dataset"
    if args.tasks:
        flag = "--tasks"
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.tasks and not names:
        raise NaloraError(
            flag, expected="names, separated by commas", found=repr(args.tasks)
        )
    with name_flags_of(flag):
        if args.dataset is not None and args.split is None:
            data = replace(data, eval_split=sources.split_to_measure(data))
        sets = [_task(name, args, data) for name in names] or [data]
        for dataset in sets:
            # fails before a model is loaded
            sources.open_held_out(dataset, dataset.eval_split).read([0])
    return sets


def _task(text: str, args: EvalArgs, like: DataConfig) -> DataConfig:
    """Returns the data set of one of ``--tasks``, with the other settings of ``like``.

    ``text`` is ``NAME`` or ``NAME[SPLIT]``, where ``[:100]`` is a part of the default split.
    """
    name, bracket, split = text.partition("[")
    limit = args.limit
    if limit is None:
        limit = like.eval_limit
    data = replace(like, dataset=name, eval_limit=limit)
    if bracket:
        chosen = split.removesuffix("]")
    else:
        chosen = args.split or sources.split_to_measure(data)
    if bracket and not chosen[:1].isalpha():
        chosen = f"{sources.split_to_measure(data)}[{chosen}]"
    return replace(data, eval_split=chosen, train_split=chosen)


def _sides(args: EvalArgs, against: str | None) -> list[Side]:
    """Returns the loaded model and, if there is one, the model to compare with.

    The second has the same base weights if ``against`` is an adapter of that base, or "base".
    """
    mesh = mesh_of(args.mesh)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "quantize": args.quantize or "run",
        "mesh": mesh,
    }
    model = adapted.load(args.model, adapter=args.adapter, **options)
    sides = [Side("", model, model.module, model.variables)]
    if against == "base":
        module = model.module.clone(adapters=targets.AdapterSpec())
        sides.append(Side(against, model, module, {"params": model.base.params}))
    elif against is not None:
        other = adapted.attach_adapter(model, against, mesh) or adapted.load(
            against, **options
        )
        sides.append(Side(against, other, other.module, other.variables))
    return sides


def _task_results(
    args: EvalArgs,
    data: DataConfig,
    sides: Sequence[Side],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """Prints and returns the metrics on a data set, with the comparison if there are two sides.

    It adds a record of each item to ``records``.
    """
    name = f"{data.dataset}[{data.eval_split}]"
    answers = []
    summaries = []
    for label, model, module, variables in sides:
        tokenizer = model.base.tokenizer
        if args.tasks or _collect_changes(args):
            items = questions.eval_examples(data, tokenizer, split=data.eval_split)
        else:  # the examples of the run's reported results
            items, _ = questions.held_out(sources.open_pair(data)[1], data, tokenizer)
        evaluator = text_evaluation.TextEvaluator(
            module, None, items, mesh=mesh_of(args.mesh)
        )
        answers.append(evaluator.records(variables["params"], variables.get("lora")))
        summaries.append(evaluator.summary(answers[-1]))
        print(
            f"{add_label(name, label)}: {metrics.describe(summaries[-1])}", flush=True
        )
        records += [{"task": name, "model": label, **record} for record in answers[-1]]
    if len(sides) == 1:
        return dict(summaries[0])
    compared = metrics.compare_records(*answers[::-1])
    print(f"{name}, difference: {metrics.describe_comparison(compared)}", flush=True)
    return dict(summaries[0]) | {"against": summaries[1], "comparison": compared}


def _harness(
    args: EvalArgs, sides: Sequence[Side], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Prints and returns the harness's results, with the comparison if there are two sides.

    It adds a record of each item to ``records``.
    """
    tasks = [name.strip() for name in args.harness.split(",") if name.strip()]
    options: dict[str, Any] = {
        "folder": args.harness_tasks,
        "limit": args.limit or 0,
        "shots": args.shots,
    }
    results = []
    for label, model, module, variables in sides:
        tokenizer = model.base.tokenizer
        mesh = mesh_of(args.mesh)
        wrapped = harness.harness_model(module, variables, tokenizer, mesh=mesh)
        results.append(
            harness.run_harness(wrapped, tasks, chat=bool(args.chat), **options)
        )
        for task, measured in results[-1]["results"].items():
            numbers = []
            for name, value in measured.items():
                # the harness's names are "METRIC,FILTER" and "METRIC_stderr,FILTER"
                metric, comma, _ = name.partition(",")
                if not comma or "stderr" in name:
                    continue
                if isinstance(value, int | float):
                    numbers.append(f"{metric} {value:.4f}")
            print(f"{add_label(task, label)}: {', '.join(numbers)}", flush=True)
        for task, rows in results[-1]["samples"].items():
            records += [{"task": task, "model": label, **row} for row in rows]
    summary = {name: results[0][name] for name in ("results", "versions")}
    if len(results) == 1:
        return summary
    samples, others = (result["samples"] for result in results)
    compared = {
        task: harness.compare_samples(others[task], rows)
        for task, rows in samples.items()
        if rows
    }
    for task, measured in compared.items():
        for metric, number in measured.items():
            test = f"95% interval {number['low']:+.4f} to {number['high']:+.4f}"
            if "p_value" in number:
                test += f", McNemar p = {number['p_value']:.2g}"
            difference = f"{metric} {number['difference']:+.4f} ({test})"
            print(f"{task}, difference: {difference}", flush=True)
    return summary | {"against": results[1]["results"], "comparison": compared}


# ---------------------------------------------------------------- the metric that a run reports


def _held_out(args: EvalArgs, model: adapted.AdaptedModel, data: DataConfig) -> None:
    """Prints the held-out metric as a run computes it."""
    run = replace(config_from_dict(model.located.run), data=data)
    kind = record.run_kind(run)
    if kind.compares_with_base:  # the data that the user named are texts
        kind = record.run_kind(RunConfig())
    with name_flags_of("--dataset"):
        named = bool(_collect_changes(args))
        evaluator = kind.evaluate(model, run, mesh_of(args.mesh), named)
    _report(args, model, data, evaluator)


def _images(args: EvalArgs) -> None:
    """Prints the held-out metric of a run on images, by default on the run's reported images."""
    if args.quantize not in (None, "none"):
        raise NaloraError(
            "--quantize",
            expected="none for image and text encoders",
            found=args.quantize,
        )
    model = adapted_dual.load_adapted_dual(
        args.model, adapter=args.adapter, dtype=args.dtype
    )
    data = data_settings(model.located.run, _collect_changes(args))
    run = replace(config_from_dict(model.located.run), data=data)
    evaluator = record.run_kind(run).evaluate(model, run, None, True)
    _report(args, model, data, evaluator)


def _compared_with_base(args: EvalArgs, run: RunConfig) -> None:
    """Prints the held-out metric of a run whose evaluation compares the adapter with the base."""
    for flag, value in (("--against", args.against), ("--records", args.records)):
        if value is not None:
            expected = "--tasks or --dataset with it"
            remedy = "the rewards of a run on pairs compare it with its base already"
            raise NaloraError(flag, expected=expected, found="neither", remedy=remedy)
    changed = replace(run.data, **_collect_changes(args))
    run = replace(run, data=changed)
    model = _sides(args, None)[0].model
    evaluator = record.run_kind(run).evaluate(model, run, mesh_of(args.mesh), True)
    _report(args, model, changed, evaluator)


def _report(
    args: EvalArgs,
    model: adapted.AdaptedModel | adapted_dual.AdaptedDual,
    data: DataConfig,
    evaluator: Any,
) -> None:
    """Prints the metric of a model by an evaluator, and writes it to ``--output`` if requested.

    ``data`` names the evaluated data in the text.
    """
    values = evaluator.measure(
        model.base.params, model.lora, samples=args.output is not None
    )
    print(f"{data.dataset}[{data.eval_split}]: {metrics.describe(values)}")
    origin = {
        "model": model.located.base,
        "adapter": model.located.adapter,
        "data": vars(data),
    }
    _write(args, origin | values, [])


def _write(
    args: EvalArgs, results: dict[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the files of ``--output`` and ``--records``, if the user requested them."""
    lines = [json.dumps(run_log.to_json(record)) + "\n" for record in records]
    contents = (
        (args.output, json.dumps(run_log.to_json(results), indent=2) + "\n"),
        (args.records, "".join(lines)),
    )
    for path, content in contents:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)


# ---------------------------------------------------------------- needle retrieval

_PER_CELL = 10


def _needle(args: EvalArgs) -> None:
    """Prints the accuracy by length and depth; of an adapter also its base's and the difference.

    The results of a run are also written to its ``needle.json``, and shown in its report.
    """
    lengths = _needle_lengths(args)
    place = located.locate(args.model, args.adapter)
    against = args.against or None
    if against is None and place.adapter is not None:
        against = "base"
    chat = args.chat
    if chat is None:
        chat = config_from_dict(place.run).data.chat
    sides = _sides(args, against)
    answers: list[list[dict[str, Any]]] = []
    summaries = []
    records = []
    for label, model, module, variables in sides:
        tokenizer = model.base.tokenizer
        items = needle.needle_items(
            tokenizer, lengths, per_cell=args.limit or _PER_CELL, chat=chat
        )
        generator = generate.Generator(
            module, variables, tokenizer, mesh=mesh_of(args.mesh)
        )
        answers.append(needle.needle_answers(generator, items))
        grid = needle.needle_summary(answers[-1])
        summaries.append(grid)
        interval = (
            f"95% interval {grid['low']:.3f} to {grid['high']:.3f}, n {grid['n']}"
        )
        title = add_label("needle retrieval", label)
        print(f"{title}: exact match {grid['accuracy']:.3f} ({interval})")
        print(tables.text_table(*sections.needle_cells(grid)), flush=True)
        records += [{"model": label, **record} for record in answers[-1]]
    grids: dict[str, Any] = {"before": summaries[-1]}  # of the side without the adapter
    if against is not None:
        compared = metrics.compare_records(*answers[::-1])["accuracy"]
        grids |= {"after": summaries[0], "comparison": compared}
        print(f"difference: {metrics.describe_paired(compared)}", flush=True)
    _write(
        args,
        {"model": place.base, "adapter": place.adapter, "against": against, **grids},
        records,
    )
    if against == "base" and place.run and place.adapter is not None:
        folder = place.adapter.parent
        write_atomically(
            folder / sections.NEEDLE_FILE,
            json.dumps(run_log.to_json(grids), indent=2) + "\n",
        )
        print(f"{html.write_report(folder)}: with these results")


def _needle_lengths(args: EvalArgs) -> list[int]:
    """Returns the different lengths of ``--needle``, ascending.

    Raises:
      NaloraError: a text is no length, or other data is named too.
    """
    others = {
        "--tasks": args.tasks,
        "--dataset": args.dataset,
        "--harness": args.harness,
    }
    for flag, value in others.items():
        if value:
            raise NaloraError("--needle", expected=f"--needle or {flag}", found="both")
    texts = [text.strip() for text in args.needle.split(",")]
    if not all(re.fullmatch(r"0*[1-9]\d{0,7}", text) for text in texts):
        raise NaloraError(
            "--needle",
            expected="lengths of 1 to 8 digits in tokens, separated by commas",
            found=repr(args.needle),
        )
    return sorted(set(map(int, texts)))
