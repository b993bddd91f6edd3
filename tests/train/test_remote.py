"""Output on an object store: a store in memory under the names that real ones have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax.numpy as jnp
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import buckets
from nalora_jax.common.seals import seal
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.study.sweeps.grid import recorded_sweep
from nalora_jax.train import remote
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.metrics import recorded_settings
from nalora_jax.train.output import CHECKPOINTS, open_output

pytestmark = pytest.mark.usefixtures("store")

URL = "s3://bucket/run"


class Store(MemoryFileSystem):
    """A store, as far as paths and files go."""

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
    for cached in (backend.fsspec_backend._get_filesystem, buckets._filesystem_of):
        cached.cache_clear()
    Store.store.clear()
    yield Store.store
    Store.store.clear()
    for cached in (backend.fsspec_backend._get_filesystem, buckets._filesystem_of):
        cached.cache_clear()


def names(store: dict[str, Any]) -> set[str]:
    return {path.removeprefix("/bucket/run/") for path in store}


def save(folder: Path, *steps: int) -> None:
    with Checkpointer(folder / CHECKPOINTS, fingerprint="f", config={}) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, {"row": step})


def test_what_is_finished_is_in_the_store_and_another_machine_goes_on_from_it(store, monkeypatch):
    with open_output(URL, False) as output:
        assert not output.resumes
        (output.folder / "metrics.jsonl").write_text("one\n")
        (output.folder / ".scratch").write_text("half")
        save(output.folder, 1, 2)
        (output.folder / CHECKPOINTS / f"3{ocp_path.atomicity_types.TMP_DIR_SUFFIX}").mkdir()
        (output.folder / CHECKPOINTS / f"3{ocp_path.atomicity_types.TMP_DIR_SUFFIX}" / "part").write_text(
            "half"
        )
        assert remote.HOLDER in names(store)
    there = names(store)
    assert {"metrics.jsonl", f"{CHECKPOINTS}/2/state/digests.json"} <= there
    assert not [
        name for name in there if "half" in name or "tmp" in name or "lock" in name or ".scratch" in name
    ]
    monkeypatch.setenv("NALORA_CACHE", str(output.folder.parents[2] / "another machine"))
    with open_output(URL, "auto") as again:
        assert again.resumes
        assert again.folder != output.folder
        assert (again.folder / "metrics.jsonl").read_text() == "one\n"
        with Checkpointer(again.folder / CHECKPOINTS, fingerprint="f", config={}) as checkpoints:
            state, data = checkpoints.restore("latest", {"x": jnp.zeros(3)})
        assert (state["x"][0], data) == (2.0, {"row": 2})
        save(again.folder, 5, 6)  # two are kept
    assert not [name for name in names(store) if name.startswith(f"{CHECKPOINTS}/1/")]


def test_a_copy_that_was_cut_off_is_damaged_and_the_checkpoint_before_it_taken(store):
    with open_output(URL, False) as output:
        save(output.folder, 1, 2)
    order = [path for path in store if f"{CHECKPOINTS}/2/" in path]
    digests = [path for path in order if path.endswith("digests.json")]
    assert order[: len(digests)] == digests
    for path in order[len(digests) + 1 :]:  # all but the first few never came
        del store[path]
    with (
        open_output(URL, True) as output,
        Checkpointer(output.folder / CHECKPOINTS, fingerprint="f", config={}) as found,
    ):
        state, _ = found.restore("latest", {"x": jnp.zeros(3)})
        assert state["x"][0] == 1.0


def test_a_store_that_holds_a_run_or_that_another_machine_writes_to_is_refused(store):
    with open_output(URL, False) as output:
        (output.folder / "metrics.jsonl").write_text("one\n")
    with (
        pytest.raises(
            NaloraError, match=r"new or empty folder, found s3://bucket/run, which holds metrics.jsonl"
        ),
        open_output(URL, False),
    ):
        pass
    lock = remote.epath.Path(URL) / remote.HOLDER
    lock.write_text(json.dumps({"host": "elsewhere", "time": remote.time.time() - 10}))
    with (
        pytest.raises(NaloraError, match=r"that elsewhere wrote to it 10 seconds ago"),
        open_output(URL, "auto"),
    ):
        pass
    lock.write_text(json.dumps({"host": "elsewhere", "time": remote.time.time() - 1000}))
    with open_output("s3:/bucket/run", "auto"):  # what a path makes of the URL
        assert json.loads(lock.read_text())["host"] != "elsewhere"


def test_a_store_that_fails_is_tried_again_and_at_the_end_an_error_that_names_the_folder(
    store, monkeypatch, caplog
):
    def full(*_: Any) -> None:
        raise OSError("quota exceeded")

    mirrored = remote.mirrored(URL, fresh=True, every=0.01)
    folder = mirrored.__enter__().folder
    (folder / "metrics.jsonl").write_text("one\n")
    while "metrics.jsonl" not in names(store):
        remote.time.sleep(0.01)
    monkeypatch.setattr(remote.Mirror, "push", full)
    while "trying again" not in caplog.text:
        remote.time.sleep(0.01)
    with pytest.raises(NaloraError, match=r"last files of the run, which are in .*, found quota exceeded"):
        mirrored.__exit__(None, None, None)
    assert (folder / "metrics.jsonl").exists()


def test_a_store_that_is_not_known_is_refused():
    with (
        pytest.raises(NaloraError, match=r"--output: .*found ftp://host/run"),
        open_output("ftp://host/run", False),
    ):
        pass
    assert buckets.url("runs/gs") is None
    assert buckets.url("C:/runs") is None


@pytest.mark.parametrize("folder", [URL, f"{URL}/"])
def test_settings_of_a_run_and_of_a_sweep_are_read_from_the_store(store, folder):
    config = RunConfig(steps=7)
    assert recorded_settings(folder) == {}
    assert recorded_sweep(folder) is None
    remote.write_text(folder, "sweep.json", json.dumps({"sweep": ["seed=0,1"], "run": config.to_dict()}))
    remote.write_text(folder, "metrics.jsonl", json.dumps(seal({"run": config.to_dict()})) + "\n")
    assert names(store) == {"sweep.json", "metrics.jsonl"}
    assert recorded_settings(folder)["steps"] == 7
    assert recorded_sweep(folder) == (("seed=0,1",), config)
    remote.write_text(folder, "sweep.json", "{")
    with pytest.raises(NaloraError, match="s3://bucket/run/sweep.json: expected the options of a sweep"):
        recorded_sweep(folder)
