"""`nalora eval` on tasks by name, with records and against another model, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from nalora_jax.__main__ import main
from nalora_jax.config import LoRARule
from nalora_jax.data.questions import eval_examples
from nalora_jax.evaluate.evaluator import compare_records
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.loading.adapted import load
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, two adapters, questions with choices, and completions."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.make_model(folder / "model")
    tiny.make_questions(folder / "choices.jsonl", 40)
    rows = [
        {"prompt": f"{a} b", "completion": f" {c} x"}
        for a, c in zip("cdefgh", "ijklmn", strict=True)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, rule in enumerate((LoRARule("ffn/", 2), LoRARule("q_proj", 4))):
        tiny.make_adapter(folder / f"adapter{number}", folder / "model", [rule], 0.4, seed=number)
    return folder


def evaluate(place, capsys, model, tasks, *flags):
    """Lines that were printed, numbers by task and records that were written."""
    output, records = place / "out.json", place / "records.jsonl"
    for file in (output, records):
        file.unlink(missing_ok=True)
    written = ["--output", str(output), "--records", str(records)]
    assert (
        main(["eval", str(place / model), "--tasks", tasks, "--dtype", "float32", *written, *flags])
        == 0
    )
    lines, numbers = capsys.readouterr().out.splitlines(), json.loads(output.read_text())["tasks"]
    return lines, numbers, [*map(json.loads, records.read_text().splitlines())]


def test_several_tasks_are_measured_as_each_alone_and_every_item_is_written(place, capsys):
    tasks = f"{place}/choices.jsonl[:30],{place}/texts.jsonl"
    lines, numbers, records = evaluate(place, capsys, "adapter0", tasks, "--limit", "20")
    model = load(place / "adapter0", dtype="float32")
    places = [(f"{place}/choices.jsonl", "train[:30]", 20), (f"{place}/texts.jsonl", "train", 6)]
    assert len(lines) == len(numbers) == len(places)
    for line, (dataset, split, count) in zip(lines, places, strict=True):
        task = f"{dataset}[{split}]"
        assert line.startswith(f"{task}: ")
        config = replace(
            tiny.make_config(place).data, dataset=dataset, train_split=split, eval_limit=20
        )
        items = eval_examples(config, model.base.tokenizer, split=split)
        alone = TextEvaluator(model.module, None, items).measure(model.base.params, model.lora)
        assert numbers[task] == pytest.approx(
            {name: alone[name] for name in numbers[task]}, rel=1e-6
        )
        mine = [record for record in records if record["task"] == task]
        assert [record["item"] for record in mine] == list(range(count))
        assert [record["prompt"] for record in mine] == [item.prompt for item in items]
        total, tokens = (sum(record[key] for record in mine) for key in ("loss", "tokens"))
        assert total / tokens == pytest.approx(numbers[task]["loss"], rel=1e-6)


def test_two_models_are_compared_item_by_item(place, capsys):
    tasks = f"{place}/choices.jsonl"
    for other, model in (("base", "model"), (str(place / "adapter1"), "adapter1")):
        flags = ["--against", other, "--limit", "0"]
        lines, numbers, records = evaluate(place, capsys, "adapter0", tasks, *flags)
        (task,) = numbers.values()
        right = np.array(
            [[r["correct"] for r in records if r["model"] == label] for label in ("", other)]
        )
        gained, lost = int(np.sum(right[0] & ~right[1])), int(np.sum(~right[0] & right[1]))
        paired = task["comparison"]["accuracy"]
        assert (paired["gained"], paired["lost"], paired["n"]) == (gained, lost, 40)
        assert gained + lost > 0
        difference = task["loss"] - task["against"]["loss"]
        assert task["comparison"]["loss"]["difference"] == pytest.approx(difference)
        assert "McNemar p" in lines[2]
        assert [task["against"]] == [*evaluate(place, capsys, model, tasks, *flags[2:])[1].values()]


def test_the_interval_of_a_difference_in_loss_is_scipys():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 150)
    losses = tokens * rng.exponential(2.0, 150)
    others = losses + tokens * rng.normal(0.1, 0.5, 150)
    answers = [
        [
            {"prompt": "", "loss": loss, "tokens": int(count)}
            for loss, count in zip(sums, tokens, strict=True)
        ]
        for sums in (losses, others)
    ]
    interval = compare_records(*answers)["loss"]

    def statistic(first, second, count, axis):
        return (second.sum(axis) - first.sum(axis)) / count.sum(axis)

    options = {"paired": True, "n_resamples": 10_000, "method": "percentile", "rng": 1}
    theirs = stats.bootstrap((losses, others, tokens), statistic, **options).confidence_interval
    np.testing.assert_allclose((interval["low"], interval["high"]), theirs, atol=0.01)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tasks socialiq", "--tasks: expected a task of this library"),
        ("--tasks ,", "--tasks: expected names, separated by commas"),
        ("--tasks a --dataset b", "--tasks: expected --dataset or --tasks, found both"),
        (f"--needle {'9' * 5000}", "--needle: expected lengths of 1 to 8 digits"),
        ("--needle 100 --tasks a", "--needle: expected --needle or --tasks, found both"),
        ("--records {place}/texts.jsonl", "--records: expected a new file"),
        ("--output {place}/texts.jsonl", "--output: expected a new file"),
        ("--tasks {place}/choices.jsonl --against nowhere", "nowhere"),
    ],
    ids=range(8),
)
def test_bad_requests_are_one_line(place, capsys, flags, said):
    assert main(["eval", str(place / "model"), *flags.format(place=place).split()]) == 2
    assert said in capsys.readouterr().err
