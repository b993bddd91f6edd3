"""A short run of the fuzzers: damaged files are read or refused in words. ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.campaign import outcomes
from tests.fuzz.mutate import damaged
from tests.fuzz.parsers import PARSERS, Parser

pytestmark = pytest.mark.pictures  # of runs' reports

INPUTS = 60


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_damaged_files_are_read_or_refused_in_words(parser: Parser) -> None:
    found = list(outcomes(parser, seed=1, first=0, last=parser.share(INPUTS)))
    assert {one.number: one.untyped for one in found if one.untyped} == {}


def test_damage_is_the_seeds_alone_and_changes_most_files() -> None:
    good = b'{"a": [1, 2, {"b": "text"}]}\n{"c": null}\n'
    first, second = ([damaged(good, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == second
    assert sum(one != good for one in first) > 190
    assert len(set(first)) > 100
