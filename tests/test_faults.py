"""``python -m tests.faults``: its exit status, without a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faults

pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (["resumed, identical"] * 2, 0),
        (["resumed, identical", "resumed, DIFFERENT"], 1),
        (["FAILED to resume: error: no"] * 2, 1),
        (["REFUSED: 2: expected a checkpoint", "previous checkpoint restored, correct"], 1),
        (["status 143, SILENT, resumed, identical"] * 2, 1),
        (["the other ends within two minutes, non-zero, A TRACEBACK"] * 2, 1),
    ],
)
def test_an_outcome_that_should_not_be_is_the_exit_status(
    outcomes: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(place: object, rng: object) -> str:
        """a fault"""
        del place, rng
        return left.pop()

    left = list(outcomes)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n")
    monkeypatch.setattr(faults, "PAGE", page)
    monkeypatch.setattr(faults, "Place", lambda _: None)
    monkeypatch.setattr(faults, "FAULTS", ((fault, 1),))
    monkeypatch.setattr(sys, "argv", ["faults", "--times", "2"])
    assert faults.main() == status
    assert "| a fault | 2 | " in page.read_text()
    assert "old" not in page.read_text()
