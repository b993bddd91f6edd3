"""Stands in for the other commands of the documentation: records what they are called with and ends with status 0.

``python3.11 -m venv FOLDER`` makes a folder with pip; ``gcloud`` outside of TPUs is checked by tests/deploy/gcloud.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.deploy.sandbox import from_environment, write_program


def main(program: str, *words: str) -> int:
    """Executes one command."""
    from_environment().add(program, words)
    if program == "python3.11":
        (module, venv, folder) = words
        assert (module, venv) == ("-m", "venv")
        commands = Path(folder) / "bin"
        commands.mkdir(parents=True)
        write_program(commands / "pip", "tools")
    for word in words:  # files that a command is given
        if word.startswith(("deploy/", "benchmarks/")):
            assert os.path.exists(word), word  # noqa: PTH110
    return 0
