from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.common.digests import DIGESTS, file_digest, find_damage, write_digests
from nalora_jax.common.files import open_unlinked, refuse_link_out, write_atomically
from nalora_jax.common.locks import RunLock
from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records, write_snapshot
from nalora_jax.train.log import _write_id
from nalora_jax.train.output import open_output


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
        ("small", None, "small is missing"),
        (DIGESTS, b"\xff\xfe", f"{DIGESTS} is damaged itself"),
    ],
)
def test_damage_is_named(folder: Path, name: str, content: bytes | None, damage: str) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert find_damage(folder) == damage


def test_where_a_file_cannot_be_written_its_name_is_given_and_nothing_changes(folder: Path) -> None:
    with pytest.raises(
        NaloraError, match=f"{folder}/none/file: expected a file that can be written, found No such"
    ):
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
    RunLock(folder / "run.lock")


def append_record(folder: Path) -> None:
    Records(folder).append({"id": "x"})


def note_tracker(folder: Path) -> None:
    _write_id(folder / "wandb" / "run_id", "x")


def save_snapshot(folder: Path) -> None:
    write_snapshot(folder / "run.npz", {"a": np.zeros(2)}, {})


def create(folder: Path) -> None:
    (folder / "new").symlink_to(folder.parent / "not there yet")
    open_unlinked(folder / "new", "w").close()


@pytest.mark.parametrize("write", [acquire, append_record, create])
def test_a_planted_link_is_refused_and_what_it_points_to_stays(
    planted: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises(NaloraError):
        write(planted)
    assert (planted.parent / "victim").read_text() == "precious\nhalf a line"
    assert not (planted.parent / "not there yet").exists()


@pytest.mark.parametrize(
    "name",
    [
        "before.json",
    ],
)
def test_a_file_that_is_written_whole_replaces_a_planted_link(planted: Path, name: str) -> None:
    write_atomically(planted / name, "new")
    assert not (planted / name).is_symlink()
    assert (planted.parent / "victim").read_text() == "precious\nhalf a line"


def test_a_run_that_starts_again_removes_a_link_to_a_folder_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "start").symlink_to(tmp_path / "data")
    with open_output(tmp_path / "out", "auto") as output:
        assert not output.resumes
    assert (tmp_path / "data" / "file").read_text() == "precious"
    assert not (tmp_path / "out" / "start").is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "checkpoints/4",
    ],
)
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


@pytest.mark.parametrize(
    ("link", "accepted"),
    [
        ("vocab.json", True),
        ("../../blobs/1f0a", True),  # the hub's cache
        ("../../id_rsa", False),
        ("../../blobs/../id_rsa", False),
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
