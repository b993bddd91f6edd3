"""Files of a user's own that are executed before a run."""

from pathlib import Path

import pytest

from nalora_jax.cli import command
from nalora_jax.common import imports
from nalora_jax.common.imports import import_file
from nalora_jax.errors import NaloraError
from nalora_jax.method import rules

pytestmark = pytest.mark.usefixtures("registries")

RULE = """
from dataclasses import dataclass
from nalora_jax.method.rules import Mechanism, register_mechanism

@register_mechanism("plain_of_{name}")
@dataclass(frozen=True)
class Plain(Mechanism):
    share: float = 0.5
"""


@pytest.fixture
def registries(monkeypatch):
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.setattr(rules.MECHANISMS, "_values", dict(rules.MECHANISMS._values))


def written(path, name):
    path.write_text(RULE.format(name=name), encoding="utf-8")
    return path


def test_a_file_is_executed_once_and_recorded_with_its_digest(tmp_path):
    path = written(tmp_path / "mine.py", "file")
    first = import_file(str(path))
    assert import_file(f"{path}@{first.digest[:12]}") is first
    assert str(first) == f"{path}@{first.digest[:12]}"
    assert rules.make("plain_of_file:share=0.25").share == 0.25
    assert not (tmp_path / "__pycache__").exists()


def test_a_path_with_an_at_sign_is_imported_and_recorded_with_its_digest(tmp_path):
    folder = tmp_path / "me@host"
    folder.mkdir()
    path = written(folder / "rule@2.py", "path_with_an_at_sign")
    recorded = str(import_file(str(path)))
    assert recorded.startswith(f"{path}@")
    assert str(import_file(recorded)) == recorded
    written(path, "changed")
    with pytest.raises(NaloraError, match="expected content with SHA-256"):
        import_file(recorded)


def test_a_file_that_changed_is_refused(tmp_path):
    path = written(tmp_path / "mine.py", "changed")
    before = import_file(str(path))
    written(path, "changed_too")
    for name in (str(path), str(before)):
        message = f"--import .*expected content with SHA-256 {before.digest[:12]}"
        with pytest.raises(NaloraError, match=message):
            import_file(name)


def test_any_subcommand_imports_files(tmp_path):
    path = written(tmp_path / "mine.py", "flag")
    _, args = command.parse(["report", f"--import={path}", "runs/a"])
    assert args.run == (Path("runs/a"),)
    assert rules.make("plain_of_flag").share == 0.5
    with pytest.raises(NaloraError, match="--import: expected Python files"):
        command.parse(["train", "--import", "--steps", "5"])


def test_settings_files_and_recorded_runs_execute_no_files(tmp_path, monkeypatch):
    path = written(tmp_path / "mine.py", "settings")
    config = tmp_path / "run.yaml"
    config.write_text(f"imports: [{path}]\n", encoding="utf-8")
    with pytest.raises(NaloraError, match=f"no imports, which execute files.*give --import {path}"):
        command.parse(["train", "--config", str(config)])
    run = {"kind": "config", "config": {"imports": [str(path)], "steps": 7}}
    monkeypatch.setattr(
        "nalora_jax.evaluate.run_log.recorded_settings", lambda folder: run["config"]
    )
    _, args = command.parse(["train", "--output", str(tmp_path), "--resume"])
    assert (args.run.steps, args.run.imports) == (7, ())
    assert not imports.list_imported_files()
