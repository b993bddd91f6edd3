"""What a run on images adds to the page."""

from __future__ import annotations

from nalora_jax.report.history import history_of
from nalora_jax.report.html import render
from nalora_jax.report.sections import confusions, picture

PICTURE = "data:image/png;base64,iVBORw0KGgo="
EVAL = {
    "accuracy": 0.5,
    "low": 0.1,
    "high": 0.9,
    "loss": 1.0,
    "n": 4,
    "classes": ["cat", "<dog>"],
    "confusion": [[2, 0], [2, 0]],
    "samples": [
        {"prompt": "a.png", "image": PICTURE, "answer": "cat", "expected": "<dog>", "correct": False}
    ],
}
RECORDS = [
    {"run": {"steps": 2, "output": "runs/x", "vision": {"task": "classify"}}, "versions": {}, "device": ""},
    {"step": 0, "initial": True, "eval": EVAL},
    {
        "step": 2,
        "loss": 1.0,
        "layers": {"misalignment": [0.1, 0.2, 0.3]},
        "towers": {"image": 2, "text": 1},
    },
    {"step": 2, "final": True, "eval": EVAL | {"confusion": [[2, 0], [0, 2]], "accuracy": 1.0}},
]


def test_pictures_confusion_and_towers_are_on_the_page() -> None:
    history = history_of(RECORDS)
    page = render(history, has_adapter=True)
    assert page.count(f'src="{PICTURE}"') == 1
    assert "nalora eval runs/x" in page
    assert "nalora generate" not in page
    assert "&lt;dog&gt;" in page
    assert "<dog>" not in page
    assert "text 0" in page
    before, after = confusions(history)
    assert before[1]["rows"] == [("cat", [2, 0]), ("<dog>", [2, 0])]
    assert after[0] == "after"
    assert page.index("before: rows") < page.index("after: rows")


def test_nothing_but_a_picture_comes_from_a_log() -> None:
    assert picture({"image": PICTURE}) == PICTURE
    for found in ("https://example.org/a.png", "data:text/html;base64,AA==", 3, None):
        assert picture({"image": found}) == ""
