"""Runs tasks of EleutherAI's lm-evaluation-harness and compares two models item by item."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.harness import require_harness
from nalora_jax.evaluate.statistics import compare, paired_bootstrap


def run_harness(
    model: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int = 0,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs the harness's evaluation of its tasks.

    Args:
      model: from `nalora_jax.evaluate.harness.harness_model`.
      tasks: names of tasks or groups.
      folder: folder of additional task files (YAML).
      limit: maximum number of items per task; 0: all.
      shots: few-shot examples before each question; None: the task's default.
      chat: format prompts with the model's chat template.

    Returns:
      ``results`` (metrics by task, with the harness's names), ``versions`` of the tasks, and
      ``samples``: by task, one JSON-able record per item, with its ``doc_id`` and its value of
      every metric.

    Raises:
      NaloraError: lm-eval is not installed, a task is unknown, or its data is not available.
    """
    require_harness()
    from lm_eval import simple_evaluate

    manager = _manager(tasks, folder)
    try:
        results = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit or None,
            apply_chat_template=chat,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=manager,
        )
    except NaloraError:
        raise
    except Exception as error:
        if _through_this_package(error):
            raise
        raise NaloraError(
            f"--harness {','.join(tasks)}",
            expected="tasks that the harness can load and run",
            found=f"{type(error).__name__}: {error}",
            remedy="tasks come from the hub unless their YAML names local files; see docs/serving.md",
        ) from error
    assert results is not None, "the harness returns None on other processes only"
    samples = {task: [_record(sample) for sample in rows] for task, rows in results["samples"].items()}
    return {
        "results": _plain(results["results"]),
        "versions": _plain(results.get("versions", {})),
        "samples": samples,
    }


def _through_this_package(error: BaseException) -> bool:
    """Returns True if the harness had called the model when the error was raised.

    Other errors are of the harness, `datasets` and Jinja: of a task's YAML, data or templates.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("nalora_jax.") for name in modules[1:])  # the first is `run_harness`


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """Returns the harness's task registry; raises an error if it lacks any of ``tasks``."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise NaloraError(
            "--harness",
            expected="tasks of lm-evaluation-harness",
            found=", ".join(unknown),
            remedy="lm-eval ls tasks lists them; --harness-tasks names a folder of your own",
        )
    return manager


def compare_samples(
    other: Sequence[Mapping[str, Any]], model: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compares ``model`` with ``other`` on one task: ``model`` minus ``other`` by metric.

    Metrics that are 0 or 1 are compared by McNemar's test, others by a paired bootstrap.

    Args:
      other, model: ``samples`` of `run_harness` of the same task.

    Raises:
      NaloraError: the samples are not of the same items.
    """
    ids = [[(sample["doc_id"], sample.get("filter")) for sample in rows] for rows in (other, model)]
    if ids[0] != ids[1] or not model:
        items = "other items" if model else "no item"
        raise NaloraError("--against", expected="answers to the same items", found=items)
    differences: dict[str, Any] = {}
    for metric in model[0]["metrics"]:
        before, after = (
            np.array([row["metrics"].get(metric, np.nan) for row in rows]) for rows in (other, model)
        )
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            continue
        if set(np.unique([before, after])) <= {0.0, 1.0}:
            differences[metric] = asdict(compare(before, after))
        else:
            ones = np.ones_like(before)
            low, high = paired_bootstrap(before, ones, after, ones)
            differences[metric] = {
                "difference": float(after.mean() - before.mean()),
                "low": low,
                "high": high,
            }
    return differences


def _record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields and numeric metrics of one of the harness's samples."""
    metrics = {name: sample[name] for name in sample["metrics"]}
    numbers = {
        name: float(value) for name, value in metrics.items() if isinstance(value, int | float | np.number)
    }
    names = ("doc_id", "filter", "doc", "target", "arguments", "filtered_resps")
    return {**{name: _plain(sample[name]) for name in names if name in sample}, "metrics": numbers}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
