"""The output folder: whose it is, and who may write to it now."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import jax.numpy as jnp
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import buckets, locks
from nalora_jax.common.locks import RUN_LOCK as LOCK
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.train import output as output_module
from nalora_jax.train.callbacks import Callbacks
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.output import CHECKPOINTS as FOLDER
from nalora_jax.train.output import HOLDER, Resume, open_output
from nalora_jax.train.session import Running
from tests import tiny


def opened(folder: Path, resume: Resume = False) -> bool:
    """Whether it resumes."""
    with open_output(folder, resume) as output:
        assert output.folder == folder
        assert (folder / LOCK).exists()
        return output.resumes


def save(folder: Path, *steps: int) -> None:
    with Checkpointer(folder / FOLDER, fingerprint="f", config={}) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"row": step})


def test_output_must_be_new_or_resumed(tmp_path: Path) -> None:
    new = tmp_path / "runs" / "one"
    for _ in range(2):
        assert not opened(new)
        assert list(new.iterdir()) == []
    with pytest.raises(
        NaloraError, match=r"--resume: expected a checkpoint in .*checkpoints, found none"
    ):
        opened(new, True)
    save(new, 1)
    assert opened(new, True)
    assert opened(new, "auto")
    message = r"--output: expected a new or empty folder, .*checkpoints; .*--resume"
    with pytest.raises(NaloraError, match=message):
        opened(new)
    assert {path.name for path in new.iterdir()} == {FOLDER}


def test_output_that_is_lies_under_or_holds_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match="expected a folder, found the file"):
        opened(tmp_path / "notes.txt")
    with pytest.raises(NaloraError, match="a folder that can be written"):
        opened(tmp_path / "notes.txt" / "run")
    for resume in (False, "auto"):
        with pytest.raises(NaloraError, match=r"which holds notes.txt"):
            opened(tmp_path, resume)
    assert (tmp_path / "notes.txt").read_text() == "mine"


HOLDING = """
import sys, time
from nalora_jax.train.output import open_output
with open_output(sys.argv[1], False):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_by_name_and_a_dead_one_s_lock_is_taken_over(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    (holder,) = tiny.start(["-c", HOLDING, str(folder)])
    tiny.wait_for_line(holder, "held")
    save(folder, 1)
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
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(locks, "_STALE", 0.1)
    holder = {"host": "pod-7", "pid": 12, "since": "today", "command": "train.py"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with monkeypatch.context() as patch:
        patch.setattr(
            "time.sleep", lambda seconds: os.utime(tmp_path / LOCK)
        )  # while this process waits
        with pytest.raises(
            NaloraError, match=r"found process 12 on pod-7 since today \(train.py\)"
        ):
            opened(tmp_path, "auto")
    assert not opened(tmp_path, "auto")  # nobody touches it any more


URL = "s3://bucket/run"


class Store(MemoryFileSystem):
    protocol = ("s3", "s3a")
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the store holds, by path."""
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("s3", Store, clobber=True)

    def clear() -> None:
        Store.store.clear()
        backend.fsspec_backend._get_filesystem.cache_clear()
        buckets._filesystem_of.cache_clear()

    clear()
    yield Store.store
    clear()


def test_what_is_finished_is_in_the_store_and_another_machine_goes_on_from_it(store, monkeypatch):
    with open_output(URL, False) as output:
        assert not output.resumes
        (output.folder / "metrics.jsonl").write_text("one\n")
        (output.folder / ".scratch").write_text("half")
        save(output.folder, 1, 2)
        unfinished = output.folder / FOLDER / f"3{ocp_path.atomicity_types.TMP_DIR_SUFFIX}"
        unfinished.mkdir()
        (unfinished / "part").write_text("half")
        assert f"/bucket/run/{HOLDER}" in store
    assert "/bucket/run/metrics.jsonl" in store
    assert not [
        name for name in store for part in ("half", "tmp", "lock", ".scratch") if part in name
    ]
    # The copy of the newest checkpoint is cut off after its digests: it is damaged, and the one
    # before it taken.
    order = [path for path in store if f"{FOLDER}/2/" in path]
    digests = [path for path in order if path.endswith("digests.json")]
    assert order[: len(digests)] == digests != []
    for path in order[len(digests) + 1 :]:
        del store[path]
    monkeypatch.setenv("NALORA_CACHE", str(output.folder.parents[2] / "another machine"))
    with open_output(URL, "auto") as again:
        assert again.resumes
        assert again.folder != output.folder
        assert (again.folder / "metrics.jsonl").read_text() == "one\n"
        with Checkpointer(again.folder / FOLDER, fingerprint="f", config={}) as checkpoints:
            state, data = checkpoints.restore("latest", {"x": jnp.zeros(3)})
        assert (float(state["x"][0]), data) == (1.0, {"row": 1})
        save(again.folder, 5, 6)  # two are kept
    assert not [name for name in store if f"{FOLDER}/1/" in name]


def test_the_log_is_in_the_store_before_the_checkpoints_of_its_steps(store):
    with open_output(URL, False) as output:
        (output.folder / "metrics.jsonl").write_text("one\n")
        save(output.folder, 1)
        (output.folder / "zoo.txt").write_text("last by name")
    order = [path.removeprefix("/bucket/run/") for path in store]
    of_checkpoint = [path for path in order if path.startswith(f"{FOLDER}/1/")]
    last_file = of_checkpoint[-1]
    assert not last_file.endswith("digests.json")
    assert order.index("metrics.jsonl") < order.index("zoo.txt") < order.index(last_file)


def test_checkpoints_written_directly_to_the_store_follow_the_log(store, monkeypatch):
    """As in `gs://`; the copies every 30 seconds are too late if the machine goes."""
    monkeypatch.setattr(output_module, "_DIRECT", "s3://")
    with open_output(URL, False) as output:
        session = object.__new__(Running)
        session.output = output
        session.waits_for_writes = False
        stored = "/bucket/run/metrics.jsonl"

        def save(step: int, *state: object) -> None:
            assert store[stored].getvalue() == b"line of step 5\n"

        session.job = SimpleNamespace(config=RunConfig())
        session.batches = SimpleNamespace(get_state=dict)
        session.checkpointer = SimpleNamespace(save=save, folder=output.checkpoints)
        session.callbacks = Callbacks()
        (output.folder / "metrics.jsonl").write_text("line of step 5\n")
        session.save(5, None, None)


def test_a_store_that_holds_a_run_or_that_another_machine_writes_to_is_refused(store):
    def refused(resume: Resume, message: str) -> None:
        with pytest.raises(NaloraError, match=message), open_output(URL, resume):
            pass

    with open_output(URL, False) as output:
        (output.folder / "metrics.jsonl").write_text("one\n")
    refused(False, r"new or empty folder, found s3://bucket/run, which holds metrics.jsonl")
    lock = epath.Path(URL) / HOLDER
    lock.write_text(json.dumps({"host": "elsewhere", "time": time.time() - 10}))
    refused("auto", r"that elsewhere wrote to it \d+ seconds ago")
    lock.write_text(json.dumps({"host": "elsewhere", "time": time.time() - 1000}))
    with open_output("s3:/bucket/run", "auto"):  # what a path makes of the URL
        assert json.loads(lock.read_text())["host"] != "elsewhere"
