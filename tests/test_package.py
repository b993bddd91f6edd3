"""The package's front door: what `import nalora_jax` offers, whatever was imported before."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import nalora_jax
from nalora_jax import config
from nalora_jax.evaluate.generate import Settings

ROOT = Path(__file__).parent.parent
IMPORTS = """
import sys, nalora_jax
print({'jax', 'flax', 'numpy', 'optax', 'rich', 'tyro'} & set(sys.modules))
print(*dir(nalora_jax))
import nalora_jax.models.families, nalora_jax.weights
print({'grain', 'orbax'} & set(sys.modules))
import nalora_jax.train.adapted, nalora_jax.cli.training
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
    assert {name for name in config.__all__ if name.endswith(("Config", "Rule"))} <= set(nalora_jax.__all__)
    options = [field.name for field in dataclasses.fields(Settings)]
    for name in ("generate", "complete", "stream"):
        method = getattr(nalora_jax.Generator, name)
        assert list(inspect.signature(method).parameters)[-len(options) :] == options
