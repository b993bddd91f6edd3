"""The names that README, pages and notebooks import keep their signatures.

``public_surface.txt`` holds them. A change of a line is a change for users: mention it in CHANGELOG.md, and write the
file again with ``python -m tests.test_public_surface``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nalora_jax

ROOT = Path(__file__).resolve().parents[1]
PINNED = Path(__file__).with_name("public_surface.txt")
IMPORT = re.compile(r"^\s*from (nalora_jax[\w.]*) import (\((?:[^)]*)\)|[^\n#]+)", re.MULTILINE)


def read_pages() -> Iterator[str]:
    """Yields the text of README, of every page and example file of docs, and of every notebook's code."""
    yield (ROOT / "README.md").read_text(encoding="utf-8")
    yield (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield (ROOT / "nalora_jax" / "method" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".py"):
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                yield "".join(cell["source"])


def imported_names() -> set[tuple[str, str]]:
    """Returns module and name of each import on a page, and of the public API."""
    names = {("nalora_jax", name) for name in nalora_jax.__all__}
    for text in read_pages():
        for module, listed in IMPORT.findall(text):
            for name in listed.strip("()").replace("\n", " ").split(","):
                if word := name.split(" as ")[0].strip():
                    names.add((module, word))
    return names


def describe(value: Any) -> list[str]:
    """Returns the signature of a function, or a class's signature and public methods, without annotations."""
    if inspect.ismodule(value):
        return ["module"]
    if not callable(value):
        return [type(value).__name__]
    if not inspect.isclass(value):
        return [signature(value)]
    lines = [f"class{signature(value)}"]
    fields = (
        {field.name for field in dataclasses.fields(value)}
        if dataclasses.is_dataclass(value)
        else set()
    )
    fields |= set(getattr(value, "_fields", ()))
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, property):
            lines.append(f".{name}")
        elif inspect.isfunction(member) and member.__module__.startswith("nalora_jax"):
            lines.append(f".{name}{signature(member)}")
    return lines


def signature(function: Any) -> str:
    """Returns names, kinds and plain defaults of the parameters."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            plain = isinstance(
                default, str | int | float | tuple | type(None)
            ) and "0x" not in repr(default)
            default = default if plain else "..."
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(parameters)).replace("'...'", "...")


def read_surface() -> str:
    """Returns a line for each public name and method."""
    lines = []
    for module, name in sorted(imported_names()):
        try:
            value = getattr(importlib.import_module(module), name)
        except AttributeError:
            value = importlib.import_module(f"{module}.{name}")
        head, *members = describe(value)
        lines.append(f"{module}.{name} {head}")
        lines += [f"    {member}" for member in members]
    return "\n".join(lines) + "\n"


def test_public_names_keep_their_signatures() -> None:
    expected = PINNED.read_text(encoding="utf-8").splitlines()
    found = read_surface().splitlines()
    gone = sorted(set(expected) - set(found))
    new = sorted(set(found) - set(expected))
    remedy = "mention the change in CHANGELOG.md, and run python -m tests.test_public_surface"
    assert found == expected, f"gone: {gone}\nnew: {new}\n{remedy}"


def test_the_readme_of_the_method_names_each_of_its_files() -> None:
    folder = ROOT / "nalora_jax" / "method"
    listed = set(
        re.findall(
            r"^\| `(\w+\.py)`", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    assert listed == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


if __name__ == "__main__":
    PINNED.write_text(read_surface(), encoding="utf-8")
