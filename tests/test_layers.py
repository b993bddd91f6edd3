"""The house's rules, read from the source: who may import whom, and where questions about a CPU may be asked."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nalora_jax

ROOT = Path(nalora_jax.__file__).parent
# Rooms that know no platform: what a CPU has reaches them as registered implementations only.
ROOMS = ("ops", "method", "models", "train", "evaluate")


def _modules() -> Iterator[tuple[str, str]]:
    """Every module's path below the package and its source, without builders of data sets."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("data/builders"):
            yield name, path.read_text(encoding="utf-8")


def _imported(source: str, name: str) -> Iterator[str]:
    """Dotted names of this package that a module imports, at its top or within functions, not for types alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_no_cpu(room: str) -> None:
    found = [
        f"{name} imports {imported}"
        for name, source in _modules()
        if _room(name) == room
        for imported in _imported(source, name)
        if imported.startswith("nalora_jax.cpu")
    ]
    assert found == []


# From the top to the bottom: a module imports its own room and rooms after it.
ORDER = (
    "cli", "study", "report", "train", "evaluate", "weights", "layout", "data", "models", "cpu", "method", "ops",
    "config", "common", "errors",
)  # fmt: skip
UPWARD: set[tuple[str, str]] = set()


def test_imports_point_downwards() -> None:
    modules = {
        name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for name, _ in _modules()
    }
    upward = {
        (name, imported.removeprefix("nalora_jax."))
        for name, source in _modules()
        if _room(name) in ORDER
        for imported in _imported(source, name)
        if imported.removeprefix("nalora_jax.") in modules
        and _room(imported.removeprefix("nalora_jax.").replace(".", "/"))
        in ORDER[: ORDER.index(_room(name))]
    }
    assert upward == UPWARD


# Names in two rooms: `cpu` implements operations under their names, and a subcommand's function has the
# subcommand's name.
SUBCOMMANDS = {"from_peft", "merge"}


def test_no_name_is_defined_in_two_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, source in _modules():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, set()).add(_room(module))
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


def _device_reads(source: str) -> Iterator[str]:
    """Expressions that read an attribute of a device, by attribute or by `getattr`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            of_device = node.attr == "process_index" and owner != "jax"
            of_device |= node.attr == "platform" and "device" in owner
            if node.attr in DEVICE_ATTRIBUTES or of_device:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
            if names & {*DEVICE_ATTRIBUTES, "process_index"}:
                yield ast.unparse(node)


def test_devices_are_read_in_one_module() -> None:
    found = [
        f"{name}: {read}"
        for name, source in _modules()
        if name != "common/devices.py"
        for read in _device_reads(source)
    ]
    assert found == []
    assert set(_device_reads("d.slice_index; devices[0].platform; getattr(x, 'coords', 0); jax.process_index()")) == {
        "d.slice_index", "devices[0].platform", "getattr(x, 'coords', 0)",
    }  # fmt: skip


# Modules, lines and longest chain of imports: of the way alone, and with the kind for text.
BOUNDS = {"nalora_jax.train.run": (76, 18_500, 15), "nalora_jax.train.kinds.text": (130, 36_000, 15)}
AROUND = re.compile(
    r"^nalora_jax\.(cli|study|report|cpu|data\.images|models\.(families|vision|moe|experts|routing)|weights\.(base|gguf|card)"
    r"|train\.(start|initial_adapter|cards|dual|kinds\.(images|preference|dual|rl)))\b"
)


def test_the_way_of_a_run_is_short() -> None:
    """What `train.run` imports, and with it the kind for text; imports in functions count."""
    sources = {
        f"nalora_jax.{name.removesuffix('.py').replace('/', '.')}": text for name, text in _modules()
    }
    graph = {
        name: {one for one in _imported(text, name) if one in sources} for name, text in sources.items()
    }

    @functools.cache
    def chain(name: str) -> int:
        return 1 + max(map(chain, graph[name]), default=0)

    way: set[str] = set()
    for start, (modules, lines, longest) in BOUNDS.items():
        left = {start}
        while left:
            way |= left
            left = {below for name in left for below in graph[name]} - way
        assert len(way) <= modules, (start, len(way))
        assert sum(len(sources[name].splitlines()) for name in way) <= lines, start
        assert chain(start) <= longest, start
    assert [name for name in sorted(way) if AROUND.match(name) and "vision.config" not in name] == []
