"""Compiled programs are kept in a folder that nobody else can write into, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from nalora_jax.assembly.compilation import use_compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()  # JAX holds on to the folder of its first use


def test_the_folder_is_made_private_and_not_used_if_others_can_write_into_it(
    tmp_path, monkeypatch, caplog
):
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


def test_a_flipped_bit_costs_a_compilation(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    use_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reset_cache()
    # The process needs no file of a program that it has compiled before: this one is of this test
    # alone.
    jax.jit(lambda x: x * len(str(tmp_path)) + hash(str(tmp_path)) % 1_000_003).lower(1.0).compile()
    folder = tmp_path / "compiled"
    entry = min(folder.iterdir())
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    use_compilation_cache()
    assert not list(folder.iterdir())
    assert caplog.messages == [
        f"compiled programs in {folder} were damaged (1): compiling them again"
    ]
