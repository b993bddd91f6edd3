"""Snapshots of interrupted runs that a crash or a disk damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.study.records import read_snapshot, write_snapshot

ARRAYS = {
    "lora/layers/ffn/gate_proj/a": np.arange(6.0).reshape(2, 3),
    "notes": np.zeros(2),
    "step": np.int32(7),
}


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    assert read_snapshot(path) is None
    write_snapshot(path, ARRAYS, {"step": 4, "loss": 1 / 3})
    snapshot = read_snapshot(path)
    assert snapshot is not None
    assert snapshot.notes == {"step": 4, "loss": 1 / 3}
    assert snapshot.arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(snapshot.arrays[name], value)
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], flipped], ids=["cut", "bit"])
def test_a_damaged_snapshot_is_reported_and_not_used(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.npz"
    write_snapshot(path, ARRAYS, {"step": 4})
    path.write_bytes(damage(path.read_bytes()))
    assert read_snapshot(path) is None
    assert "the snapshot run.npz is damaged: the run starts from scratch" in caplog.text
