"""The output folder: whose it is, and who may write to it now."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest
from orbax.checkpoint import path as ocp_path

from nalora_jax.errors import NaloraError
from nalora_jax.train import lock as lock_module
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.lock import FILE as LOCK
from nalora_jax.train.output import CHECKPOINTS as FOLDER
from nalora_jax.train.output import Resume, open_output
from tests import tiny


def opened(folder: Path, resume: Resume = False) -> bool:
    """Whether it resumes."""
    with open_output(folder, resume) as output:
        assert output.folder == folder
        assert (folder / LOCK).exists()
        return output.resumes


def save(folder: Path) -> None:
    with Checkpointer(folder / FOLDER, fingerprint="f", config={}) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})


def test_output_must_be_new_or_resumed(tmp_path: Path) -> None:
    new = tmp_path / "runs" / "one"
    assert not opened(new)
    assert list(new.iterdir()) == []
    assert not opened(new)
    with pytest.raises(NaloraError, match=r"--resume: expected a checkpoint in .*checkpoints, found none"):
        opened(new, True)
    with pytest.raises(NaloraError, match="--resume"):
        opened(tmp_path / "never", True)
    assert not (tmp_path / "never").exists()
    save(new)
    assert opened(new, True)
    with pytest.raises(
        NaloraError, match=r"--output: expected a new or empty folder, .*checkpoints; .*--resume"
    ):
        opened(new)
    assert {path.name for path in new.iterdir()} == {FOLDER}


def test_auto_resumes_what_there_is_and_starts_where_there_is_nothing(tmp_path: Path) -> None:
    assert not opened(tmp_path / "new", "auto")
    save(tmp_path / "new")
    assert opened(tmp_path / "new", "auto")
    early = (
        tmp_path / "early"
    )  # stopped before its first checkpoint: a scheduler must be able to start it again
    (early / FOLDER / f"5{ocp_path.atomicity_types.TMP_DIR_SUFFIX}").mkdir(parents=True)
    (early / "metrics.jsonl").write_text("{}")
    assert not opened(early, "auto")
    assert list(early.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match=r"which holds early, new, notes.txt"):
        opened(tmp_path, "auto")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_output_that_is_or_lies_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match="expected a folder, found the file"):
        opened(tmp_path / "notes.txt")
    with pytest.raises(NaloraError, match="a folder that can be written"):
        opened(tmp_path / "notes.txt" / "run")
    with pytest.raises(NaloraError, match=r"which holds notes.txt"):
        opened(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_first_save_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / FOLDER / f"5{ocp_path.atomicity_types.TMP_DIR_SUFFIX}").mkdir(parents=True)
    with pytest.raises(NaloraError, match="stopped before its first checkpoint: delete the folder"):
        opened(tmp_path, True)
    with pytest.raises(NaloraError, match="choose another folder$"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["s3://bucket/run", "s3:/bucket/run"])
def test_a_url_is_refused_with_several_processes_and_no_folder_of_that_name_appears(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(
        NaloraError, match=r"--output: .*found ..://bucket/run; mount the bucket on every host"
    ):
        opened(Path(name) if "//" not in name else name)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from nalora_jax.train.output import open_output
with open_output(sys.argv[1], False):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_by_name_and_a_dead_one_s_lock_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (holder,) = tiny.start(["-c", HOLDER, str(folder)])
    tiny.wait_for_line(holder, "held")
    save(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for resume in (True, "auto"):
        with pytest.raises(NaloraError) as caught:
            opened(folder, resume)
        assert f"found process {holder.pid} on {socket.gethostname()} since 2" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    holder.send_signal(signal.SIGKILL)
    tiny.finish([holder])
    assert (folder / LOCK).exists()
    assert opened(folder, True)
    assert not (folder / LOCK).exists()


def test_a_holder_on_another_host_is_believed_while_it_touches_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_STALE", 1.0)
    (tmp_path / LOCK).write_text(
        json.dumps({"host": "pod-7", "pid": 12, "since": "today", "command": "train.py"})
    )
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.1):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(NaloraError, match=r"found process 12 on pod-7 since today \(train.py\)"):
            opened(tmp_path, "auto")
    finally:
        done.set()
        thread.join()
    assert not opened(tmp_path, "auto")  # nobody touches it any more
