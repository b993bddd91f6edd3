"""Normalisation of texts before they are compared."""

from __future__ import annotations

import pytest

from nalora_jax.evaluate.answers import last_number, matches, normalised_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Eiffel-Tower, Paris. ", "eiffeltower paris"),
        ("An apple a day", "apple day"),
        ("...", ""),
    ],
)
def test_plain_text(text, expected):
    assert normalised_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 eggs at $3 make $1,036.50.", "1036.5"),
        ("#### -42", "-42"),
        ("1,2345", "2345"),
        ("-0.0", "0"),
        ("none", ""),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_an_answer_without_a_number_matches_no_other_answer_without_one():
    assert matches("so it is 7.0", "#### 7", last_number)
    assert not matches("no idea", "none", last_number)
    assert not matches("a", "the", normalised_text)
    assert matches("a", "a", normalised_text)
