"""Files of output folders that other users may write to, and temporary folders of processes that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.files import write_atomically
from nalora_jax.paths import expand_user, open_unlinked, refuse_link_out, scratch_folder
from nalora_jax.runs.lock import Lock
from nalora_jax.runs.metrics import MetricsLog
from nalora_jax.runs.output import open_output
from nalora_jax.runs.trackers import _write_id
from nalora_jax.study.records import CLAIMS, Records
from nalora_jax.study.snapshots import write_snapshot


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A file of the user, and links to it in a folder under every name that a run or a study opens to write."""
    victim = tmp_path / "victim"
    victim.write_text("precious\nhalf a line")
    folder = tmp_path / "out"
    (folder / "wandb").mkdir(parents=True)
    for name in (
        "run.lock",
        "metrics.jsonl",
        "records.jsonl",
        "before.json",
        "report.html",
        "wandb/run_id",
        "run.new",
    ):
        (folder / name).symlink_to(victim)
    return folder


def acquire(folder: Path) -> None:
    Lock.acquire(folder / "run.lock")


def append_record(folder: Path) -> None:
    Records(folder).append({"id": "x"})


def note_tracker(folder: Path) -> None:
    _write_id(folder / "wandb" / "run_id", "x")


def save_snapshot(folder: Path) -> None:
    write_snapshot(folder / "run.npz", {"a": np.zeros(2)}, {})


def create(folder: Path) -> None:
    (folder / "new").symlink_to(folder.parent / "not there yet")
    open_unlinked(folder / "new", "w").close()


@pytest.mark.parametrize("write", [acquire, append_record, note_tracker, save_snapshot, create])
def test_a_planted_link_is_refused_and_what_it_points_to_stays(
    planted: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises(NaloraError):
        write(planted)
    assert (planted.parent / "victim").read_text() == "precious\nhalf a line"
    assert not (planted.parent / "not there yet").exists()


def test_a_planted_link_is_named_with_a_remedy(planted: Path) -> None:
    with pytest.raises(
        NaloraError, match="run.lock: expected a file, found a symbolic link; links in an output folder"
    ):
        acquire(planted)


@pytest.mark.parametrize("name", ["metrics.jsonl", "before.json", "report.html"])
def test_a_file_that_is_written_whole_replaces_a_planted_link(planted: Path, name: str) -> None:
    write_atomically(planted / name, "new")
    assert not (planted / name).is_symlink()
    assert (planted.parent / "victim").read_text() == "precious\nhalf a line"


def test_a_resumed_log_does_not_follow_a_planted_link(planted: Path) -> None:
    (planted.parent / "victim").write_text('{"step": 1}\n')
    MetricsLog(planted, resume=0).close()
    assert (planted.parent / "victim").read_text() == '{"step": 1}\n'


def test_a_run_that_starts_again_removes_a_link_to_a_folder_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "start").symlink_to(tmp_path / "data")
    with open_output(tmp_path / "out", "auto") as output:
        assert not output.resumes
    assert (tmp_path / "data" / "file").read_text() == "precious"
    assert not (tmp_path / "out" / "start").is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/4", "checkpoints.damaged", "adapter"])
def test_a_run_with_a_linked_folder_is_not_resumed(tmp_path: Path, name: str) -> None:
    linked = tmp_path / "out" / name
    (tmp_path / "another run" / "3").mkdir(parents=True)
    (tmp_path / "out" if name == "checkpoints" else tmp_path / "out" / "checkpoints" / "3").mkdir(
        parents=True
    )
    linked.symlink_to(tmp_path / "another run")
    with pytest.raises(
        NaloraError, match=f"{name}: expected a folder, found a symbolic link; links in an output"
    ):
        open_output(tmp_path / "out", True).__enter__()
    linked.unlink()
    if name != "checkpoints":
        linked.symlink_to(tmp_path / "missing")
        with pytest.raises(NaloraError, match="found a symbolic link"):
            open_output(tmp_path / "out", "auto").__enter__()
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["another run"]


def test_the_output_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "disk" / "report.html").symlink_to(tmp_path / "disk" / "old.html")
    (tmp_path / "disk" / "old.html").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with open_output(tmp_path / "out", "auto") as output:
        assert output.resumes


def test_a_folder_of_a_study_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / CLAIMS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NaloraError, match="found a symbolic link"), Records(tmp_path).claim("x"):
        pass
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_home_folder_of_nobody_stays_as_it_is_written() -> None:
    assert expand_user("~nosuchuser/x") == Path("~nosuchuser/x")
    assert expand_user("~") == Path.home()


KILLED = """
import os, signal, sys
from pathlib import Path
from nalora_jax.paths import scratch_folder
with scratch_folder(Path(sys.argv[1]), "incomplete-") as scratch:
    (scratch / "tokens.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    (tmp_path / "incomplete-otherhost-1").mkdir()
    (tmp_path / "incomplete-longago").mkdir()
    os.utime(tmp_path / "incomplete-longago", (0, 0))
    with (
        scratch_folder(tmp_path, "incomplete-") as first,
        scratch_folder(tmp_path, "incomplete-") as second,
    ):
        assert not left.exists()
        assert {path.name for path in tmp_path.iterdir()} == {
            first.name,
            second.name,
            "incomplete-otherhost-1",
        }
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-otherhost-1"]


@pytest.mark.parametrize(
    ("link", "accepted"),
    [
        ("vocab.json", True),
        ("../../blobs/1f0a", True),  # the hub's cache
        ("../../id_rsa", False),
        ("../other/vocab.json", False),
        ("../../blobs/../id_rsa", False),
        ("../../blobs/link", False),
        ("/etc/passwd", False),
    ],
)
def test_a_file_of_a_model_may_be_a_link_within_its_folder_and_the_hub_s_cache(tmp_path, link, accepted):
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    for place in (folder, folder.parent / "other", folder.parents[1] / "blobs"):
        place.mkdir(parents=True)
    (folder.parents[1] / "id_rsa").touch()
    (folder.parents[1] / "blobs" / "link").symlink_to("../id_rsa")
    (folder / "merges.txt").symlink_to(link)
    if accepted:
        refuse_link_out(folder, "merges.txt")
    else:
        with pytest.raises(
            NaloraError, match=r"merges.txt: expected a file of that folder, found a link to"
        ):
            refuse_link_out(folder, "merges.txt")
