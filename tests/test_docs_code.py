"""Every block of code on every page, executed: Python as it stands, on a tiny model where a page
says a large one; commands parsed and their settings checked; data read; configs loaded. Pages are
listed, and links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import create_autospec

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow_datasets
import yaml

import nalora_jax
from nalora_jax.cli import command, config_files
from nalora_jax.common import imports
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data import sources
from nalora_jax.data.chat_text import messages_of
from nalora_jax.data.forms import canonical
from nalora_jax.kinds.record import check_run_config
from nalora_jax.method import activations, rules, statistics
from nalora_jax.models import family
from tests import tiny

ROOT = Path(__file__).parent.parent
DOCS = {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
PAGES = [*(ROOT / "docs" / name for name in DOCS), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES.append(ROOT / "nalora_jax" / "method" / "README.md")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What else than commands of this library the pages tell people to type; the second half is executed
# in tests/deploy.
OTHERS = {
    "pip", "hf", "export", "gcloud", "printf", "pre-commit", ".ci/run", "python3", ".", "jupyter", "git",
    "deploy/tpu_pod.sh", "sbatch", "kubectl", "docker", "python3.11", "~/nalora/bin/pip", "ssh-keygen", "ssh-add",
    "eval",
}  # fmt: skip


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    assert {*re.findall(r"\]\((\w+\.md)\)", DOCS["index.md"]), "index.md"} == DOCS.keys()
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"(\w+\.md)$", navigation.split("\nvalidation:")[0], re.MULTILINE)
    assert sorted(listed) == list(DOCS)


def test_links_and_paths_of_pages_lead_somewhere() -> None:
    text = "\n".join(DOCS.values())
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(
        r"`((?:nalora_jax|configs|benchmarks|studies|tests|deploy)/[\w./-]*\w)`", text
    ):
        deleted = path.startswith(("nalora_jax/cpu", "tests/cpu")) and not tiny.HAS_CPU  # it may be
        assert deleted or (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def test_the_reference_has_all_that_packages_export() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", DOCS["reference.md"], re.MULTILINE)
    sources = [importlib.import_module(name) for name in listed]
    for package in map(importlib.import_module, ("nalora_jax", "nalora_jax.evaluate.generate")):
        for name in package.__all__:
            value = getattr(package, name)
            assert value in sources or any(getattr(one, name, None) is value for one in sources), (
                name
            )


def test_errors_of_the_troubleshooting_page_are_errors_of_this_library() -> None:
    """Each heading is a part of a message that some module really raises."""
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "nalora_jax").rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    headings = re.findall(r"^## `(.+)`$", DOCS["troubleshooting.md"], re.MULTILINE)
    assert len(headings) > 8
    for heading in headings:
        assert heading in source, heading


class Block(NamedTuple):
    """A fenced block, a command that is indented, or a notebook's cell of code."""

    page: str
    line: int
    language: str
    title: str
    text: str


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of a page or notebook, in order."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            if cell["cell_type"] == "code":
                yield Block(path.name, number, "python", "", "".join(cell["source"]))
        return
    fences = r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$"
    for found in re.finditer(fences, text, re.MULTILINE | re.DOTALL):
        yield Block(
            path.name, text[: found.start()].count("\n") + 1, found[1], found[2] or "", found[3]
        )
    for found in re.finditer(r"^    (?:nalora|pip|python) .*\n", text, re.MULTILINE):
        yield Block(path.name, text[: found.start()].count("\n") + 1, "sh", "", found[0].strip())


BLOCKS = [block for path in (*PAGES, *NOTEBOOKS) for block in read_blocks(path)]


def test_every_block_is_of_a_kind_that_is_executed() -> None:
    fences = sum(path.read_text(encoding="utf-8").count("\n```") for path in PAGES)
    fenced = [
        block for block in BLOCKS if block.text.endswith("\n") and not block.page.endswith(".ipynb")
    ]
    assert fences == 2 * len(fenced), "a fence that is not understood"
    unknown = [
        block for block in BLOCKS if block.language not in ("python", "sh", "json", "yaml", "toml")
    ]
    assert [block.text.split("  =")[0] for block in unknown] == [
        "phi(z + dz) - phi(z)"
    ]  # a formula
    # These have tests of their own, in test_change_one_thing.py, method/test_adapt.py,
    # kinds/test_rewards.py and kinds/test_environments.py.
    assert {block.page for block in BLOCKS if block.title} == {
        "README.md",
        "change_one_thing.md",
        "environments.md",
        "own_models.md",
        "rl.md",
    }


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: continued lines are joined, pipes and chains taken apart."""
    text = re.sub(r'"([^"]*)"', lambda quoted: quoted[0].replace("\n", " "), text)
    text = text.replace("\\\n", " ").replace("\n", "\n;\n")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set("|;&"):
            words.append(word)
            continue
        if words:
            yield words[: words.index(">")] if ">" in words else words
        words = []


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "sh"}))
def test_every_command_is_one(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "run.yaml"):
        Path(name).write_text("steps: 3\n")
    Path("configs").symlink_to(ROOT / "configs")
    here = [block for block in BLOCKS if block.page == page]
    for block in here:
        if block.title:  # what `--import` reads
            Path(block.title).write_text(block.text)
    for block in here:
        if block.language == "sh":
            monkeypatch.setattr(imports, "_IMPORTED", {})
            monkeypatch.setattr(rules.MECHANISMS, "_values", dict(rules.MECHANISMS._values))
            for words in commands(block.text):
                check_command(words)


def check_command(words: list[str]) -> None:
    name, *rest = words
    if words[:2] == ["python", "train.py"]:
        name, rest = "nalora", ["train", *rest[1:]]
    if name == "nalora":
        if not {"--help", "--help-all", "--version"} & set(rest):
            verb, args = command.parse(rest)
            if verb == "train":
                check_run_config(args.run)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
    elif words[:2] == ["python", "-m"] and rest[1].startswith("tests."):
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), words
    elif name == "python" and rest[0].startswith("benchmarks/"):
        assert (ROOT / rest[0]).exists(), words
    elif name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"(?:\.|nalora_jax)\[(\w+)\]", " ".join(words))
        assert set(extras) <= project["optional-dependencies"].keys(), words
    else:
        assert name in OTHERS, words


@pytest.mark.parametrize(
    "block",
    [one for one in BLOCKS if one.language in ("json", "yaml", "toml")],
    ids=lambda one: one.page,
)
def test_records_settings_and_entry_points_of_pages_are_read(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        for record in map(json.loads, block.text.splitlines()):
            if "chosen" in record:
                assert "rejected" in record
                continue
            if "query" in record:
                assert {"document", "label"} <= record.keys()
                continue
            found = canonical(record, DataConfig(), block.page)
            if "messages" in found:
                assert messages_of(found, DataConfig(), block.page)[-1]["role"] == "assistant"
            else:
                assert found["prompt"] or "text" in record
                assert found["completion"]
    elif block.language == "yaml":
        keys = set(yaml.safe_load(block.text))
        if keys <= {one.name for one in fields(RunConfig)}:
            (tmp_path / "page.yaml").write_text(block.text)
            check_run_config(config_files.load_config(tmp_path / "page.yaml"))
        else:  # a task of the evaluation harness
            assert {"task", "doc_to_text", "doc_to_target", "metric_list"} <= keys
    else:
        activations.get_activation("silu")  # registers the built-in activations
        registries = (
            rules.MECHANISMS,
            statistics.TABLE,
            activations.ACTIVATIONS,
            family.REGISTERED,
        )
        known = {registry._group for registry in (*registries, sources._OPENERS)}
        assert set(tomllib.loads(block.text)["project"]["entry-points"]) <= known


# What a page's code takes from the reader, by page; tests/data/test_sources.py prepares a real TFDS
# data set.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "checkpoints.md": lambda: {
        "model": SimpleNamespace(fingerprint="0" * 8),
        "config": RunConfig(),
        "step": 1,
        "state": {"b": jnp.ones(3)},
        "data_state": {"row": 5},
    },
    "data.md": lambda: {"Builder": create_autospec(tensorflow_datasets.core.GeneratorBasedBuilder)},
    "quick_start.md": lambda: {
        "my_records": [
            {"prompt": f"{a} {b}", "completion": " z"} for a in "abcdefgh" for b in "ijklmnop"
        ]
    },
}
Execute = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where pages are executed, with a tiny model in place of the pages' own."""
    folder = tmp_path_factory.mktemp("pages")
    with tiny.on_named_devices(folder / "cache"):
        yield folder


@pytest.fixture
def execute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Executes all Python of a page in one namespace, in order, in a folder of its own, with
    everything small."""
    small, whole = tiny.make_config(folder), nalora_jax.run

    def small_run(config: RunConfig, *, data: Any = None, **more: Any) -> Any:
        check_run_config(config)
        lora = replace(small.lora, modules_to_save=config.lora.modules_to_save)
        given = {"output": config.output, "epochs": config.epochs, "lora": lora}
        if data is not None:
            given["data"] = replace(config.data, max_length=16, eval_limit=4, select_limit=2)
        return whole(replace(small, steps=min(config.steps, 2), **given), data=data, **more)

    def execute(page: str, place: str = "") -> dict[str, Any]:
        (folder / (place or Path(page).stem)).mkdir(exist_ok=True)
        monkeypatch.chdir(folder / (place or Path(page).stem))
        space = GIVEN.get(page, dict)()
        for block in BLOCKS:
            if block.page == page and block.language == "python" and not block.title:
                exec(compile("\n" * block.line + block.text, page, "exec"), space)
        return space

    monkeypatch.setattr(nalora_jax, "run", small_run)
    return execute


def test_the_callback_of_the_page_listens(
    execute: Execute, capsys: pytest.CaptureFixture[str]
) -> None:
    best = execute("change_one_thing.md")["Best"]
    assert re.search(r"step \d: \d\.\d{3} is the best so far", capsys.readouterr().out)
    assert best.lowest == float("inf")


def test_checkpoints_from_python(execute: Execute) -> None:
    space = execute("checkpoints.md")
    np.testing.assert_array_equal(space["state"]["b"], 1)
    assert space["data_state"] == {"row": 5}


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_data_from_python_and_new_tokens_in_transformers(execute: Execute) -> None:
    for name in ("transformers", "peft"):
        pytest.importorskip(name)
    space = execute("data.md")
    assert tiny.lines("runs/mail")[0]["data"]["examples"] == 280  # 20 are held out
    assert space["tokenizer"].tokenize("1<|call|>2")[1] == "<|call|>"
    rows = space["model"].get_input_embeddings().weight.shape[0]
    assert rows == len(space["tokenizer"]) == len(tiny.WORDS) + 1


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_quick_start_generates_and_its_adapter_is_served_by_peft(
    execute, folder, monkeypatch, capsys
):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    assert execute("quick_start.md")["result"].adapter == Path("runs/mine/adapter")
    assert re.search(r"^\['.*'\]$", capsys.readouterr().out, re.MULTILINE)
    load = transformers.AutoModelForCausalLM.from_pretrained
    local = staticmethod(lambda name: load(folder / "model"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", local)
    served = execute("serving.md", place="quick_start")["peft_model"]
    assert isinstance(served, peft.PeftModel)
    assert any(
        float(p.abs().max()) > 0 for name, p in served.named_parameters() if "lora_B" in name
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, execute: Execute) -> None:
    matplotlib.use("agg")
    try:
        space = execute(path.name)
        assert bool(plt.get_fignums()) == ("plt" in space)
    finally:
        plt.close("all")
