"""Normalisation of texts before they are compared."""

from __future__ import annotations

import pytest

from nalora_jax.evaluate.answers import last_number, matches, normalised_text


@pytest.mark.parametrize(
    ("normalise", "text", "expected"),
    [
        (normalised_text, "  The Eiffel-Tower, Paris. ", "eiffeltower paris"),
        (normalised_text, "An apple a day", "apple day"),
        (normalised_text, "...", ""),
        (last_number, "12 eggs at $3 make $1,036.50.", "1036.5"),
        (last_number, "#### -42", "-42"),
        (last_number, "1,2345", "2345"),
        (last_number, "-0.0", "0"),
        (last_number, "none", ""),
    ],
)
def test_normalised_texts(normalise, text, expected):
    assert normalise(text) == expected


def test_an_answer_without_a_number_matches_no_other_answer_without_one():
    assert matches("so it is 7.0", "#### 7", last_number)
    assert not matches("no idea", "none", last_number)
    assert not matches("a", "the", normalised_text)
    assert matches("a", "a", normalised_text)
