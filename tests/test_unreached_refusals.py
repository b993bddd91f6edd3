"""`tests.refusals`: places of a small package, which of them are reached, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import refusals

TOY = """\
from nalora_jax.errors import NaloraError

class OtherError(NaloraError):
    pass

def check(value):
    if value > 1:
        raise NaloraError("value",
            expected="at most 1", found=value)
    if value < 0:
        raise OtherError("value", expected="at least 0", found=value)
"""


@pytest.fixture
def places(tmp_path: Path) -> list[refusals.Refusal]:
    (tmp_path / "toy.py").write_text(TOY)
    return refusals.read_refusals(tmp_path)


def test_places_are_calls_of_the_error_and_of_its_subclasses(
    places: list[refusals.Refusal],
) -> None:
    first, second = places
    assert str(first) == "toy.py: 'value': expected 'at most 1'"
    assert (first.first, first.last) == (8, 9)
    assert second.expected == "'at least 0'"


def test_a_place_that_no_test_reaches_needs_a_reason(
    places: list[refusals.Refusal], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = {("toy.py", 9)}
    (complaint,) = refusals.judge(places, reached)
    assert complaint.startswith("nalora_jax/toy.py:11: no test reaches it")
    monkeypatch.setitem(refusals.WITHOUT_A_TEST, str(places[1]), "needs another machine")
    assert refusals.judge(places, reached) == []
    monkeypatch.setitem(refusals.WITHOUT_A_TEST, "toy.py: gone", "old")
    (complaint,) = refusals.judge(places, reached)
    assert complaint == "WITHOUT_A_TEST: 0 places are called toy.py: gone"
