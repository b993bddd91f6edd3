"""Logs that somebody edited: the line and the field are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nalora_jax.common.digests import seal
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import read_evaluation, read_metrics
from nalora_jax.report.history import read_history

EVAL = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "loss": 3.0, "n": 10}
PAIRED = {
    "low": -0.1,
    "high": 0.2,
    "gained": 3,
    "lost": 1,
    "p_value": 0.3,
    "difference": 0.1,
    "n": 10,
}
HISTOGRAM = {"edges": [0.5, 1, 2], "counts": [[0, 3, 1, 0]]}
RUN = {"run": {"steps": 10}, "versions": {"jax": "1"}, "device": "cpu"}
DEEP = json.loads('{"a":' * 50 + "1" + "}" * 50)
BAD = [
    ({"run": []}, "run: expected a JSON object"),
    ({"run": {"steps": "ten"}}, "run: steps: expected a count"),
    ({"run": DEEP}, "nested too deeply"),
    ({"step": "five"}, "step: expected a count"),
    ({"step": 1, "loss": "low"}, "loss: expected a finite number"),
    ({"step": 1, "layers": {"limit": [[1], [1, 2]]}}, "limit: expected rows of one length"),
    ({"step": 1, "histograms": {"m": HISTOGRAM | {"edges": [2, 1]}}}, "edges: expected rising"),
    ({"step": 1, "histograms": {"m": HISTOGRAM | {"edges": [1, 2]}}}, "expected rows of 3"),
    ({"step": 1, "layers": {"limit": [0.1] * 513}}, "limit: expected a list .* at most 512"),
    ({"step": 1, "towers": {"image": 500, "text": 13}}, "towers: expected at most 512"),
    ({"resumed": {}}, "resumed: step: expected a count"),
    ({"eval": {"loss": 1.0}}, "expected the step of the evaluation"),
    ({"step": 1, "eval": {"samples": [{"answer": "b"}]}}, "samples: expected a list of prompts"),
    ({"step": 1, "eval": {"paired": {**PAIRED, "low": None}}}, "low: expected a number"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_field_of_the_wrong_kind_is_named_with_its_line(tmp_path, record, message) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(RUN) + "\n\n" + (json.dumps(record) + "\n"))
    for read in (lambda: read_metrics(path), lambda: read_history(tmp_path)):
        with pytest.raises(NaloraError, match=f"line 3.*{message}"):
            read()


def test_layers_keep_their_shape_and_lines_of_a_later_version_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        RUN,
        {"of a later version": ["anything"]},
        {"step": 1, "layers": {"limit": [0.1, None]}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path).steps
    text = path.read_text()
    for layers in (
        {"limit": [0.1]},
        {"limit": [[0.1, 0.2], [0.1, 0.2]]},
        {"feature": [0.1, 0.2, 0.3]},
    ):
        path.write_text(text + json.dumps({"step": 2, "layers": layers}) + "\n")
        with pytest.raises(NaloraError, match="layers.*expected"):
            read_history(tmp_path)


def test_an_evaluation_of_its_own_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    text = json.dumps(seal(EVAL | {"questions": {"all": "1f0a"}}))
    path.write_text(text)
    assert read_evaluation(path) == EVAL | {"questions": {"all": "1f0a"}}
    message = r"before\.json: expected the content that its sha256 was"
    for damaged, said in (
        (text.replace("0.4", "0.5", 1), message),
        *((part, r"before\.json") for part in ("", "[]", '{"loss": "low"}', '{"right": 3}')),
    ):
        path.write_text(damaged)
        with pytest.raises(NaloraError, match=said):
            read_evaluation(path)
