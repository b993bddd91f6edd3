"""Messages: complete where they are short, bounded whatever they quote."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest

from nalora_jax.__main__ import guarded
from nalora_jax.errors import NaloraError, TrainingDivergedError

LONG: list[Any] = ["語" * 10**5, list(range(10**5)), 10**5000, "\ud800" * 10**4]
PARTS = {"where": "tokenizer.json", "expected": "a token", "found": "none", "remedy": "change it"}
CONTROLS = "\x00 \x07 \x1b[31m \x7f \x9b2J \r \u202e \u2028"


def test_messages_are_bounded() -> None:
    for place, long in itertools.product(PARTS, LONG):
        message = str(TrainingDivergedError(**{**PARTS, place: long}))
        assert len(message.encode("utf-8")) <= 2000
        assert all(text in message for name, text in PARTS.items() if name != place)


def test_control_characters_of_a_message_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for place in PARTS:
        message = str(NaloraError(**{**PARTS, place: CONTROLS}))
        assert r"\x00 \x07 \x1b[31m \x7f \x9b2J \r \u202e \u2028" in message
        assert message.isprintable()

    def missing() -> None:
        raise FileNotFoundError(20, "Not a directory\x1b[2J", "a\x1b]0;title\x07")

    assert guarded(missing) == 2
    assert capsys.readouterr().err == "error: a\\x1b]0;title\\x07: Not a directory\\x1b[2J\n"


DEVICES = """
import sys
from nalora_jax.__main__ import guarded
sys.exit(guarded(lambda: __import__("jax").devices()))
"""


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("JAX_PLATFORMS", "cpx", "JAX_PLATFORMS: expected a platform with a device on this machine, found cpx ("),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
    ],
)  # fmt: skip
def test_what_jax_cannot_start_with_is_one_line(variable: str, value: str, line: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), variable: value}
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {line}")
    assert "Traceback" not in done.stderr
