"""When native kernels are used, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from nalora_jax.native import library


@pytest.fixture(autouse=True)
def _decided_anew() -> Iterator[None]:
    library._available.cache_clear()
    yield
    library._available.cache_clear()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one CPU with tiles."""
    monkeypatch.setattr(library, "has_tiles", lambda: True)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("choice", ["1", ""])
def test_a_missing_compiler_is_named_once_and_xla_goes_on(
    choice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NALORA_NATIVE", choice)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not library.available()
        assert not library.available()
    assert len(caplog.messages) == 1
    assert "no C++ compiler was found; install g++ or name one in CXX" in caplog.text


@pytest.mark.usefixtures("tiles")
def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown option -mamx-tile' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("NALORA_NATIVE", "1")
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert not library.available()
    assert "unknown option -mamx-tile" in caplog.text
    assert list((tmp_path / "cache" / "native").iterdir()) == []


@pytest.mark.parametrize(("choice", "devices", "has_tiles"), [("0", 1, True), ("1", 8, True), ("1", 1, False)])
def test_where_xla_does_the_work(
    choice: str, devices: int, has_tiles: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NALORA_NATIVE", choice)
    monkeypatch.setattr(library, "has_tiles", lambda: has_tiles)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert not library.available()
    assert caplog.messages == []


def test_what_was_compiled_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    made = library.build(library.find_compiler(), tiles=False)
    written = made.stat().st_mtime_ns
    assert library.build(library.find_compiler(), tiles=False) == made
    assert made.stat().st_mtime_ns == written
    assert [path.name for path in made.parent.iterdir()] == [made.name]
