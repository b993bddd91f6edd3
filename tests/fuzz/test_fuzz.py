"""A short run of the fuzzers: damaged files are read or refused in words. ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import run
from tests.fuzz.parsers import PARSERS


@pytest.mark.parametrize("name", [each.name for each in PARSERS])
def test_damaged_files_are_read_or_refused_in_words(name: str) -> None:
    tally = run(name, seed=1, count=12)
    assert (dict(tally.untyped), tally.hangs) == ({}, [])
