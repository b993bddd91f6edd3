"""Compiled programs are kept in a folder that nobody else can write into, or not at all; freed memory goes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from nalora_jax.train.compilation import use_compilation_cache

pytestmark = pytest.mark.usefixtures("as_before")

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def as_before() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()  # JAX holds on to the folder of its first use


def test_the_folder_is_made_private_and_not_used_if_others_can_write_into_it(tmp_path, monkeypatch, caplog):
    folder, before = tmp_path / "compiled", jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    folder.mkdir()
    folder.chmod(0o777)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept: ")
    folder.rmdir()
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with one program in it."""
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    use_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()
    # The process needs no file of a program that it has compiled before: this one is of this test alone.
    jax.jit(lambda x: x * len(str(tmp_path)) + hash(str(tmp_path)) % 1_000_003).lower(1.0).compile()
    return tmp_path / "compiled"


def test_a_flipped_bit_costs_a_compilation(compiled: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = compiled / names(compiled)[0]
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    use_compilation_cache()
    assert names(compiled) == []
    assert caplog.messages == [f"compiled programs in {compiled} were damaged (1): compiling them again"]


HOLDS = """
from nalora_jax.train.compilation import settle_heap

def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024

blocks = [b"x" * (100_000 + i % 7) for i in range(2000)]
above = bytes(100_000)  # keeps the heap from shrinking by itself
for i in range(len(blocks)):
    blocks[i] = None
before = held()
settle_heap()
print(before - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_below_a_used_one_are_handed_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150  # MB of the 200
