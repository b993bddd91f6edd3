"""The record file under several processes, and after a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records

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
