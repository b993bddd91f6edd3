"""The record file and snapshots after a crash; claims under several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records, read_snapshot, write_snapshot


def test_half_a_line_of_a_crash_is_cut_and_a_run_with_two_records_is_an_error(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.append({"id": "a"})
    with records.path.open("a") as file:
        file.write('{"id": "b", "lo')
    assert set(records.read()) == {"a"}
    records.append({"id": "c"})
    assert list(records.read()) == ["a", "c"]
    records.append({"id": "a"})
    with pytest.raises(NaloraError, match="line 3: expected a record of a run that has none yet"):
        records.read()


def test_a_claimed_run_is_taken_until_its_claim_ends(tmp_path: Path) -> None:
    records, other = Records(tmp_path), Records(tmp_path)
    with records.claim("x") as snapshot:
        assert snapshot is not None
        assert snapshot.parent.is_dir()
        with other.claim("x") as taken:
            assert taken is None
        assert other.claimed("x")
        with other.claim("y") as free:
            assert free is not None
    assert not records.claimed("x")
    assert not records.claimed("never heard of")


ARRAYS = {
    "lora/layers/ffn/gate_proj/a": np.arange(6.0).reshape(2, 3),
    "notes": np.zeros(2),
    "step": np.int32(7),
}


def test_a_snapshot_is_read_as_it_was_written_and_not_used_if_it_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.npz"
    assert read_snapshot(path) is None
    write_snapshot(path, ARRAYS, {"step": 4, "loss": 1 / 3})
    arrays, notes = read_snapshot(path) or ({}, {})
    assert notes == {"step": 4, "loss": 1 / 3}
    assert arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], value)
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:-9], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(damaged)
        assert read_snapshot(path) is None
    assert caplog.text.count("the snapshot run.npz is damaged: the run starts from scratch") == 2
