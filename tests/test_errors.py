"""Messages: complete where they are short, bounded whatever they quote."""

from __future__ import annotations

import pytest

from nalora_jax.errors import NaloraError, TrainingDivergedError, shorten


def test_a_short_message_is_whole() -> None:
    error = NaloraError("--mask.keep", expected="a share in (0, 1]", found=0, remedy="use e.g. 0.5")
    assert str(error) == "--mask.keep: expected a share in (0, 1], found 0; use e.g. 0.5"
    assert (error.where, error.found, error.remedy) == ("--mask.keep", 0, "use e.g. 0.5")


LONG = {
    "ascii": "x" * 10**6,
    "three bytes": "語" * 10**5,
    "four bytes": "🙂" * 1900,
    "list": list(range(10**5)),
    "number": 10**5000,
    "surrogates": "\ud800" * 10**4,
}


@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
def test_messages_are_bounded(long: object) -> None:
    for place in ("where", "expected", "found", "remedy"):
        parts = {"where": "tokenizer.json", "expected": "a token", "found": "none", "remedy": "change it"}
        message = str(TrainingDivergedError(**{**parts, place: long}))
        assert len(message.encode("utf-8")) <= 2000
        assert all(text in message for name, text in parts.items() if name != place)


def test_a_message_of_long_parts_only_is_bounded() -> None:
    long = "🙂" * 5000
    assert len(str(NaloraError(long, expected=long, found=long, remedy=long)).encode()) <= 2000


def test_beginning_and_end_are_kept() -> None:
    assert shorten("abcdefghijklmnop", 11) == "abc ... nop"
    assert shorten("abc", 3) == "abc"
    assert len(shorten("x" * 100, 3)) <= 8
