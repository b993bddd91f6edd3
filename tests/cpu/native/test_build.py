"""When native kernels are used, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from nalora_jax.cpu import processor
from nalora_jax.cpu.native import library
from nalora_jax.errors import NaloraError


@pytest.fixture(autouse=True)
def _decided_anew() -> Iterator[None]:
    library._available.cache_clear()
    yield
    library._available.cache_clear()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one CPU with tiles."""
    monkeypatch.setattr(library, "kinds", lambda: ("tiles", "vectors", "plain"))
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


@pytest.mark.parametrize(
    ("choice", "devices", "kinds"),
    [("0", 1, ("tiles", "plain")), ("1", 8, ("tiles", "plain")), ("vectors", 8, ("vectors",)), ("1", 1, ("plain",))],
)
def test_where_xla_does_the_work(
    choice: str, devices: int, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NALORA_NATIVE", choice)
    monkeypatch.setattr(library, "kinds", lambda: kinds)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert not library.available()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fma avx512f avx512bw avx512vl avx512_bf16 amx_tile amx_bf16", ("tiles", "vectors", "plain")),
        ("x86_64", "fma avx512f avx512bw avx512vl avx512_bf16", ("vectors", "plain")),
        ("x86_64", "fma avx512f avx512bw avx512vl avx2", ("floats", "plain")),
        ("x86_64", "fma avx2", ("floats", "plain")),
        ("x86_64", "avx2", ("plain",)),
        ("x86_64", None, ("plain",)),
        ("aarch64", "fma avx512f avx512bw avx512vl avx512_bf16", ("plain",)),
    ],
)
def test_kinds_are_those_that_the_cpu_has(
    machine: str, flags: str | None, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "cpuinfo"
    if flags is not None:
        about.write_text(f"processor\t: 0\nvmx flags\t: none\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(processor, "_DESCRIPTION", about)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert library.kinds.__wrapped__() == expected


@pytest.mark.parametrize(
    ("kinds", "features", "expected"),
    [
        (("tiles", "vectors", "floats", "plain"), {"avx512f"}, "tiles"),
        (("vectors", "floats", "plain"), {"avx512f"}, "vectors"),
        (("floats", "plain"), {"avx2"}, "floats"),
        (("floats", "plain"), {"avx2", "avx512f"}, None),
        (("plain",), set(), None),
    ],
)
def test_the_fastest_kind_is_taken_unless_xla_is_faster(
    kinds: tuple[str, ...], features: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "kinds", lambda: kinds)
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    assert library.kind("") == library.kind("1") == expected


def test_a_kind_that_this_cpu_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "kinds", lambda: ("vectors", "plain"))
    monkeypatch.setenv("NALORA_NATIVE", "tiles")
    with pytest.raises(NaloraError, match="expected 0, 1 or, on this CPU, vectors or plain, found tiles"):
        library.available()


def test_what_was_compiled_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    made = library.build(library.find_compiler(), "plain")
    written = made.stat().st_mtime_ns
    assert library.build(library.find_compiler(), "plain") == made
    assert made.stat().st_mtime_ns == written
    assert [path.name for path in made.parent.iterdir()] == [made.name]
