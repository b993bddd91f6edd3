"""The refusals of the package that no test reaches.

Every place that creates a `NaloraError` is a promise of one clear error. ``conftest.py`` records the places that a
whole run of the suite reaches, in its processes and in those that tests start; the run fails if a place is neither
reached nor listed in `WITHOUT_A_TEST` with a reason.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nalora_jax"
ERRORS = PACKAGE / "errors.py"
# The folder in which each process of a test run writes the places that it reached.
FOLDER = "NALORA_TEST_REFUSALS"
# Refusals that no test reaches, and why.
WITHOUT_A_TEST: dict[str, str] = {}


class Refusal(NamedTuple):
    """A place that creates an error: file, lines of the call, and the source of what it says."""

    file: str
    first: int
    last: int
    where: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: expected {self.expected}"


def read_refusals(package: Path = PACKAGE) -> list[Refusal]:
    """Returns the places of a package that call `NaloraError` or one of its subclasses."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    names = {"NaloraError"}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                if names & bases:
                    names.add(node.name)
    refusals = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func).rpartition(".")[2] not in names:
                continue
            where = ast.unparse(node.args[0]) if node.args else ""
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            file = path.relative_to(package).as_posix()
            last = node.end_lineno or node.lineno
            refusals.append(Refusal(file, node.lineno, last, where, keywords.get("expected", "")))
    return refusals


def record(errors: Any) -> None:
    """Makes this process append each place that creates an error to a file of the folder, once.

    Args:
      errors: the module `nalora_jax.errors`.
    """
    create = errors.NaloraError.__init__
    folder = os.environ[FOLDER]
    seen = set()

    @functools.wraps(create)
    def create_and_record(self: Any, *args: Any, **options: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and Path(frame.f_code.co_filename) == ERRORS:
            frame = frame.f_back
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if place not in seen:
            seen.add(place)
            with Path(f"{folder}/{os.getpid()}.txt").open("a") as file:
                file.write(place + "\n")
        create(self, *args, **options)

    errors.NaloraError.__init__ = create_and_record


def read_reached(folder: Path) -> set[tuple[str, int]]:
    """Returns file and line of the recorded places in the package."""
    reached = set()
    for path in folder.glob("*.txt"):
        for place in path.read_text().splitlines():
            file, _, line = place.rpartition(":")
            if Path(file).is_relative_to(PACKAGE):
                reached.add((Path(file).relative_to(PACKAGE).as_posix(), int(line)))
    return reached


def is_reached(refusal: Refusal, reached: set[tuple[str, int]]) -> bool:
    """Returns True if one of the lines of the refusal's call was recorded."""
    lines = range(refusal.first, refusal.last + 1)
    return any((refusal.file, line) in reached for line in lines)


def judge(refusals: list[Refusal], reached: set[tuple[str, int]]) -> list[str]:
    """Returns a line for each refusal that no test reached without a reason, and for each reason
    that names no place or several."""
    complaints = []
    for refusal in refusals:
        if not is_reached(refusal, reached) and str(refusal) not in WITHOUT_A_TEST:
            place = f"nalora_jax/{refusal.file}:{refusal.first}"
            complaints.append(f"{place}: no test reaches it: {refusal}")
    places = Counter(map(str, refusals))
    for text in WITHOUT_A_TEST:
        if places[text] != 1:
            complaints.append(f"WITHOUT_A_TEST: {places[text]} places are called {text}")
    return complaints
