"""Locks, and temporary folders of processes that were killed."""

import os
import subprocess
import sys

import pytest

from nalora_jax.common.locks import RunLock, locked, scratch_folder
from nalora_jax.errors import NaloraError


def test_a_lock_is_one_process_s_and_of_no_link(tmp_path):
    with locked(tmp_path / "a") as first, locked(tmp_path / "a") as second, locked(tmp_path / "b") as other:
        assert (first, second, other) == (True, False, True)
    with locked(tmp_path / "a", wait=True) as again:
        assert again
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with (
        pytest.raises(NaloraError, match="expected a file, found a symbolic link"),
        locked(tmp_path / "link"),
    ):
        pass
    assert not (tmp_path / "target").exists()


def test_a_lock_that_another_host_gives_up_is_taken_and_its_file_is_the_one_that_is_locked(
    tmp_path, monkeypatch
):
    path = tmp_path / "run.lock"
    path.write_text('{"host": "elsewhere", "pid": 1}')
    monkeypatch.setattr(
        "time.sleep", lambda seconds: path.unlink(missing_ok=True)
    )  # while this process waits
    lock = RunLock(path)
    assert f'"pid": {os.getpid()}' in path.read_text()
    with pytest.raises(NaloraError, match=f"found process {os.getpid()} on "):
        RunLock(path)
    lock.release()
    assert not path.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from nalora_jax.common.locks import scratch_folder
with scratch_folder(Path(sys.argv[1]), ".incomplete") as scratch:
    (scratch / "tokens.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    for name in (".now.incomplete", ".longago.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner.json").write_text('{"host": "elsewhere", "pid": 1}')
    for path in (tmp_path / ".longago.incomplete" / "owner.json", tmp_path / ".longago.incomplete"):
        os.utime(path, (0, 0))
    with (
        scratch_folder(tmp_path, ".incomplete") as first,
        scratch_folder(tmp_path, ".incomplete") as second,
    ):
        assert not left.exists()
        assert {path.name for path in tmp_path.iterdir()} == {
            first.parent.name,
            second.parent.name,
            ".now.incomplete",
        }
    assert [path.name for path in tmp_path.iterdir()] == [".now.incomplete"]
