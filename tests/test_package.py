"""The package's front door: what `import nalora_jax` offers, and errors: complete, bounded and of
one line."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import nalora_jax
from nalora_jax import config
from nalora_jax.__main__ import guard
from nalora_jax.errors import NaloraError, TrainingDivergedError
from nalora_jax.evaluate.generate import GenerationSettings

ROOT = Path(__file__).parent.parent
IMPORTS = """
import sys, nalora_jax
print({'jax', 'flax', 'numpy', 'optax', 'rich', 'tyro'} & set(sys.modules))
print(*dir(nalora_jax))
import nalora_jax.models.families, nalora_jax.weights
print({'grain', 'orbax'} & set(sys.modules))
import nalora_jax.loading.adapted, nalora_jax.cli.training
from nalora_jax import run, load
print(type(run).__name__, type(load).__name__)
print({'matplotlib'} & set(sys.modules))  # pictures are drawn at a run's end
"""


def test_what_is_imported_brings_nothing_heavy_along_and_hides_no_name():
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    heavy, names, pipeline, functions, pictures = done.stdout.splitlines()
    assert heavy == pipeline == pictures == "set()"
    assert functions == "function function"  # not the modules train/run.py and the like
    assert set(names.split()) == {*nalora_jax.__all__, "__version__"}
    assert nalora_jax.__version__ == version("nalora_jax")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = nalora_jax.nothing_of_the_kind


def test_every_name_of_the_package_can_be_imported_and_generate_names_its_options():
    for name in nalora_jax.__all__:
        assert getattr(nalora_jax, name).__name__ == name
    assert {name for name in config.__all__ if name.endswith(("Config", "Rule"))} <= set(
        nalora_jax.__all__
    )
    options = [field.name for field in dataclasses.fields(GenerationSettings)]
    for name in ("generate", "complete", "stream"):
        method = getattr(nalora_jax.Generator, name)
        assert list(inspect.signature(method).parameters)[-len(options) :] == options


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

    assert guard(missing) == 2
    assert capsys.readouterr().err == "error: a\\x1b]0;title\\x07: Not a directory\\x1b[2J\n"


DEVICES = """
import sys
from nalora_jax.__main__ import guard
sys.exit(guard(lambda: __import__("jax").devices()))
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
