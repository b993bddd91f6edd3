"""Readers of lm-evaluation-harness's files: tasks in YAML, and settings of generation."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from nalora_jax.data.tokenizer import read_json
from nalora_jax.evaluate.harness import generation_settings, run_harness

GENERATION = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": True, "temperature": 0.7, "top_k": 5}
GENERATION |= {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
TASK = """\
task: fuzzed
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ITEMS = [{"question": f"Which is {n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]


def write_generation(folder: Path) -> None:
    (folder / "generation.json").write_text(json.dumps(GENERATION))


def use_generation(folder: Path) -> None:
    generation_settings(read_json(folder / "generation.json"))


def write_task(folder: Path) -> None:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "fuzzed.yaml").write_text(TASK.replace("items.jsonl", str(folder / "items.jsonl")))


def use_task(folder: Path) -> None:
    """Runs the task, without the index of the harness's own tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    only_here = partial(TaskManager, include_defaults=False)
    # The harness prints some settings to stdout, which has the outcomes of a campaign.
    with mock.patch("lm_eval.tasks.TaskManager", only_here), contextlib.redirect_stdout(sys.stderr):
        run_harness(_model(), ["fuzzed"], folder=folder)


def _model() -> Any:
    """A model of the harness's own class whose every answer is equally likely."""
    from lm_eval.api.model import LM

    class Even(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [(-1.0, False) for _ in requests]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return [-1.0 for _ in requests]

        def generate_until(self, requests: Any) -> list[str]:
            for request in requests:
                generation_settings(request.args[1])
            return ["" for _ in requests]

    return Even()
