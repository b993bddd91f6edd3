"""How far long work has come: said to whoever shows it, else in the log, and there not too often."""

from __future__ import annotations

import json
import logging

import pytest

from nalora_jax.common import notes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(notes.time, "monotonic", lambda: now[0])
    return now


def test_without_a_listener_long_work_is_a_line_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), notes.counting("tokenizing", 2000) as done:
        for _ in range(20):
            clock[0] += 1.5
            done(100)
    assert caplog.messages == ["tokenizing 700/2,000", "tokenizing 1,400/2,000"]


def test_a_listener_hears_everything_from_the_start() -> None:
    heard = []
    with notes.listening(lambda *given: heard.append(given)), notes.counting("evaluating", 3) as done:
        done(1)
        done(2)
    assert heard == [("evaluating", 0, 3), ("evaluating", 1, 3), ("evaluating", 3, 3)]


@pytest.mark.parametrize(
    "form",
    [
        "text",
    ],
)
def test_a_note_is_bounded_whatever_it_quotes(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notes.LOG_FORMAT, form)
    logger = logging.Logger("of this test")
    logger.addHandler(notes.StderrHandler())
    logger.info("the field %r of %s is not read", "\N{SNOWMAN}" * 20_000, "a.jsonl")
    line = capsys.readouterr().err.rstrip("\n")
    line = json.loads(line)["message"] if form == "json" else line
    assert len(line.encode()) <= 2000
    assert line.startswith("the field '\N{SNOWMAN}")
    assert line.endswith(" of a.jsonl is not read")
