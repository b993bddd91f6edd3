"""Every block of code on every page, executed: Python as it stands, on a tiny model where a page says a large one;
commands parsed and their settings checked; data read; configs loaded."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

import nalora_jax
from nalora_jax.cli import command, config_files
from nalora_jax.common import imports
from nalora_jax.config import DataConfig, MeshConfig, RunConfig, check
from nalora_jax.data import sources
from nalora_jax.data.chat import messages_of
from nalora_jax.data.forms import canonical
from nalora_jax.method import activations, rules, statistics
from nalora_jax.models import family
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What else than commands of this library the pages tell people to type.
OTHERS = {
    "pip",
    "hf",
    "export",
    "gcloud",
    "printf",
    "pre-commit",
    ".ci/run",
    "python3",
    ".",
    "jupyter",
    "git",
}
# Executed in tests/deploy.
OTHERS |= {"deploy/tpu_pod.sh", "sbatch", "kubectl", "docker", "python3.11", "~/nalora/bin/pip"}
OTHERS |= {"ssh-keygen", "ssh-add", "eval"}


class Block(NamedTuple):
    """A fenced block, or a command that is indented."""

    page: str
    line: int
    language: str
    title: str
    text: str


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(
        r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        yield Block(path.name, text[: found.start()].count("\n") + 1, found[1], found[2] or "", found[3])
    for found in re.finditer(r"^    (?:nalora|pip|python) .*\n", text, re.MULTILINE):
        yield Block(path.name, text[: found.start()].count("\n") + 1, "sh", "", found[0].strip())


def read_cells(path: Path) -> Iterator[Block]:
    """The code of a notebook, cell by cell."""
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            yield Block(path.name, number, "python", "", "".join(cell["source"]))


BLOCKS = [block for path in PAGES for block in read_blocks(path)]
BLOCKS += [block for path in NOTEBOOKS for block in read_cells(path)]


def of_language(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda one: f"{one.page}:{one.line}")


def test_every_block_is_of_a_kind_that_is_executed() -> None:
    fences = sum(path.read_text(encoding="utf-8").count("\n```") for path in PAGES)
    assert fences == 2 * sum(block.text.endswith("\n") for block in BLOCKS), (
        "a fence that is not understood"
    )
    unknown = [block for block in BLOCKS if block.language not in ("python", "sh", "json", "yaml", "toml")]
    assert [block.text.split("  =")[0] for block in unknown] == ["phi(z + dz) - phi(z)"]  # a formula


# -------------------------------------------------------------------- commands


def lines_of(text: str) -> Iterator[list[str]]:
    """The words of each command: continued lines are joined, pipes and chains taken apart."""
    lexer = shlex.shlex(
        text.replace("\\\n", " ").replace("\n", "\n;\n"), posix=True, punctuation_chars="|;&<>"
    )
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|;&"):
            if words:
                yield words[: words.index(">")] if ">" in words else words
            words = []
        else:
            words.append(word)


@of_language("sh")
def test_every_command_is_one(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "run.yaml"):
        (tmp_path / name).write_text("steps: 3\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, content in ((one.title, one.text) for one in BLOCKS if one.page == block.page and one.title):
        (tmp_path / name).write_text(content)  # what `--import` reads
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.setattr(rules.MECHANISMS, "_values", dict(rules.MECHANISMS._values))
    text = re.sub(r'"([^"]*)"', lambda quoted: quoted[0].replace("\n", " "), block.text)
    for words in lines_of(text):
        check_command(words)


def check_command(words: list[str]) -> None:
    name, *rest = words
    if words[:2] == ["python", "train.py"]:
        name, rest = "nalora", ["train", *rest[1:]]
    if name == "nalora":
        if not {"--help", "--help-all", "--version"} & set(rest):
            verb, args = command.parse(rest)
            if verb == "train":
                check(args.run)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
    elif words[:2] == ["python", "-m"] and rest[1].startswith("tests."):
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), words
    elif name == "python" and rest[0].startswith("benchmarks/"):
        assert (ROOT / rest[0]).exists(), words
    elif name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"(?:\.|nalora_jax)\[(\w+)\]", " ".join(words)):
            assert extra in project["optional-dependencies"], extra
    else:
        assert name in OTHERS, words


# -------------------------------------------------------------------- data and settings


@of_language("json")
def test_records_of_a_page_are_read(block: Block) -> None:
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        record, where = json.loads(line), f"{block.page}: {number}"
        if "chosen" in record:
            assert "rejected" in record, where
            continue
        found = canonical(record, DataConfig(), where)
        if "messages" in found:
            assert messages_of(found, DataConfig(), where)[-1]["role"] == "assistant", where
        else:
            assert found["prompt"] or "text" in record, where
            assert found["completion"], where


@of_language("yaml")
def test_settings_of_a_page_are_settings(block: Block, tmp_path: Path) -> None:
    keys = set(yaml.safe_load(block.text))
    if keys <= {one.name for one in fields(RunConfig)}:
        (tmp_path / "page.yaml").write_text(block.text)
        check(config_files.load_config(tmp_path / "page.yaml"))
    else:  # a task of the evaluation harness
        assert {"task", "doc_to_text", "doc_to_target", "metric_list"} <= keys


@of_language("toml")
def test_entry_points_of_a_page_are_groups_of_this_library(block: Block) -> None:
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    activations.get("silu")  # registers the built-in activations
    registries = (rules.MECHANISMS, statistics.TABLE, activations.ACTIVATIONS, family.REGISTERED)
    known = {registry._group for registry in (*registries, sources._OPENERS)}
    assert set(groups) <= known


# -------------------------------------------------------------------- Python


class World(NamedTuple):
    """Where pages are executed."""

    folder: Path
    run: Callable[..., Any]  # `nalora_jax.run` with everything small


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model in place of the pages' own; a run with the settings and data of another is its copy."""
    folder = tmp_path_factory.mktemp("pages")
    small, whole = tiny.make_config(folder, mesh=MeshConfig(data=-1)), nalora_jax.run
    finished: list[tuple[RunConfig, Any, Any]] = []  # settings, data, result

    def run_once(config: RunConfig, data: Any) -> Any:
        """A run, or a copy of the folder of an earlier one with the same settings and data."""
        for other, records, result in finished:
            if replace(other, output=config.output) == config and records == data:
                target = shutil.copytree(result.folder, Path(config.output))
                moved = {name: target / getattr(result, name).name for name in ("adapter", "report")}
                return replace(result, folder=target, **moved)
        result = whole(config, data=data)
        finished.append((config, data, replace(result, folder=result.folder.absolute())))
        return result

    def run(config: RunConfig, *, data: Any = None, **more: Any) -> Any:
        check(config)
        chosen = replace(
            small,
            output=config.output,
            steps=min(config.steps, 2),
            epochs=config.epochs,
            lora=replace(small.lora, modules_to_save=config.lora.modules_to_save),
        )
        if data is not None:
            chosen = replace(chosen, data=replace(config.data, max_length=16, eval_limit=4, select_limit=2))
        return whole(chosen, data=data, **more) if more else run_once(chosen, data)

    return World(folder, run)


# What a page's code takes from the reader, by page.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "checkpoints.md": lambda: {
        "model": SimpleNamespace(fingerprint="0" * 8),
        "config": RunConfig(),
        "step": 1,
        "state": {"b": jnp.ones(3)},
        "data_state": {"row": 5},
    },
    "data.md": lambda: {"Builder": Builder},
    "quick_start.md": lambda: {
        "my_records": [{"prompt": f"{a} {b}", "completion": " z"} for a in "abcdefgh" for b in "ijklmnop"]
    },
}


class Builder:
    """Takes what a TFDS builder takes; tests/data/test_sources.py prepares and reads a real one."""

    def __init__(self, **options: Any) -> None:
        import tensorflow_datasets as tfds

        inspect.signature(tfds.core.GeneratorBasedBuilder).bind(**options)

    def download_and_prepare(self) -> None:
        """Nothing."""


def execute(world: World, page: str, monkeypatch: pytest.MonkeyPatch, folder: str = "") -> dict[str, Any]:
    """All Python of a page in one namespace, in order, in a folder of its own; returns the namespace."""
    place = world.folder / (folder or page.removesuffix(".md"))
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setattr(nalora_jax, "run", world.run)
    space = GIVEN.get(page, dict)()
    for block in BLOCKS:
        if block.page == page and block.language == "python" and not block.title:
            exec(compile("\n" * block.line + block.text, page, "exec"), space)
    return space


def test_files_of_a_page_have_tests_of_their_own() -> None:
    """In tests/test_change_one_thing.py, tests/method/test_adapt.py and tests/train/test_rewards.py."""
    pages = {block.page for block in BLOCKS if block.title}
    assert pages == {"change_one_thing.md", "own_models.md", "rl.md"}


def test_the_callback_of_the_page_listens(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = execute(world, "change_one_thing.md", monkeypatch)["Best"]
    assert re.search(r"step \d: \d\.\d{3} is the best so far", capsys.readouterr().out)
    assert best.lowest == float("inf")


def test_checkpoints_from_python(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    space = execute(world, "checkpoints.md", monkeypatch)
    np.testing.assert_array_equal(space["state"]["b"], 1)
    assert space["data_state"] == {"row": 5}


def test_data_from_python_and_new_tokens_in_transformers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "peft"):
        pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = execute(world, "data.md", monkeypatch)
    (line, *_) = Path("runs/mail/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["data"]["examples"] == 280  # 20 are held out
    assert space["tokenizer"].tokenize("1<|call|>2")[1] == "<|call|>"
    assert (
        space["model"].get_input_embeddings().weight.shape[0]
        == len(space["tokenizer"])
        == len(tiny.WORDS) + 1
    )


def test_the_quick_start_generates_and_its_adapter_is_served_by_peft(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    assert execute(world, "quick_start.md", monkeypatch)["result"].adapter == Path("runs/mine/adapter")
    assert re.search(r"^\['.*'\]$", capsys.readouterr().out, re.MULTILINE)
    load = transformers.AutoModelForCausalLM.from_pretrained
    local = staticmethod(lambda name: load(world.folder / "model"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = execute(world, "serving.md", monkeypatch, folder="quick_start")
    served = space["peft_model"]
    assert isinstance(served, peft.PeftModel)
    assert any(float(p.abs().max()) > 0 for name, p in served.named_parameters() if "lora_B" in name)


# -------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    try:
        space = execute(world, path.name, monkeypatch, folder=path.stem)
        assert bool(plt.get_fignums()) == ("plt" in space)
    finally:
        plt.close("all")
