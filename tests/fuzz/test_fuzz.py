"""A short run of the fuzzers: damaged files are read or refused in words. ``python -m tests.fuzz``
is the long one."""

import pytest

from tests.fuzz.__main__ import attempt
from tests.fuzz.parsers import PARSERS


@pytest.mark.parametrize(
    "parser", [each for each in PARSERS if each.every == 1], ids=lambda each: each.name
)
def test_damaged_files_are_read_or_refused_in_words(parser, tmp_path):
    parser.write(tmp_path)
    parser.read(tmp_path)  # so that errors are the damage's
    errors = {number: attempt(parser, tmp_path, 1, number) for number in range(30)}
    assert {number: error for number, error in errors.items() if error} == {}
