"""Output folders: whole or absent, whatever the file system says."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from nalora_jax.common.folders import new_file, new_folder, refuse_claimed
from nalora_jax.errors import NaloraError


def test_a_disk_that_fills_up_under_safetensors_own_writer_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(
                NaloraError, match=r"adapter: expected a place that can be written, .*File too large"
            ),
            new_folder(tmp_path / "adapter") as scratch,
        ):
            save_file({"x": np.zeros(10_000, np.float32)}, scratch / "adapter_model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from nalora_jax.common.folders import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_output_removes_what_a_killed_process_left(tmp_path):
    for name in ("one", "one", "two"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
        assert len(list(tmp_path.iterdir())) == 1
    for name in ("foreign", "another host's"):
        (tmp_path / f".{name}.nalora-partial").mkdir()
    (tmp_path / ".another host's.nalora-partial" / "owner.json").write_text(
        '{"host": "elsewhere", "pid": 1}'
    )
    with new_folder(tmp_path / "three"):
        pass
    kept = {".foreign.nalora-partial", ".another host's.nalora-partial", "three"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    for path in (tmp_path / ".another host's.nalora-partial", *tmp_path.glob(".another*/*")):
        os.utime(path, (0, 0))
    with new_file(tmp_path / "file") as path:
        path.touch()
    assert {path.name for path in tmp_path.iterdir()} == {".foreign.nalora-partial", "three", "file"}


def test_of_two_writers_of_one_name_the_second_is_refused(tmp_path):
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
