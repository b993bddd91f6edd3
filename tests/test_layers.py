"""The house's rules, read from the source: who may import whom, and where questions about a CPU may be asked."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nalora_jax

ROOT = Path(nalora_jax.__file__).parent
# Rooms that know no platform: what a CPU has reaches them as registered implementations only.
ROOMS = ("ops", "method", "models", "train", "evaluate")
# Words that belong to one place.
WORDS = {
    r"default_backend": (),
    r"jax\.device_count\(\)": (),
    r"\bnative\b": ("cpu", "cli/doctor.py"),
    # Sampling bisects over the bits of probabilities; a scale of MXFP4 is the exponent of a float32.
    r"bitcast_convert_type": ("cpu", "evaluate/generate/sampling.py", "ops/mxfp4.py"),
    r"\buint16\b": ("cpu", "weights"),  # files hold bf16 as well
}


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


@pytest.mark.parametrize("word", WORDS)
def test_words_stand_where_they_belong(word: str) -> None:
    found = [
        f"{name}: {line.strip()}"
        for name, source in _modules()
        if not name.startswith(WORDS[word])
        for line in source.splitlines()
        if re.search(word, line)
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


def test_loose_modules_are_the_package_its_command_and_its_errors() -> None:
    assert {path.name for path in ROOT.glob("*.py")} <= {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "mechanism.py",
    }


def _graph() -> dict[str, set[str]]:
    """The modules of this package that each module imports, function bodies included."""
    names = {
        f"nalora_jax.{name.removesuffix('.py').replace('/', '.')}": source for name, source in _modules()
    }
    return {
        name: {one for one in _imported(source, name) if one in names} for name, source in names.items()
    }


def _reached(graph: dict[str, set[str]], *starts: str) -> set[str]:
    reached: set[str] = set()
    left = list(starts)
    while left:
        for imported in graph.get(left.pop(), set()) - reached:
            reached.add(imported)
            left.append(imported)
    return reached


def test_the_method_is_short() -> None:
    """Whoever reads these modules knows all of NA-LoRA: rules, transform, adapters, one training step."""
    starts = {f"nalora_jax.method.{path.stem}" for path in (ROOT / "method").glob("*.py")} - {
        "nalora_jax.method.__init__"
    }
    path = _reached(_graph(), *starts) | starts
    files = [ROOT / f"{name.removeprefix('nalora_jax.').replace('.', '/')}.py" for name in path]
    assert len(starts) <= 9, sorted(starts)
    assert len(files) <= 16, sorted(path)
    assert sum(len(file.read_text().splitlines()) for file in files) <= 4_700


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {name: to for name, to in _graph().items() if name.split(".")[1] in ("method", "models", "ops")}
    assert [name for name in graph if name in _reached(graph, name)] == []


# Attributes of devices, which mean different things on different platforms: read in one module alone.
DEVICE_ATTRIBUTES = {
    "coords", "core_on_chip", "device_kind", "fabric_uuid", "local_hardware_id", "memory_stats", "partition_index",
    "slice_index",
}  # fmt: skip


def _exports(source: str) -> set[str]:
    """Names in a module's `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_what_a_package_exports_is_imported_from_the_package() -> None:
    """One import path for each name: modules of the package itself excepted, which its `__init__` imports."""
    exports = {
        f"nalora_jax.{path.removesuffix('/__init__.py').replace('/', '.')}.": _exports(source)
        for path, source in _modules()
        if path.endswith("/__init__.py")
    }
    second_paths = [
        f"{name} imports {imported}"
        for name, source in _modules()
        for imported in _imported(source, name)
        for package, names in exports.items()
        if imported.startswith(package)
        and imported.rpartition(".")[2] in names
        and imported.count(".") > package.count(".")
        and not f"nalora_jax.{name.replace('/', '.')}".startswith(package)
    ]
    assert second_paths == []


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


# Features that stand around the way of a run on text. The command gives it what it needs of them.
AROUND = re.compile(
    r"^nalora_jax\.(cli|study|report|cpu|data\.images|models\.vision\.(decoder|encoder|dual|positions)|weights\.base"
    r"|layout\.(accounting|collectives|decide|estimates|figures|hlo|layouts|machines|products|roofline|scopes|traffic"
    r"|transfers)|evaluate\.(seeing|images|preference)|data\.preference|train\.(dual|dual_objectives)"
    r"|train\.kinds\.(images|preference|dual))\b"
)


def _longest_chain(graph: dict[str, set[str]], start: str) -> int:
    """The longest path of imports; a circle is one module."""
    around = {name: _reached(graph, name) for name in _reached(graph, start) | {start}}

    @functools.cache
    def depth(name: str) -> int:
        circle = {name} | {other for other in around[name] if name in around[other]}
        below = {other for member in circle for other in graph[member]} - circle
        return 1 + max(map(depth, below), default=0)

    return depth(start)


def test_the_way_of_a_run_on_text_is_short() -> None:
    """What `train.run` and the kind for text import, functions included: the bounds are what was reached."""
    starts, graph = ("nalora_jax.train.run", "nalora_jax.train.kinds.text"), _graph()
    way = _reached(graph, *starts) | {*starts}
    assert [name for name in sorted(way) if AROUND.match(name)] == []
    lines = [
        len((ROOT / f"{name.removeprefix('nalora_jax.').replace('.', '/')}.py").read_text().splitlines())
        for name in way
    ]
    assert len(way) <= 180, len(way)
    assert sum(lines) <= 37_500, sum(lines)
    assert max(_longest_chain(graph, start) for start in starts) <= 23
    function = next(
        node
        for node in ast.parse((ROOT / "train/run.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "fine_tune"
    )
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno < 150


def test_a_kind_of_run_is_a_module_with_four_functions() -> None:
    for path in sorted((ROOT / "train" / "kinds").glob("[!_]*.py")):
        module = importlib.import_module(f"nalora_jax.train.kinds.{path.stem}")
        for name in ("open_inputs", "build_step", "evaluators", "export_run"):
            assert callable(getattr(module, name)), f"{path.stem}: {name}"


def test_names_of_the_trainer_have_one_meaning() -> None:
    """No class or function of `train` is called as one of another room, with three older exceptions."""
    rooms: dict[str, set[str]] = {}
    for name, source in _modules():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, set()).add(_room(name))
    shared = {name for name, found in rooms.items() if "train" in found and len(found) > 1}
    assert shared == {"locate", "open_store", "plain"}
