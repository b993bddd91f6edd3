"""The instructions of `studies/instruction_data.py`, from the archive that contains them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.common import imports
from nalora_jax.config import DataConfig
from nalora_jax.data import sources
from nalora_jax.data.sources import open_source
from nalora_jax.errors import NaloraError

HELPER = Path(__file__).parents[2] / "studies" / "instruction_data.py"
RECORDS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello!"},
    {"instruction": "Add.", "input": "1 2", "output": "It is 3."},  # again, with another answer
    {"instruction": "Add.", "input": "2 2", "output": "4" * 50},
]


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of the file, whose data set is registered for one test."""
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.setattr(sources._OPENERS, "_values", dict(sources._OPENERS._values))
    imports.import_file(str(HELPER))
    return sources._OPENERS.get("alpaca_demo").__globals__


@pytest.fixture
def write(
    helper: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[dict[str, str]]], Path]:
    """Writes an archive with these records, and declares its checksum."""
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))

    def archive(records: list[dict[str, str]]) -> Path:
        content, member = json.dumps(records).encode(), tarfile.TarInfo(helper["_MEMBER"])
        member.size = len(content)
        path = tmp_path / "packages" / "llamafactory-0.9.5.tar.gz"
        path.parent.mkdir()
        with tarfile.open(path, "w:gz") as file:
            file.addfile(member, io.BytesIO(content))
        monkeypatch.setitem(helper, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return archive


def outputs(dataset: str, split: str) -> list[str]:
    source = open_source(DataConfig(dataset=dataset), split)
    return [record["output"] for record in source.read(range(len(source)))]


def test_repeated_and_long_instructions_are_left_out(write: Callable[..., Path]) -> None:
    write(RECORDS)
    assert outputs("alpaca_demo", "train") == ["3", "Hello!", "4" * 50]
    assert outputs("alpaca_demo:40", "train") == ["3", "Hello!"]
    assert outputs("alpaca_demo", "train[-1:]") == ["4" * 50]


def test_a_limit_that_is_no_number_is_refused(helper: dict[str, Any]) -> None:
    with pytest.raises(
        NaloraError, match="alpaca_demo:short: expected a number of characters, found short"
    ):
        open_source(DataConfig(dataset="alpaca_demo:short"), "train")


@pytest.mark.network
def test_the_instructions_of_the_package(helper: dict[str, Any]) -> None:
    assert len(outputs("alpaca_demo", "train")) == 985
    assert len(outputs("alpaca_demo:400", "train")) == 404
