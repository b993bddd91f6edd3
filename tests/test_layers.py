"""The house's rules, read from the source: who may import whom, and where questions about a CPU may be asked."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import nalora_jax

ROOT = Path(nalora_jax.__file__).parent


class Module(NamedTuple):
    """A module of the package: its room, number of lines, statements and what it imports."""

    room: str
    lines: int
    tree: ast.Module
    imported: frozenset[str]  # dotted names, at its top or within functions, not for types alone


def _read(path: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    tree, imported = ast.parse(source), set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = frozenset(name for name in imported if name.startswith("nalora_jax"))
    return Module(room, len(source.splitlines()), tree, ours)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    """The modules by dotted name, packages with ``.__init__``, without builders of data sets."""
    paths = [path for path in ROOT.rglob("*.py") if "builders" not in path.parts]
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): _read(path) for path in sorted(paths)
    }


def test_rooms_know_no_cpu(modules: dict[str, Module]) -> None:
    """What a CPU has reaches them as registered implementations only."""
    rooms = ("ops", "method", "models", "train", "evaluate")
    knowing = [
        name
        for name, module in modules.items()
        if module.room in rooms and any(one.startswith("nalora_jax.cpu") for one in module.imported)
    ]
    assert knowing == []


# From the top to the bottom: a module imports its own room and rooms after it.
ORDER = (
    "cli", "study", "report", "train", "evaluate", "weights", "layout", "data", "models", "cpu", "method", "ops",
    "config", "common", "errors",
)  # fmt: skip


def test_imports_point_downwards(modules: dict[str, Module]) -> None:
    upward = {
        (name, imported)
        for name, module in modules.items()
        if module.room in ORDER
        for imported in module.imported
        if (target := modules.get(imported) or modules.get(f"{imported}.__init__"))
        and target.room in ORDER[: ORDER.index(module.room)]
    }
    assert upward == set()


# Names in two rooms: `cpu` implements operations under their names, and a subcommand's function has the
# subcommand's name.
SUBCOMMANDS = {"from_peft", "merge"}


def test_no_name_is_defined_in_two_rooms(modules: dict[str, Module]) -> None:
    rooms: dict[str, set[str]] = {}
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, set()).add(module.room)
    several = {
        name: of
        for name, of in rooms.items()
        if len(of - {"cpu"} if of & {"ops", "method"} else of) > 1 and name not in SUBCOMMANDS
    }
    assert several == {}


# Attributes of devices, which mean different things on different platforms: read in one module alone.
DEVICE_ATTRIBUTES = {
    "coords", "core_on_chip", "device_kind", "fabric_uuid", "local_hardware_id", "memory_stats", "partition_index",
    "slice_index",
}  # fmt: skip


def _device_reads(tree: ast.Module) -> Iterator[str]:
    """Expressions that read an attribute of a device, by attribute or by `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_device = node.attr in DEVICE_ATTRIBUTES
            of_device |= node.attr == "process_index" and ast.unparse(node.value) != "jax"
            of_device |= node.attr == "platform" and "device" in ast.unparse(node.value)
            if of_device:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            names = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
            if names & {*DEVICE_ATTRIBUTES, "process_index"}:
                yield ast.unparse(node)


def test_devices_are_read_in_one_module(modules: dict[str, Module]) -> None:
    found = {name: reads for name, one in modules.items() if (reads := list(_device_reads(one.tree)))}
    assert found.keys() == {"nalora_jax.common.devices"}, found
    example = "d.slice_index; devices[0].platform; getattr(x, 'coords', 0); jax.process_index()"
    assert set(_device_reads(ast.parse(example))) == {
        "d.slice_index", "devices[0].platform", "getattr(x, 'coords', 0)",
    }  # fmt: skip


# Modules, lines and longest chain of imports: of the way alone, and with the kind for text.
BOUNDS = {"nalora_jax.train.run": (76, 18_500, 15), "nalora_jax.train.kinds.text": (130, 36_000, 15)}
AROUND = re.compile(
    r"^nalora_jax\.(cli|study|report|cpu|data\.images|models\.(families|vision|moe|experts|routing)|weights\.(base|gguf|card)"
    r"|train\.(start|initial_adapter|cards|dual|kinds\.(images|preference|dual|rl)))\b"
)


def test_the_way_of_a_run_is_short(modules: dict[str, Module]) -> None:
    """What `train.run` imports, and with it the kind for text; imports in functions count."""
    graph = {name: module.imported & modules.keys() for name, module in modules.items()}

    @functools.cache
    def chain(name: str) -> int:
        return 1 + max(map(chain, graph[name]), default=0)

    way: set[str] = set()
    for start, (count, lines, longest) in BOUNDS.items():
        left = {start}
        while left:
            way |= left
            left = {below for name in left for below in graph[name]} - way
        assert len(way) <= count, (start, len(way))
        assert sum(modules[name].lines for name in way) <= lines, start
        assert chain(start) <= longest, start
    assert [name for name in sorted(way) if AROUND.match(name) and "vision.config" not in name] == []
