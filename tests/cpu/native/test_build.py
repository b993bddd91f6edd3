"""When native kernels are used, and what happens where they cannot be compiled."""

from __future__ import annotations

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
from nalora_jax.models.remat import select_remat
from nalora_jax.ops.dispatch import numerics_for
from tests import tiny

pytestmark = pytest.mark.usefixtures("decided_anew")
REGISTERED = library._register  # with what this process has registered


@pytest.fixture
def decided_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered, and the cache is the folder that NALORA_CACHE names."""
    monkeypatch.setattr(library, "cache_dir", downloads.cache_dir)
    monkeypatch.setattr(library, "_register", functools.cache(library._register.__wrapped__))


def test_another_copy_of_the_library_is_not_registered_again(tmp_path, monkeypatch):
    """A process that compiles at the same time replaces the file, and NALORA_NATIVE names the kind
    in two ways."""
    monkeypatch.setattr(library, "_register", REGISTERED)
    jax.jit(jnp.sin)(1.0)  # XLA compares registrations once it has run
    monkeypatch.delenv("NALORA_NATIVE", raising=False)
    assert library.kind()
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path))
    monkeypatch.setenv("NALORA_NATIVE", processor.kinds()[0])
    assert library.kind()


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (None, "no C++ compiler was found; install g++ or name one in CXX"),
        ("#!/bin/sh\necho 'unknown option -mamx-tile' >&2\nexit 1\n", "unknown option -mamx-tile"),
    ],
)
def test_without_a_working_compiler_one_line_names_the_reason(
    compiler, message, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(processor, "kinds", lambda: ("tiles", "vectors"))
    for name, value in (("NALORA_NATIVE", ""), ("NALORA_CACHE", tmp_path / "cache"), ("CXX", "")):
        monkeypatch.setenv(name, str(value))
    if compiler is None:
        monkeypatch.setenv("PATH", "")
    else:
        (tmp_path / "c++").write_text(compiler)
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with caplog.at_level(logging.WARNING):
        assert not library.kind()
        assert not library.kind()
    # Other libraries may warn, such as JAX of a slow compilation on a busy machine.
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("nalora_jax")]
    assert [message in line for line in lines] == [True]
    assert not list((tmp_path / "cache").glob("native/*"))


AVX512 = "fma avx512f avx512bw avx512vl"


@pytest.mark.parametrize(
    ("machine", "flags", "kinds", "named"),
    [
        (
            "x86_64",
            f"{AVX512} avx512_bf16 amx_tile amx_bf16",
            ("tiles", "vectors"),
            "Xeon with AMX, ",
        ),
        ("x86_64", f"{AVX512} avx512_bf16", ("vectors",), "Xeon with AVX512-BF16, "),
        ("x86_64", f"{AVX512} avx2", ("floats",), "Xeon with AVX2, "),
        ("x86_64", "avx2", (), "Xeon, "),
        ("x86_64", None, (), ""),
        ("aarch64", f"{AVX512} avx512_bf16", (), "Xeon, "),
    ],
)
def test_kinds_are_those_that_the_cpu_has(machine, flags, kinds, named, tmp_path, monkeypatch):
    about = tmp_path / "cpuinfo"
    if flags is not None:
        core = f"processor\t: 0\nmodel name\t: Xeon\nvmx flags\t: none\nflags\t\t: {flags}\n"
        about.write_text(f"{core}\nprocessor\t: 1\n")
    monkeypatch.setattr(processor, "_DESCRIPTION", about)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "kinds", processor.kinds.__wrapped__)
    assert processor.kinds() == kinds
    assert processor.processor_name().startswith(named)


@pytest.mark.parametrize(
    ("kinds", "features", "expected"),
    [
        (("tiles", "vectors", "floats"), {"avx512f"}, "tiles"),
        (("floats",), {"avx2"}, "floats"),
        (("floats",), {"avx2", "avx512f"}, None),
        ((), set(), None),
    ],
)
def test_the_fastest_kind_is_taken_unless_xla_is_faster(
    kinds, features, expected, monkeypatch, caplog
):
    monkeypatch.setattr(processor, "kinds", lambda: kinds)
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    for choice in ("", "1"):
        monkeypatch.setenv("NALORA_NATIVE", choice)
        assert library.select_kernels() == expected
        assert library.kind(devices=8) is None
    monkeypatch.setenv("NALORA_NATIVE", "0")
    assert library.kind() is None
    assert caplog.messages == []
    monkeypatch.setenv("NALORA_NATIVE", "magic")
    with pytest.raises(
        NaloraError, match="NALORA_NATIVE: expected 0, 1 or, on this CPU, .*found magic"
    ):
        library.kind()


@pytest.mark.parametrize(
    ("kind", "d_model", "gated", "expected"),
    [
        ("tiles", 768, True, "attention"),
        ("tiles", 768, False, "dots"),  # one wide product to save, in place of two
        ("tiles", 2048, True, "dots"),
        ("vectors", 768, True, "dots"),
    ],
)
def test_matmuls_are_recomputed_where_that_is_faster(kind, d_model, gated, expected, monkeypatch):
    monkeypatch.setattr(library, "kind", lambda devices=1: kind)
    assert select_remat("auto", d_model, numerics_for("bfloat16", "cpu"), gated=gated) == expected


# ---------------------------------------------------------------- what is in the cache is run, so
# it is checked


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in the cache, which the compiler stub has "compiled": a copy of a small real
    one."""
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    stub = tmp_path / "c++"
    (source := stub.with_suffix(".cc")).write_text(
        'extern "C" int nalora_prepare() { return 0; }\n'
    )
    small = stub.with_suffix(".so")
    subprocess.run(
        [library.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(small)], check=True
    )
    stub.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {small} "$last"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("CXX", str(stub))
    return library.build(str(stub), "floats")


def test_the_cache_is_used_unless_it_was_cut_off_or_changed(compiled):
    written, whole = compiled.stat().st_mtime_ns, compiled.read_bytes()
    assert library.build(os.environ["CXX"], "floats") == compiled
    assert compiled.stat().st_mtime_ns == written
    assert [path.name for path in compiled.parent.iterdir()] == [compiled.name]
    assert compiled.parent.stat().st_mode & 0o777 == 0o700
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        compiled.write_bytes(damaged)
        assert library.build(os.environ["CXX"], "floats") == compiled
        assert compiled.read_bytes() == whole


def test_a_library_that_others_could_exchange_is_refused(compiled, tmp_path, monkeypatch):
    folder = compiled.parent

    def refused(reason: str) -> None:
        with pytest.raises(PermissionError, match=reason):
            library.build(os.environ["CXX"], "floats")

    for place, reason in (
        (folder, "only this user can write into"),
        (folder.parent, "others can exchange what"),
    ):
        place.chmod(0o777)
        refused(reason)
        place.chmod(0o700)
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    refused("is not a folder of this user's")
    folder.unlink()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    refused("is not a folder of this user's")
