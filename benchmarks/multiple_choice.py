"""Multiple-choice questions per second, against lm-evaluation-harness with transformers.

    python benchmarks/multiple_choice.py --task socialiqa --dtype bfloat16 --peer-python lmeval/bin/python
    python benchmarks/multiple_choice.py --search --peer-python lmeval/bin/python    # the harness's settings

Both libraries process the same requests (texts of contexts and choices) through the harness's
interface, `loglikelihood`, tokenization included, on SmolLM2-135M-Instruct. A process does so
--repeats + 1 times; the first time, which also compiles, is reported separately. In float32 both
must choose the same choices. The harness runs at its fastest setting for the dtype, found by
--search on the first task: batch size (its "auto" too) and attention.

--peer-python names a Python that has this package, lm-eval, transformers and torch; by default the
Python that runs this script.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import add_rounds, compare, fastest, peak_rss_mb, script, search, values
from machines import versions
from model_files import files
from tables import Row, at_least, compared, compared_runs, requirements

TITLE = "Evaluation against lm-eval with transformers"
SHORT = "Evaluation, lm-eval"
# The harness's settings: batch size, attention.
SETTINGS = {
    **{f"batch {size}": (size, "sdpa") for size in (1, 8, 16, 32, "auto")},
    **{f"batch {size} eager": (size, "eager") for size in (8, 16)},
}


def write_requests(path: Path, task: str, count: int) -> None:
    """Writes contexts, choices and correct choices of ``count`` held-out questions."""
    from nalora_jax.config import DataConfig
    from nalora_jax.data.questions import eval_examples
    from nalora_jax.weights.base import load_model

    tokenizer = load_model(files("float32")["model"], dtype="float32").tokenizer
    items = eval_examples(DataConfig(dataset=task, chat=False), tokenizer, split="validation", limit=count)
    path.write_text(
        json.dumps([[item.prompt, [f" {c.strip()}" for c in item.choices], item.gold] for item in items])
    )


def answers_ours(options: argparse.Namespace) -> Any:
    """Returns a function from requests to their log-likelihoods."""
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.evaluate.harness import Requests
    from nalora_jax.train.adapted import load

    adapted = load(options.model, dtype=options.dtype)
    return Requests(Generator(adapted.module, adapted.variables, adapted.base.tokenizer)).loglikelihood


def answers_theirs(options: argparse.Namespace) -> Any:
    """Returns the same function for lm-eval's transformers model."""
    from lm_eval.models.huggingface import HFLM

    size, attention = SETTINGS[options.setting]
    model = HFLM(
        pretrained=options.model,
        dtype=options.dtype,
        device="cpu",
        batch_size=size,
        backend="causal",
        attn_implementation=attention,
    )
    return lambda requests: model.loglikelihood(requests, disable_tqdm=True)


def one(options: argparse.Namespace) -> None:
    """Runs the measured process."""
    questions = json.loads(options.requests.read_text())
    requests = [
        SimpleNamespace(args=(context, choice), idx=i, doc=None, request_type="loglikelihood", repeats=1)
        for i, (context, choices, _) in enumerate(questions)
        for choice in choices
    ]
    answer = (answers_ours if options.one == "nalora_jax" else answers_theirs)(options)
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        scores = answer(requests)
        seconds.append(time.perf_counter() - start)
    by_question = groupby(zip(requests, scores, strict=True), key=lambda pair: pair[0].idx)
    chosen = [max(enumerate(pairs), key=lambda item: item[1][1][0])[0] for _, pairs in by_question]
    record = {
        "first_seconds": seconds[0],
        "items_per_second": [len(questions) / s for s in seconds[1:]],
        "chosen": chosen,
        "accuracy": sum(a == gold for a, (_, _, gold) in zip(chosen, questions, strict=True))
        / len(questions),
        "peak_rss_mb": peak_rss_mb(),
    } | ({"versions": versions()} if options.one == "lm_eval" else {})
    print(json.dumps(record))


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns the speed after compilation, which has a requirement, and the first pass."""
    found_rows = []
    for case, result in record["cases"].items():
        runs = result["runs"]
        found_rows.append(
            compared_runs(f"items/s, {case}", runs, "lm_eval", "items_per_second", at_least(2.0), digits=1)
        )
        count = len(runs["nalora_jax"][0]["chosen"])
        pair = [
            [count / s for s in values(runs[name], "first_seconds")] for name in ("nalora_jax", "lm_eval")
        ]
        found_rows.append(
            compared(f"items/s of the first pass, compilation included, {case}", *pair, None, digits=1)
        )
    return found_rows


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="lm-eval")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="socialiqa")
    parser.add_argument("--count", type=int, default=200, help="questions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--setting", choices=tuple(SETTINGS), help="of the harness (default: its fastest)")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--search", action="store_true", help="compare the harness's settings")
    parser.add_argument(
        "--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS), help="of --search"
    )
    parser.add_argument("--one", choices=("nalora_jax", "lm_eval"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=Path, help=argparse.SUPPRESS)
    add_rounds(parser, 2)
    options = parser.parse_args()
    options.setting = options.setting or fastest("multiple_choice", options.dtype, "batch 16")
    if options.one:
        one(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder) / "requests.json")


def measure(options: argparse.Namespace, requests: Path) -> None:
    """Runs all processes of one case."""
    write_requests(requests, options.task, options.count)
    work = ["--dtype", options.dtype, "--repeats", options.repeats, "--requests", requests]
    work += ["--model", files(options.dtype)["model"]]

    def peer(setting: str) -> list[str]:
        arguments = ["--one", "lm_eval", "--setting", setting, *work]
        return script("multiple_choice.py", *arguments, python=options.peer_python)

    if options.search:
        commands = {setting: peer(setting) for setting in options.settings}
        search("multiple_choice", options.dtype, commands, "items_per_second", options)
        return
    commands = {
        "nalora_jax": script("multiple_choice.py", "--one", "nalora_jax", *work),
        "lm_eval": peer(options.setting),
    }
    case = f"{options.task}, {options.dtype}"
    record = compare("multiple_choice", case, commands, options)
    print(table(record))
    runs = record["cases"][case]["runs"]
    same = sum(a == b for a, b in zip(*(runs[name][-1]["chosen"] for name in commands), strict=True))
    print(f"equal answers: {same} of {options.count}; accuracy {runs['nalora_jax'][-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main()
