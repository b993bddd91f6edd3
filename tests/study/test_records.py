"""The record file and snapshots under several processes, and after a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records, read_snapshot, write_snapshot

HOLD = """
import sys, time
from nalora_jax.study.records import Records
with Records(sys.argv[1]).claim("x") as snapshot:
    print(snapshot is not None, flush=True)
    time.sleep(60)
"""


def test_half_a_line_of_a_crash_is_left_out_and_then_cut(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.append({"id": "a"})
    with records.path.open("a") as file:
        file.write('{"id": "b", "lo')
    assert set(records.read()) == {"a"}
    records.append({"id": "c"})
    assert list(records.read()) == ["a", "c"]


def test_a_run_with_two_records_is_an_error(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.append({"id": "a"})
    records.append({"id": "a"})
    with pytest.raises(
        NaloraError, match="records.jsonl: line 2: expected a record of a run that has none yet"
    ):
        records.read()


def test_a_claim_holds_against_other_processes_and_ends_with_its_own(tmp_path: Path) -> None:
    records = Records(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with records.claim("x") as snapshot:
            assert snapshot is None
        assert records.claimed("x")
        with records.claim("y") as snapshot:
            assert snapshot is not None
            assert snapshot.parent.is_dir()
        other.kill()  # no clean-up of its own
    assert not records.claimed("x")
    assert not records.claimed("never heard of")
    with records.claim("x") as snapshot:
        assert snapshot is not None


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
    snapshot = read_snapshot(path)
    assert snapshot is not None
    assert snapshot.notes == {"step": 4, "loss": 1 / 3}
    assert snapshot.arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(snapshot.arrays[name], value)
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:-9], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(damaged)
        assert read_snapshot(path) is None
    assert caplog.text.count("the snapshot run.npz is damaged: the run starts from scratch") == 2
