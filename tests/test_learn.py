"""The pages that teach: their settings are settings, their commands are flags, their code runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nalora_jax.cli import command, config_files
from nalora_jax.config import check
from nalora_jax.train.callbacks import Callback, Callbacks, Ended, Started

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
    "quick_start.md",
    "from_peft.md",
    "from_trl.md",
    "callbacks.md",
    "memory.md",
    "serving.md",
    "troubleshooting.md",
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours on the pages: indented, or in a block of a shell."""
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for line in re.findall(r"^(?:    )?nalora (.*)$", text, re.MULTILINE):
            yield page, shlex.split(line, comments=True)


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda one: one if isinstance(one, str) else one[0])
def test_every_command_is_one(page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "run.yaml"):
        (tmp_path / name).write_text("steps: 3\n")
    words = words[: words.index(">")] if ">" in words else words
    if {"--help", "--help-all", "--version"} & set(words):
        return
    verb, args = command.parse(words)
    if verb == "train":
        check(args.run)


@pytest.mark.parametrize("page", PAGES)
def test_settings_on_a_page_are_settings(page: str, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        (tmp_path / "page.yaml").write_text(text)
        check(config_files.load_config(tmp_path / "page.yaml"))


def test_the_callback_of_the_page_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("callbacks.md", "python")
    space: dict = {}
    exec(compile(code.split("\nrun(")[0], "callbacks.md", "exec"), space)
    (kind,) = (
        one for one in space.values() if isinstance(one, type) and issubclass(one, Callback) and one is not Callback
    )
    told = Callbacks(None, [kind()])
    told.start(Started(tmp_path, {}))
    told.log(10, {"loss": 2.5})
    told.evaluation(10, {"loss": 2.0}, "")
    told.end(Ended(20, 10))
    assert "2.0" in capsys.readouterr().out


def test_errors_of_the_troubleshooting_page_are_errors_of_this_library() -> None:
    """Each heading is a part of a message that some module really raises."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "nalora_jax").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    headings = re.findall(r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 8
    for heading in headings:
        assert heading in source, heading
