"""A short run of the fuzzers: damaged files are read or refused in words. ``python -m tests.fuzz`` is the long one."""

import pytest

from tests.fuzz.__main__ import outcomes
from tests.fuzz.parsers import PARSERS

# Slow readers are left to the long run.
CASES = [
    pytest.param(each, id=each.name, marks=getattr(pytest.mark, each.needs) if each.needs else ())
    for each in PARSERS
    if each.every == 1
]


@pytest.mark.parametrize("parser", CASES)
def test_damaged_files_are_read_or_refused_in_words(parser):
    found = list(outcomes(parser, seed=1, first=0, last=parser.share(12)))
    assert {one.number: one.untyped for one in found if one.untyped} == {}
