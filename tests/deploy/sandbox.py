"""Machines to execute the files of deploy/ on: an empty home, the commands of the machine's image, a read-only root.

With bubblewrap the root is read-only but for the home and the folders that are shared; without it the environment and
the command path are replaced, and the files that a script writes elsewhere would really be written.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Commands of the TPU VM image (Ubuntu 22.04) that deploy/ uses. Neither python3.11 nor gcsfuse is among them.
IMAGE = (
    *(
        "bash",
        "cat",
        "cp",
        "cut",
        "date",
        "dirname",
        "env",
        "grep",
        "gzip",
        "hostname",
        "mkdir",
        "nohup",
        "rm",
    ),
    *("sed", "setsid", "sha256sum", "sleep", "tail", "tar"),
)


@functools.cache
def has_bubblewrap() -> bool:
    """Returns True if bubblewrap is installed and may make a namespace."""
    if shutil.which("bwrap") is None:
        return False
    return (
        subprocess.run(
            ["bwrap", "--ro-bind", "/", "/", "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


@dataclass(frozen=True)
class Machine:
    """A machine of a test.

    Attributes:
      home: the user's home folder, empty at first.
      shared: a folder that all machines of the test see, in place of a bucket.
      commands: the folder of all commands that the machine has.
      variables: the environment besides HOME, USER and PATH.
    """

    home: Path
    shared: Path
    commands: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def command(self, words: Sequence[str]) -> list[str]:
        """Returns the command that runs ``words`` on this machine."""
        variables = {"HOME": str(self.home), "USER": "me", "PATH": str(self.commands), "LANG": "C.UTF-8"}
        assigned = [f"{name}={value}" for name, value in (variables | dict(self.variables)).items()]
        inner = ["/usr/bin/env", "-i", "-C", str(self.home), *assigned, *words]
        if not has_bubblewrap():
            return inner
        binds = ["--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--tmpfs", "/tmp"]
        for kind, folder in (("--bind", self.home), ("--bind", self.shared), ("--ro-bind", self.commands)):
            binds += [kind, str(folder), str(folder)]
        return ["bwrap", *binds, "--ro-bind", str(ROOT), str(ROOT), *inner]


def make_commands(folder: Path, **stand_ins: str) -> Path:
    """Fills ``folder`` with the image's commands and with ``stand_ins``: modules of tests/deploy by command name."""
    folder.mkdir(parents=True)
    for name in IMAGE:
        program = shutil.which(name)
        assert program, f"{name} is not installed"
        (folder / name).symlink_to(program)
    for name, module in stand_ins.items():
        write_program(folder / name, module)
    return folder


def write_program(path: Path, module: str, *arguments: str) -> None:
    """Writes a program that calls ``main(NAME, *arguments, *its arguments)`` of tests/deploy/MODULE.py."""
    path.write_text(
        f"#!{sys.executable}\n"
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.deploy import {module}\n"
        f"sys.exit({module}.main({path.name!r}, *{arguments!r}, *sys.argv[1:]))\n"
    )
    path.chmod(0o755)


class Record:
    """What the stand-ins of a test were called with, in a file that all of them append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, arguments: Sequence[str]) -> None:
        """Appends a call."""
        with self.path.open("a") as file:
            file.write(json.dumps([name, *arguments]) + "\n")

    def calls(self, *start: str) -> list[list[str]]:
        """Returns the calls that begin with ``start``."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [call for call in map(json.loads, lines) if tuple(call[: len(start)]) == start]


def from_environment() -> Record:
    """Returns the record that a stand-in writes to."""
    return Record(Path(os.environ["DEPLOY_RECORD"]))
