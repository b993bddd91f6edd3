"""Stands in for the image's Python with pip, and for uv: installs a program that runs this repository's copy.

``python3`` is that of the image, which has no packages: it installs uv and does no more. uv checks what it is asked
for against the pyproject.toml of the copied source, and writes the command `nalora`, or a test's NALORA_PROGRAM.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from tests.deploy.sandbox import from_environment, write_program

# The entry point of the source that was copied to the machine, without the report's pictures, which take seconds.
NALORA = """#!{python}
import sys
sys.path.insert(0, {source!r})
from nalora_jax.__main__ import main
from nalora_jax.report import html
assert html._draw
html._draw = lambda pictures, history: []
sys.exit(main())
"""


def main(program: str, *words: str) -> int:
    """Executes the stand-in for ``python3`` or ``uv``."""
    from_environment().add(program, words)
    return python3(*words) if program == "python3" else uv(*words)


def python3(*words: str) -> int:
    """Installs uv for the user, as pip 22 of Ubuntu 22.04 does."""
    assert words == ("-m", "pip", "install", "--quiet", "--user", "uv"), words
    commands = Path.home() / ".local" / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    write_program(commands / "uv", "python_tools")
    return 0


def uv(verb: str, *words: str) -> int:
    """Makes an environment, or installs a folder with extras into it."""
    if verb == "venv":
        *options, folder = words
        assert options == ["--quiet", "--python", "3.11"], options
        (Path(folder) / "bin").mkdir(parents=True)
        (Path(folder) / "bin" / "python").symlink_to(sys.executable)
        return 0
    install, quiet, option, python, *requirements = words
    assert (verb, install, quiet, option) == ("pip", "install", "--quiet", "--python")
    install_into(Path(python).parent, requirements)
    return 0


def install_into(commands: Path, requirements: list[str]) -> None:
    """Checks ``requirements`` and writes the command."""
    pinned, folder = requirements
    target = re.fullmatch(r"(.+)\[([\w,]+)\]", folder)
    assert target, folder
    project = tomllib.loads((Path(target[1]) / "pyproject.toml").read_text())["project"]
    extras = target[2].split(",")
    assert set(extras) <= set(project["optional-dependencies"]), extras
    accelerator = re.fullmatch(r"jax\[(\w+)\]==0\.(\d+)\.\d+", pinned)
    assert accelerator, pinned
    assert any(
        line.startswith(f"jax[{accelerator[1]}]") for line in project["optional-dependencies"][extras[0]]
    )
    assert (Path(target[1]) / project["readme"]).exists()
    program = os.environ.get("NALORA_PROGRAM") or NALORA.format(python=sys.executable, source=target[1])
    (commands / "nalora").write_text(program)
    (commands / "nalora").chmod(0o755)
