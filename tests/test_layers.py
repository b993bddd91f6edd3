"""The house's rules, read from the source: who may import whom, and where devices are read."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import nalora_jax

ROOT = Path(nalora_jax.__file__).parent


class Module(NamedTuple):
    """A module of the package: its room, text, statements and what it imports."""

    room: str
    source: str
    tree: ast.Module
    imported: set[str]  # dotted names, at its top or within functions, not for types alone
    for_types: set[str]  # dotted names that are imported under TYPE_CHECKING


def _read(path: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported: set[str] = set()
    for_types: set[str] = set()
    nodes: list[tuple[ast.AST, set[str]]] = [(tree, imported)]
    while nodes:
        node, names = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += [(child, for_types) for child in ast.iter_child_nodes(node)]
        else:
            nodes += [(child, names) for child in ast.iter_child_nodes(node)]
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return Module(room, source, tree, imported, for_types)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    """The modules by dotted name, packages with ``.__init__``, without builders of data sets."""
    paths = [path for path in ROOT.rglob("*.py") if "builders" not in path.parts]
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): _read(path)
        for path in sorted(paths)
    }


# From the top to the bottom: a module imports its own room and rooms after it. Only `cli` knows
# that there is a room for CPUs: what it implements is registered.
ORDER = (
    "cli", "cpu", "study", "report", "train", "planner", "kinds", "assembly", "loading", "evaluate", "weights", "mesh",
    "data", "models", "method", "ops", "config", "common", "errors",
)  # fmt: skip


def test_imports_point_downwards(modules: dict[str, Module]) -> None:
    upward = {
        (name, imported)
        for name, module in modules.items()
        if module.room in ORDER
        for imported in module.imported | module.for_types
        if (target := modules.get(imported) or modules.get(f"{imported}.__init__"))
        and target.room in ORDER[: ORDER.index(module.room)]
    }
    assert upward == set()


def test_modules_have_no_circles(modules: dict[str, Module]) -> None:
    """Imports for types count."""
    graph = {name: module.imported | module.for_types for name, module in modules.items()}
    order = graphlib.TopologicalSorter({name: graph[name] & modules.keys() for name in graph})
    order.prepare()  # raises CycleError with the modules of a circle


# Attributes of devices, which mean different things on different platforms: read in one module
# alone.
DEVICE_READS = re.compile(
    r"\.(coords|core_on_chip|device_kind|fabric_uuid|local_hardware_id|memory_stats|partition_index|slice_index)\b"
    r"|(?<!jax)\.process_index\b|device\w*(\[\d+\])?\.platform\b"
    r"|attr\(\w+, \"(coords|device_kind|memory_stats|process_index|slice_index)"
)


def test_devices_are_read_in_one_module(modules: dict[str, Module]) -> None:
    assert [name for name, one in modules.items() if DEVICE_READS.search(one.source)] == [
        "nalora_jax.common.devices"
    ]
    for example in (
        "d.slice_index",
        "devices[0].platform",
        'getattr(x, "coords", 0)',
        "d.process_index",
    ):
        assert DEVICE_READS.search(example), example
    assert not DEVICE_READS.search("jax.process_index()")


# Modules that make shardings of axes. `mesh` decides; the others hold the type, change a sharding that
# they are given, or map a function over shards (`jax.shard_map`).
SHARDING_MODULES = {
    "nalora_jax.mesh.distributed",
    "nalora_jax.mesh.sharding",
    "nalora_jax.ops.shardings",
    # those that change one
    "nalora_jax.ops.quantize",
    "nalora_jax.ops.scaled",
    "nalora_jax.ops.reductions",
    "nalora_jax.weights.tensors",
    # those that map a function
    "nalora_jax.assembly.stacked",
    "nalora_jax.models.moe",
    "nalora_jax.ops.attention",
    "nalora_jax.ops.attention_tpu",
    "nalora_jax.ops.split_attention",
    "nalora_jax.ops.split_mixers",
}
SHARDING_TYPES = {"jax.sharding.NamedSharding", "jax.sharding.PartitionSpec"}


def test_shardings_are_made_in_few_modules(modules: dict[str, Module]) -> None:
    found = {name for name, module in modules.items() if module.imported & SHARDING_TYPES}
    assert found == SHARDING_MODULES


# An axis as a string: a word that means nothing else, or any in a place for axes.
AXIS_WORDS = re.compile(r"\"(fsdp|tensor)\"")
AXIS_PLACES = re.compile(
    r"\.shape(\[|\.get\()\"|\b(P|mesh_sharding|batch_sharding)\([^()]*\"|axis_name=\"|sizes\[\""
)


def test_axes_of_meshes_are_constants(modules: dict[str, Module]) -> None:
    found = set()
    for name, module in modules.items():
        # Without comments and docstrings.
        code = ast.unparse(_without_docstrings(module.source)).replace("'", '"')
        if AXIS_WORDS.search(code) or AXIS_PLACES.search(code):
            found.add(name)
    # Scales of a whole "tensor" are a format's.
    assert found == {"nalora_jax.common.devices", "nalora_jax.weights.quantization_config"}
    for example in ('mesh.shape["data"]', 'P(None, "run")', 'mesh.shape.get("context", 1)'):
        assert AXIS_PLACES.search(example), example


def _without_docstrings(source: str) -> ast.Module:
    """A syntax tree without statements that are only a text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            texts = [
                x for x in body if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
            ]
            node.body = [x for x in body if x not in texts] or [ast.Pass()]
    return tree


# Modules, nodes and longest chain of imports: of the way alone, and with the kind for text.
BOUNDS = {
    "nalora_jax.train.run": (127, 232_200, 16),
    "nalora_jax.kinds.text": (147, 274_600, 18),
}
AROUND = re.compile(
    r"^nalora_jax\.(cli|study|report|cpu|data\.images|models\.(families|vision|moe)|weights\.(base|gguf|card)"
    r"|evaluate\.(image_evaluation|preference_evaluation|vision)|loading\.adapted|train\.cards|kinds\.(images|preference|dual|rl))\b"
)


def count_nodes(tree: ast.Module) -> int:
    return sum(1 for _ in ast.walk(tree))


def test_the_way_of_a_run_is_short(modules: dict[str, Module]) -> None:
    """What `train.run` imports, and with it the kind for text; imports in functions count."""
    graph = {name: module.imported & modules.keys() for name, module in modules.items()}

    @functools.cache
    def chain(name: str) -> int:
        return 1 + max(map(chain, graph[name]), default=0)

    way: set[str] = set()
    for start, (count, nodes, longest) in BOUNDS.items():
        left = {start}
        while left:
            way |= left
            left = {below for name in left for below in graph[name]} - way
        assert len(way) <= count, (start, len(way))
        assert sum(count_nodes(modules[name].tree) for name in way) <= nodes, start
        assert chain(start) <= longest, start
    assert [name for name in sorted(way) if AROUND.match(name)] == []


# Names that several files define on purpose: what the file of every kind has, a logger, a type variable,
# a subcommand next to the function for programs. `cpu` implements operations under their names.
SAME_NAMES = {
    "KIND", "T", "adapter_evaluator", "batch_arrays", "build_step", "evaluator", "export_run", "limits",
    "log", "open_inputs", "program_parts",
}  # fmt: skip
# A subcommand has the command's name, a kind the name of its settings.
SAME_MODULES: set[str] = set()


def public_names(tree: ast.Module) -> set[str]:
    """Returns the public classes, functions and constants of a module."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def in_several_files(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Returns the names that several modules outside `cpu` have, with these modules."""
    homes: dict[str, list[str]] = {}
    for module, defined in names.items():
        for name in defined:
            if not module.startswith("nalora_jax.cpu."):
                homes.setdefault(name, []).append(module)
    return {name: several for name, several in homes.items() if len(several) > 1}


def test_a_public_name_has_one_meaning(modules: dict[str, Module]) -> None:
    names = {path: public_names(module.tree) - SAME_NAMES for path, module in modules.items()}
    assert in_several_files(names) == {}
    assert in_several_files({"one": {"Kind"}, "two": {"Kind"}, "three": {"Rule"}}) == {
        "Kind": ["one", "two"]
    }


def test_a_module_name_has_one_meaning(modules: dict[str, Module]) -> None:
    names = {path: {path.rpartition(".")[2]} for path in modules}
    files = {
        path: name for path, name in names.items() if name.isdisjoint({"__init__", "__main__"})
    }
    assert in_several_files(files) == {}
