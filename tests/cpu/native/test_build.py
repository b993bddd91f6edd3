"""When native kernels are used, and what happens where they cannot be compiled."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.common import downloads, processor
from nalora_jax.cpu.native import library
from nalora_jax.errors import NaloraError
from tests import tiny

pytestmark = pytest.mark.usefixtures("decided_anew")
REGISTERED = library._registered  # with what this process has registered


@pytest.fixture
def decided_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered, and the cache is the folder that NALORA_CACHE names."""
    monkeypatch.setattr(library, "cache_dir", downloads.cache_dir)
    monkeypatch.setattr(library, "_registered", functools.cache(library._registered.__wrapped__))


def test_another_copy_of_the_library_is_not_registered_again(tmp_path, monkeypatch):
    """A process that compiles at the same time replaces the file, and NALORA_NATIVE names the kind in two ways."""
    monkeypatch.setattr(library, "_registered", REGISTERED)
    jax.jit(jnp.sin)(1.0)  # XLA compares registrations once it has run
    monkeypatch.delenv("NALORA_NATIVE", raising=False)
    assert library.kind()
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path))
    monkeypatch.setenv("NALORA_NATIVE", processor.kinds()[0])
    assert library.kind()


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one CPU with tiles."""
    monkeypatch.setattr(processor, "kinds", lambda: ("tiles", "vectors"))


@pytest.mark.usefixtures("tiles")
def test_a_missing_compiler_is_named_once_and_xla_goes_on(monkeypatch, caplog):
    monkeypatch.setenv("NALORA_NATIVE", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not library.kind()
        assert not library.kind()
    assert len(caplog.messages) == 1
    assert "no C++ compiler was found; install g++ or name one in CXX" in caplog.text


@pytest.mark.usefixtures("tiles")
def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown option -mamx-tile' >&2\nexit 1\n")
    compiler.chmod(0o755)
    for name, value in (("CXX", compiler), ("NALORA_NATIVE", "1"), ("NALORA_CACHE", tmp_path / "cache")):
        monkeypatch.setenv(name, str(value))
    with caplog.at_level(logging.WARNING):
        assert not library.kind()
    assert "unknown option -mamx-tile" in caplog.text
    assert list((tmp_path / "cache" / "native").iterdir()) == []


AVX512 = "fma avx512f avx512bw avx512vl"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", f"{AVX512} avx512_bf16 amx_tile amx_bf16", ("tiles", "vectors")),
        ("x86_64", f"{AVX512} avx512_bf16", ("vectors",)),
        ("x86_64", f"{AVX512} avx2", ("floats",)),
        ("x86_64", "fma avx2", ("floats",)),
        ("x86_64", "avx2", ()),
        ("x86_64", None, ()),
        ("aarch64", f"{AVX512} avx512_bf16", ()),
    ],
)
def test_kinds_are_those_that_the_cpu_has(machine, flags, expected, tmp_path, monkeypatch):
    about = tmp_path / "cpuinfo"
    if flags is not None:
        about.write_text(f"processor\t: 0\nvmx flags\t: none\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(processor, "_DESCRIPTION", about)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert processor.kinds.__wrapped__() == expected


@pytest.mark.parametrize(
    ("kinds", "features", "expected"),
    [
        (("tiles", "vectors", "floats"), {"avx512f"}, "tiles"),
        (("floats",), {"avx2"}, "floats"),
        (("floats",), {"avx2", "avx512f"}, None),
        ((), set(), None),
    ],
)
def test_the_fastest_kind_is_taken_unless_xla_is_faster(kinds, features, expected, monkeypatch, caplog):
    monkeypatch.setattr(processor, "kinds", lambda: kinds)
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    for choice in ("", "1"):
        monkeypatch.setenv("NALORA_NATIVE", choice)
        assert library.chosen() == expected
        assert library.kind(devices=8) is None
    monkeypatch.setenv("NALORA_NATIVE", "0")
    assert library.kind() is None
    assert caplog.messages == []


def test_a_kind_that_this_cpu_has_not_is_refused(monkeypatch):
    monkeypatch.setattr(processor, "kinds", lambda: ("vectors",))
    monkeypatch.setenv("NALORA_NATIVE", "tiles")
    with pytest.raises(NaloraError, match="expected 0, 1 or, on this CPU, vectors, found tiles"):
        library.kind()


# ---------------------------------------------------------------- what is in the cache is run, so it is checked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in the cache, which the compiler stub has "compiled": a copy of a small real one."""
    stub = cache.parent.parent / "c++"
    (source := stub.with_suffix(".cc")).write_text('extern "C" int nalora_prepare() { return 0; }\n')
    small = stub.with_suffix(".so")
    subprocess.run([library.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(small)], check=True)
    stub.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {small} "$last"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("CXX", str(stub))
    return library.build(str(stub), "floats")


def test_what_was_compiled_is_taken_from_the_cache(compiled):
    written = compiled.stat().st_mtime_ns
    assert library.build(os.environ["CXX"], "floats") == compiled
    assert compiled.stat().st_mtime_ns == written
    assert [path.name for path in compiled.parent.iterdir()] == [compiled.name]
    assert compiled.parent.stat().st_mode & 0o777 == 0o700


def test_a_library_that_was_cut_off_or_changed_is_compiled_again(compiled):
    whole = compiled.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        compiled.write_bytes(damaged)
        assert library.build(os.environ["CXX"], "floats") == compiled
        assert compiled.read_bytes() == whole


def test_a_library_that_others_could_exchange_is_not_loaded(compiled, tmp_path, monkeypatch):
    loaded, folder = [], compiled.parent
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)

    def refused(reason: str | None = None) -> None:
        with pytest.raises(PermissionError, match=reason):
            library.build(os.environ["CXX"], "floats")

    folder.chmod(0o777)
    refused("only this user can write into")
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    refused("others can exchange what is in")
    folder.parent.chmod(0o700)
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    refused()
    folder.unlink()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    refused()
    assert loaded == []


@pytest.mark.usefixtures("compiled")
def test_a_library_without_a_function_falls_back_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(processor, "kinds", lambda: ("floats",))
    monkeypatch.setenv("NALORA_NATIVE", "floats")
    with caplog.at_level(logging.WARNING):
        assert not library.kind()
    assert len(caplog.messages) == 1
    assert "is not of this version" in caplog.text
