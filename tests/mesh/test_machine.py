"""The machine's memory."""

from __future__ import annotations

from pathlib import Path

from nalora_jax.mesh.machine import host_memory


def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       8000000 kB\nMemFree:   1 kB\nMemAvailable:   6000000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(info, tmp_path) == (6000000 * 1024, 8000000 * 1024)
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("2500000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    assert host_memory(info, tmp_path) == (10**9, 3 * 10**9)
