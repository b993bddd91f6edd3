"""A short run of the fuzzers: damaged files are read or refused in words. ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz.campaign import outcomes
from tests.fuzz.mutate import damaged
from tests.fuzz.parsers import PARSERS, Parser

pytestmark = pytest.mark.pictures  # of runs' reports

INPUTS = 60


CASES = [
    pytest.param(each, marks=getattr(pytest.mark, each.needs) if each.needs else ()) for each in PARSERS
]


@pytest.mark.parametrize("parser", CASES, ids=lambda parser: parser.name)
def test_damaged_files_are_read_or_refused_in_words(parser: Parser) -> None:
    found = list(outcomes(parser, seed=1, first=0, last=parser.share(INPUTS)))
    assert {one.number: one.untyped for one in found if one.untyped} == {}


def test_damage_is_the_seeds_alone_and_changes_most_files() -> None:
    good = b'{"a": [1, 2, {"b": "text"}]}\n{"c": null}\n'
    first, second = ([damaged(good, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == second
    assert sum(one != good for one in first) > 190
    assert len(set(first)) > 100


def parts(page: str) -> tuple[str, str, str]:
    """Returns the text of a page before, between and after the markers."""
    before, rest = page.split(fuzz.BEGIN)
    table, after = rest.split(fuzz.END)
    return before, table, after


def test_the_summary_is_published_between_its_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = fuzz.PAGE.read_text()
    before, table, after = parts(committed)
    (tmp_path / "page.md").write_text(committed)
    monkeypatch.setattr(fuzz, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(fuzz, "run", lambda each, seed, count: fuzz.Tally(inputs=count))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--inputs", "4000", "--publish"])
    assert fuzz.main() == 0
    new = parts((tmp_path / "page.md").read_text())
    assert (new[0], new[2]) == (before, after)
    parsers = new[1].split("Parsers: ")[1]
    assert parsers == table.split("Parsers: ")[1]  # the committed page lists all parsers
    assert f"{fuzz.PARSERS[0].name}, " in parsers
