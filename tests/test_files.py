from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.files import (
    DIGESTS,
    expand_user,
    file_digest,
    find_damage,
    naming,
    open_unlinked,
    scratch_folder,
    write_atomically,
    write_digests,
)
from nalora_jax.study.records import Records
from nalora_jax.train.lock import Lock
from nalora_jax.train.metrics import MetricsLog
from nalora_jax.train.output import open_output
from nalora_jax.train.trackers import _write_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "large").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "small").write_text("one")
    write_digests(tmp_path)
    return tmp_path


def test_a_digest_is_sha256_of_the_file(folder: Path) -> None:
    content = (folder / "d" / "large").read_bytes()
    assert file_digest(folder / "d" / "large") == hashlib.sha256(content).hexdigest()
    assert file_digest(folder / "d" / "large", 7) == hashlib.sha256(content[7:]).hexdigest()
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("small", b"onf", "small is not what was written"),
        ("d/large", b"", "d/large is not what was written"),
        ("small", None, "small is missing"),
        (DIGESTS, b"\xff\xfe", f"{DIGESTS} is damaged itself"),
        (DIGESTS, b"[1]", f"{DIGESTS} is damaged itself"),
    ],
)
def test_damage_is_named(folder: Path, name: str, content: bytes | None, damage: str) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert find_damage(folder) == damage


def test_a_folder_without_a_list_is_said_to_have_none(folder: Path) -> None:
    (folder / DIGESTS).unlink()
    with pytest.raises(FileNotFoundError):
        find_damage(folder)


def test_where_a_file_cannot_be_written_its_name_is_given_and_nothing_changes(folder: Path) -> None:
    with pytest.raises(NaloraError, match=f"{folder}/none/file: expected a file that can be written, found No such"):
        write_atomically(folder / "none" / "file", "text")
    write_atomically(folder / "small", "two")
    assert (folder / "small").read_text() == "two"
    assert sorted(path.name for path in folder.iterdir()) == ["d", DIGESTS, "small"]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A file of the user, and links to it in a folder under every name that a run or a study opens to write."""
    victim = tmp_path / "victim"
    victim.write_text("precious\nhalf a line")
    folder = tmp_path / "out"
    (folder / "wandb").mkdir(parents=True)
    for name in ("run.lock", "metrics.jsonl", "records.jsonl", "before.json", "report.html", "wandb/run_id"):
        (folder / name).symlink_to(victim)
    return folder


def acquire(folder: Path) -> None:
    Lock.acquire(folder / "run.lock")


def append_metrics(folder: Path) -> None:
    MetricsLog(folder, resume=0).close()


def append_record(folder: Path) -> None:
    Records(folder).append({"id": "x"})


def note_tracker(folder: Path) -> None:
    _write_id(folder / "wandb" / "run_id", "x")


def claim_run(folder: Path) -> None:
    (folder / ".runs").mkdir()
    (folder / ".runs" / "x.lock").symlink_to(folder.parent / "victim")
    with Records(folder).claim("x"):
        pass


def create(folder: Path) -> None:
    (folder / "new").symlink_to(folder.parent / "not there yet")
    open_unlinked(folder / "new", "w").close()


@pytest.mark.parametrize("write", [acquire, append_record, note_tracker, claim_run, create])
def test_a_planted_link_is_refused_and_what_it_points_to_stays(planted: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(NaloraError, match="expected a file, found a symbolic link; links in an output folder"):
        write(planted)
    assert (planted.parent / "victim").read_text() == "precious\nhalf a line"
    assert not (planted.parent / "not there yet").exists()


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


def test_a_full_disk_is_reported_with_the_file() -> None:
    with pytest.raises(OSError, match="a/file") as caught, naming("a/file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == "a/file"
    with pytest.raises(OSError) as caught, naming("a/file"):
        raise OSError(errno.ENOSPC, "No space left on device", "another")
    assert caught.value.filename == "another"


def test_a_home_folder_of_nobody_stays_as_it_is_written() -> None:
    assert expand_user("~nosuchuser/x") == Path("~nosuchuser/x")
    assert expand_user("~") == Path.home()


KILLED = """
import os, signal, sys
from pathlib import Path
from nalora_jax.files import scratch_folder
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
    with scratch_folder(tmp_path, "incomplete-") as first, scratch_folder(tmp_path, "incomplete-") as second:
        assert not left.exists()
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, "incomplete-otherhost-1"}
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-otherhost-1"]
