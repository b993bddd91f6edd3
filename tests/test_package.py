"""The package's front door: what `import nalora_jax` offers, whatever was imported before."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "first",
    [
        "from nalora_jax import RunResult, run, load",
        "import nalora_jax.train.adapted, nalora_jax.cli.training; from nalora_jax import run, load",
        "from nalora_jax.train.adapted import AdaptedModel; from nalora_jax import run, load",
    ],
)
def test_run_and_load_are_functions_whatever_was_imported_before(first):
    code = f"{first}\nimport sys\nprint(type(run).__name__, type(load).__name__, {{'matplotlib'}} & set(sys.modules))"
    assert _python(code) == "function function set()"  # the second: pictures are drawn at a run's end


def test_importing_the_package_imports_nothing_heavy_and_names_all_that_it_has():
    heavy = "{'jax', 'flax', 'numpy', 'optax', 'rich', 'tyro'}"
    code = f"import sys, nalora_jax\nprint({heavy} & set(sys.modules) or 'none', *dir(nalora_jax))"
    none, *names = _python(code).split()
    assert none == "none"
    import nalora_jax

    assert {*nalora_jax.__all__, "__version__"} == set(names)
    assert nalora_jax.__version__ == version("nalora_jax")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = nalora_jax.nothing_of_the_kind


def test_every_name_of_the_package_can_be_imported_and_generate_names_its_options():
    import inspect

    import nalora_jax
    from nalora_jax import config
    from nalora_jax.evaluate.generate import Settings

    for name in nalora_jax.__all__:
        assert getattr(nalora_jax, name).__name__ == name
    assert {name for name in config.__all__ if name.endswith(("Config", "Rule"))} <= set(nalora_jax.__all__)
    options = [field.name for field in dataclasses.fields(Settings)]
    for method in (
        nalora_jax.Generator.generate,
        nalora_jax.Generator.complete,
        nalora_jax.Generator.stream,
    ):
        assert list(inspect.signature(method).parameters)[-len(options) :] == options


def test_models_and_their_files_bring_no_data_pipeline_along():
    code = "import sys, nalora_jax.models.families, nalora_jax.weights\nprint({'grain', 'orbax'} & set(sys.modules))"
    assert _python(code) == "set()"


def test_type_checkers_are_told_that_the_package_has_types():
    assert (ROOT / "nalora_jax" / "py.typed").exists()
