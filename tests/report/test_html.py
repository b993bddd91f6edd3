"""report.html: what it says, that it loads nothing, and that it holds for any log; also of runs on
images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.config import LoRAConfig, LoRARule, PreferenceConfig, RLConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.report.compare import render_comparison
from nalora_jax.report.drawing import smooth
from nalora_jax.report.history import history_of, read_history
from nalora_jax.report.html import render, write_report
from nalora_jax.report.sections import confusions, picture, read_rollouts
from tests.report.conftest import words_of


def page_of(folder):
    return words_of(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(fake_run):
    return write_report(fake_run).read_text(encoding="utf-8")


def test_the_page_says_what_the_run_did(text):
    words = words_of(text)
    for said in (
        "smollm2-135m-instruct on socialiqa",
        "before 0.401 95%: 0.353 to 0.449 after 0.523 95%: 0.474 to 0.572",
        "+0.122, better; the intervals do not overlap. Measured on 400 held-out items.",
        "Held-out loss 5.100 → 3.310",
        "Wall time 5:20 preparing 0:20, training 5:00",
        "Peak memory 1.2 GB of the process",
        "200,000 tokens",
        "expected grateful before angry at Kai ✗ wrong after grateful ✓ right",
        "jax 0.10.2",
        "device 2 x cpu",
    ):
        assert said in words


def test_the_page_is_small_and_loads_nothing(text):
    assert len(text) < 1_500_000
    assert not re.search(r"<(script|link|iframe|img|object|form)\b", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert """http-equiv="Content-Security-Policy" content="default-src 'none'""" in text
    assert not re.search(r"url\((?!#)|@import", text)


def test_text_from_the_log_is_escaped(make_run):
    attack = "<script>alert(1)</script>\"'&{{ 7919 * 7919 }}"
    sample = {"prompt": attack, "answer": attack, "expected": attack, "correct": False}
    records = [
        {"step": 0, "eval": {"accuracy": 0.5, "samples": [sample]}},
        {"done": {"message": attack}},
    ]
    config = RunConfig(model=attack, output=attack, lora=LoRAConfig(rules=(LoRARule(attack),)))
    folder = make_run(records, config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    text = write_report(folder).read_text(encoding="utf-8")
    words = words_of(text)
    assert "<script" not in text
    assert "62710561" not in words
    assert words.count("<script>alert(1)</script>") >= 7


def around(accuracy):
    """An evaluation with an interval of 0.1 on either side."""
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (around(0.5), around(0.45), "-0.050, worse"),
        (around(0.5), around(0.65), "intervals overlap"),
        (around(0.5), around(0.75), "intervals do not overlap"),
        ({"loss": 3.0}, {"loss": 2.5}, "-0.500, better."),
    ],
)
def test_the_verdict_is_honest(make_run, before, after, said):
    assert said in page_of(make_run([{"step": 0, "eval": before}, {"step": 9, "eval": after}]))


def of(step, loss, n=None, **kind):
    return {"step": step, "eval": {"loss": loss} | ({"n": n} if n else {}), **kind}


def test_an_adapter_exported_before_mechanisms_act_is_called_plain_lora(make_run):
    records = [of(0, 5.0, initial=True), of(9, 3.0), of(9, 2.0, final=True)]
    folder = make_run(records, mechanisms_from=10)
    assert "It is plain LoRA: mechanisms act from step 10." in page_of(folder)
    comparison = render_comparison([read_history(folder)])
    assert "the adapter of step 9 was exported, and mechanisms act from step 10" in comparison
    assert '<td data-head="exported step">9</td>' in comparison
    (folder / "metrics.jsonl").unlink()
    assert "plain LoRA" not in page_of(make_run(records, mechanisms_from=9))


def test_a_folder_without_a_run_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(NaloraError, match=r"metrics\.jsonl: expected the log of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").write_text('{"something": 1}\n')
    with pytest.raises(NaloraError, match="expected the lines of a run, found none"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("initial", "along", "final", "ends"),
    [
        (0, [0, 5, 10], 5, ["initial", "final"]),  # both on the reported examples
        # a run that has just begun
        (0, [0, 5, 10], None, [0, 10]),  # not finished: the examples that select the checkpoint
        (None, [0, 5], 5, [0, "final"]),  # a log without the base's evaluation
        (None, [], 5, ["final"]),
        (None, [], None, []),
    ],
)
def test_the_ends_of_a_run_are_its_reported_evaluations_or_the_first_and_last(
    initial, along, final, ends
):
    def at(step, **kind):
        return {"step": step, **kind, "eval": {"loss": float(step)}}

    records = [at(step) for step in along]
    records += [at(0, initial=True)] if initial == 0 else []
    records += [at(final, final=True)] if final else []
    kinds = [
        next((k for k in ("initial", "final") if k in r), r["step"])
        for r in history_of(records).ends
    ]
    assert kinds == ends


PICTURE = "data:image/png;base64,iVBORw0KGgo="
SAMPLE = {
    "prompt": "a.png",
    "image": PICTURE,
    "answer": "cat",
    "expected": "<dog>",
    "correct": False,
}
EVAL = {"accuracy": 0.5, "low": 0.1, "high": 0.9, "loss": 1.0, "n": 4, "samples": [SAMPLE]}
EVAL |= {"classes": ["cat", "<dog>"], "confusion": [[2, 0], [2, 0]]}
RECORDS = [
    {
        "run": {"steps": 2, "output": "runs/x", "vision": {"task": "classify"}},
        "versions": {},
        "device": "",
    },
    {"step": 0, "initial": True, "eval": EVAL},
    {"step": 2, "layers": {"misalignment": [0.1, 0.2, 0.3]}, "towers": {"image": 2, "text": 1}},
    {"step": 2, "final": True, "eval": EVAL | {"confusion": [[2, 0], [0, 2]], "accuracy": 1.0}},
]


def test_pictures_confusion_and_towers_are_on_the_page_and_no_other_address() -> None:
    history = history_of(RECORDS)
    page = render(history, has_adapter=True)
    assert page.count(f'src="{PICTURE}"') == 1
    assert all(said in page for said in ("nalora eval runs/x", "&lt;dog&gt;", "text 0"))
    assert not any(said in page for said in ("nalora generate", "<dog>"))
    before, after = confusions(history)
    assert before == (
        "before",
        {"classes": EVAL["classes"], "rows": [("cat", [2, 0]), ("<dog>", [2, 0])]},
    )
    assert after[0] == "after"
    for found in ("https://example.org/a.png", "data:text/html;base64,AA==", 3, None):
        assert picture({"image": found}) == ""


def test_smooth_is_the_mean_of_the_last_values():
    values = np.random.default_rng(0).standard_normal(20)
    values[[2, 11]] = np.nan
    expected = [np.nanmean(values[max(0, i - 2) : i + 1]) for i in range(20)]
    np.testing.assert_allclose(smooth(values, 3), expected, rtol=1e-12, atol=1e-12)


def test_the_final_metrics_are_those_of_the_exported_adapter(make_run):
    """The evaluation of the result, not the last or the best one during training."""
    records = [of(0, 5.0, initial=True), of(0, 5.5), of(5, 2.0), of(10, 3.0)]
    page = page_of(make_run([*records, of(5, 2.5, n=77, final=True)]))
    assert "before 5.000 after 2.500 " in page
    assert "-2.500, better. Measured on 77 held-out items." in page
    assert "Held-out loss 5.000 → 2.500 before → after, lower is better" in page
    assert "After: the adapter of step 5, which was exported." in page


LOG_STEPS = [{"step": step, "loss": 0.01 * step} for step in (1, 2)]


def test_the_loss_of_a_run_with_rewards_is_called_a_policy_loss(make_run):
    config = RunConfig(rl=RLConfig(rewards=("number",)))
    steps = [record | {"reward": 0.5} for record in LOG_STEPS]
    folder = make_run(steps, config)
    page = page_of(folder)
    assert "Policy loss" in page
    assert "Mean negative log-likelihood per loss token" not in page
    comparison = words_of(render_comparison([read_history(folder)]))
    assert "Policy loss" in comparison
    assert "Training loss" not in comparison


@pytest.mark.parametrize(
    ("config", "metrics", "title"),
    [
        (RunConfig(), {}, "Training loss"),
        (
            RunConfig(preference=PreferenceConfig(loss="dpo")),
            {"rewards_margin": 0.1},
            "Preference loss",
        ),
    ],
)
def test_a_loss_has_the_name_of_its_objective(make_run, config, metrics, title):
    steps = [record | metrics for record in LOG_STEPS]
    titles = re.findall(r"(\w+ loss) ", page_of(make_run(steps, config)))
    assert title in titles
    assert len({"Training loss", "Preference loss", "Policy loss"} & set(titles)) == 1


def group(step, values):
    samples = [
        {"completion": f"<{v}>", "rewards": {"number": v, "format": None}, "advantage": v - 0.5}
        for v in values
    ]
    return {"step": step, "prompt": "2 + 2?", "samples": samples}


def test_groups_of_samples_are_shown_side_by_side_with_their_advantages(make_run):
    folder = make_run(LOG_STEPS)
    earlier = {"step": 1, "prompt": "1 + 1?", "completion": "2", "rewards": {"number": 1.0}}
    lines = [json.dumps(earlier), json.dumps(group(2, [0.25, 1.0]))]
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(folder)
    assert (
        "Step 2 2 + 2? sample <0.25> number 0.25 format none advantage -0.250 "
        "sample <1.0> number 1 format none advantage +0.500"
    ) in page
    assert "Step 1 1 + 1? sample 2 number 1 Step 2" in page
    assert "could not be read" not in page


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"step": 1}',
        b"\xff",
        b'{"step": Infinity, "prompt": "", "samples": []}',
        b'{"step": 1, "prompt": "", "samples": [{"completion": "", "rewards": {"r": "x"}}]}',
        b'{"step": 1, "prompt": "", "samples": 3}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_of_samples_is_left_out_with_a_note(make_run, line):
    folder = make_run(LOG_STEPS)
    lines = [json.dumps(group(1, [0.0])).encode(), line, json.dumps(group(2, [1.0])).encode()]
    (folder / "rollouts.jsonl").write_bytes(b"\n".join(lines))
    page = page_of(folder)
    assert "Lines of the file that could not be read and are left out: 1." in page
    assert all(shown in page for shown in ("<0.0>", "<1.0>"))


def test_rollouts_that_cannot_be_read_are_an_error_with_advice(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "rollouts.jsonl").touch()
    monkeypatch.setattr(Path, "read_bytes", fail)
    message = "rollouts.jsonl: expected samples by step, found .*Permission denied.*; delete it: "
    with pytest.raises(NaloraError, match=message):
        read_rollouts(tmp_path)
