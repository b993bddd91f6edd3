"""`nalora eval` on tasks by name, with records, against another model, and in the harness, on a tiny model."""

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
from nalora_jax.evaluate.text import TextEvaluator
from nalora_jax.train.adapted import load
from tests import tiny

F32 = ["--dtype", "float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, two adapters, questions with choices, and completions."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.make_model(folder / "model")
    tiny.make_questions(folder / "choices.jsonl", 40)
    rows = [{"prompt": f"{a} b", "completion": f" {c} x"} for a, c in zip("cdefgh", "ijklmn", strict=True)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, rule in enumerate((LoRARule("ffn/", 2), LoRARule("q_proj", 4))):
        tiny.make_adapter(folder / f"adapter{number}", folder / "model", [rule], 0.4, seed=number)
    return folder


def evaluate(place, capsys, *flags):
    """Lines that were printed, numbers and records that were written."""
    output, records = place / "out.json", place / "records.jsonl"
    for file in (output, records):
        file.unlink(missing_ok=True)
    flags = [str(flag) for flag in flags]
    assert main(["eval", *flags, *F32, "--output", str(output), "--records", str(records)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(output.read_text()), [*map(json.loads, records.read_text().splitlines())]


def test_several_tasks_are_measured_as_each_alone_and_every_item_is_written(place, capsys):
    tasks = f"{place}/choices.jsonl[:30],{place}/texts.jsonl"
    lines, found, records = evaluate(place, capsys, place / "adapter0", "--tasks", tasks, "--limit", "20")
    model = load(place / "adapter0", dtype="float32")
    assert [line.partition(": ")[0] for line in lines] == [
        f"{place}/choices.jsonl[train[:30]]",
        f"{place}/texts.jsonl[train]",
    ]
    tokenizer, data = model.base.tokenizer, tiny.make_config(place).data
    for (name, numbers), split, count in zip(
        found["tasks"].items(), ("train[:30]", "train"), (20, 6), strict=True
    ):
        config = replace(data, dataset=name.partition("[")[0], train_split=split, eval_limit=20)
        items = eval_examples(config, tokenizer, split=split)
        alone = TextEvaluator(model.module, None, items).measure(model.base.params, model.lora)
        assert {key: pytest.approx(value, rel=1e-6) for key, value in numbers.items()} == {
            key: value for key, value in alone.items() if key in numbers
        }
        mine = [record for record in records if record["task"] == name]
        assert [record["item"] for record in mine] == list(range(count))
        assert [record["prompt"] for record in mine] == [item.prompt for item in items]
        total, tokens = (sum(record[key] for record in mine) for key in ("loss", "tokens"))
        assert total / tokens == pytest.approx(numbers["loss"], rel=1e-6)
    chosen = [record for record in records if "choices" in record]
    assert (
        np.mean([record["correct"] for record in chosen])
        == found["tasks"][f"{place}/choices.jsonl[train[:30]]"]["accuracy"]
    )
    for record in chosen:
        assert record["answer"] == int(np.argmax(record["log_probs"]))  # all choices have one character
        assert record["loss"] == pytest.approx(-record["log_probs"][record["gold"]])


@pytest.mark.parametrize("against", ["base", "adapter1"])
def test_two_models_are_compared_item_by_item(place, capsys, against):
    other = against if against == "base" else str(place / against)
    flags = [place / "adapter0", "--tasks", f"{place}/choices.jsonl", "--against", other, "--limit", "0"]
    lines, found, records = evaluate(place, capsys, *flags)
    (task,) = found["tasks"].values()
    sides = [[r for r in records if r["model"] == label] for label in ("", other)]
    right = np.array([[record["correct"] for record in side] for side in sides])
    gained, lost = int(np.sum(right[0] & ~right[1])), int(np.sum(~right[0] & right[1]))
    paired = task["comparison"]["accuracy"]
    assert (paired["gained"], paired["lost"], paired["n"]) == (gained, lost, 40)
    assert gained + lost > 0
    assert paired["p_value"] == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue)
    assert task["comparison"]["loss"]["difference"] == pytest.approx(task["loss"] - task["against"]["loss"])
    other_model = place / ("model" if against == "base" else against)
    alone = evaluate(place, capsys, other_model, *flags[1:3], "--limit", "0")
    (same,) = alone[1]["tasks"].values()
    assert task["against"] == same
    assert "McNemar p" in lines[2]


def test_the_interval_of_a_difference_in_loss_is_scipys():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 150)
    losses = tokens * rng.exponential(2.0, 150)
    others = losses + tokens * rng.normal(0.1, 0.5, 150)

    def answers(sums):
        rows = enumerate(zip(sums, tokens, strict=True))
        return [{"prompt": str(i), "loss": s, "tokens": int(t)} for i, (s, t) in rows]

    found = compare_records(answers(losses), answers(others))["loss"]

    def statistic(first, second, count, axis):
        return (second.sum(axis) - first.sum(axis)) / count.sum(axis)

    theirs = stats.bootstrap(
        (losses, others, tokens), statistic, paired=True, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    assert found["difference"] == pytest.approx(others.sum() / tokens.sum() - losses.sum() / tokens.sum())
    np.testing.assert_allclose((found["low"], found["high"]), theirs, atol=0.01)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tasks socialiq", "--tasks: expected a task of this library"),
        ("--tasks ,", "--tasks: expected names, separated by commas"),
        ("--tasks a --dataset b", "--tasks: expected --dataset or --tasks, found both"),
        (f"--needle {'9' * 5000}", "--needle: expected lengths of 1 to 8 digits"),
        ("--records {place}/texts.jsonl", "--records: expected a new file"),
        ("--tasks {place}/choices.jsonl --against nowhere", "nowhere"),
    ],
    ids=range(6),
)
def test_bad_requests_are_one_line(place, capsys, flags, said):
    assert main(["eval", str(place / "model"), *flags.format(place=place).split()]) == 2
    assert said in capsys.readouterr().err
