"""Locks, and output folders that are whole or absent, whatever the file system says or kills the
process."""

import os
import subprocess
import sys

import pytest

from nalora_jax.common.folders import new_file, new_folder, refuse_claimed
from nalora_jax.common.locks import RunLock, hold_lock, scratch_folder
from nalora_jax.errors import NaloraError


def test_a_lock_has_one_holder_and_its_file_may_not_be_a_link(tmp_path):
    with (
        hold_lock(tmp_path / "a") as first,
        hold_lock(tmp_path / "a") as second,
        hold_lock(tmp_path / "b") as other,
    ):
        assert (first, second, other) == (True, False, True)
    with hold_lock(tmp_path / "a", wait=True) as again:
        assert again
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with (
        pytest.raises(NaloraError, match="a file, found a symbolic link"),
        hold_lock(tmp_path / "link"),
    ):
        pass
    assert not (tmp_path / "target").exists()


def test_a_lock_that_another_host_releases_is_taken_with_a_new_file(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    path.write_text('{"host": "elsewhere", "pid": 1}')
    monkeypatch.setattr(
        "time.sleep", lambda _: path.unlink(missing_ok=True)
    )  # while this process waits
    lock = RunLock(path)
    assert f'"pid": {os.getpid()}' in path.read_text()
    with pytest.raises(NaloraError, match=f"found process {os.getpid()} on "):
        RunLock(path)
    lock.release()
    assert not path.exists()


def test_others_may_read_an_output_folder_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", *tmp_path.glob("out/*"))]
    assert modes == [0o755, 0o644]


KILLED = """
import os, signal, sys
from nalora_jax.common.folders import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_output_removes_the_files_of_killed_processes_but_not_those_of_living_ones(
    tmp_path,
):
    def names():
        return {path.name for path in tmp_path.iterdir()}

    for name in ("one", "one", "two"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
        assert len(names()) == 1
    foreign, elsewhere = (f".{name}.nalora-partial" for name in ("foreign", "another host's"))
    for name in (foreign, elsewhere):
        (tmp_path / name).mkdir()
    owner = tmp_path / elsewhere / "owner.json"
    owner.write_text('{"host": "elsewhere", "pid": 1}')
    with (
        scratch_folder(tmp_path, ".nalora-partial") as first,
        scratch_folder(tmp_path, ".nalora-partial") as second,
    ):
        assert names() == {foreign, elsewhere, first.parent.name, second.parent.name}
        with new_folder(tmp_path / "three"):
            pass
        assert first.exists()
    assert names() == {foreign, elsewhere, "three"}
    for path in (owner.parent, owner):
        os.utime(path, (0, 0))
    with new_file(tmp_path / "file") as path:
        path.touch()
    assert names() == {foreign, "three", "file"}


def test_a_second_writer_of_the_same_output_is_refused(tmp_path):
    busy = f"expected a name that no other process writes, found process {os.getpid()} on "
    with new_folder(tmp_path / "merged") as folder:
        (folder / "a").touch()
        with pytest.raises(NaloraError, match=busy), new_folder(tmp_path / "merged"):
            pass
        with pytest.raises(NaloraError, match=busy), new_file(tmp_path / "merged"):
            pass
        with pytest.raises(NaloraError, match=busy):
            refuse_claimed(tmp_path / "merged")
    refuse_claimed(tmp_path / "merged")
    assert [path.name for path in tmp_path.rglob("*")] == ["merged", "a"]
