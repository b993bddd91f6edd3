"""Files that are written whole, and links of strangers, which are refused or replaced."""

import os
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest

from nalora_jax.common.files import open_unlinked, refuse_link_out, write_atomically
from nalora_jax.common.locks import RunLock
from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records
from nalora_jax.train.output import open_output


def test_a_failed_write_names_the_file_and_leaves_nothing_behind(tmp_path):
    message = f"{tmp_path}/none/file: expected a file that can be written, found No such"
    with pytest.raises(NaloraError, match=message):
        write_atomically(tmp_path / "none" / "file", "text")
    for text in ("one", "two"):
        write_atomically(tmp_path / "file", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two"]


def test_content_is_flushed_to_disk_before_it_replaces_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old")
    flushed = []

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_size, target.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(target, "new text")
    assert flushed == [(len("new text"), "old")]
    assert target.read_text() == "new text"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_written_file_has_the_mode_that_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_planted_link_is_refused_or_replaced_and_its_target_stays_unchanged(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious\nhalf a line")
    folder.mkdir()
    for name in ("run.lock", "records.jsonl", "before.json"):
        (folder / name).symlink_to(victim)
    (folder / "new").symlink_to(folder.parent / "not there yet")
    for write in (
        lambda: RunLock(folder / "run.lock"),
        lambda: Records(folder).append({"id": "x"}),
        lambda: open_unlinked(folder / "new", "w"),
    ):
        with pytest.raises(NaloraError):
            write()
    write_atomically(folder / "before.json", "new")
    assert not (folder / "before.json").is_symlink()
    assert victim.read_text() == "precious\nhalf a line"
    assert not (tmp_path / "not there yet").exists()


def test_a_run_that_starts_again_removes_a_link_to_a_folder_and_not_the_folder(tmp_path):
    (tmp_path / "data" / "precious").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "start").symlink_to(tmp_path / "data")
    with open_output(tmp_path / "out", "auto") as output:
        assert not output.resumes
    assert (tmp_path / "data" / "precious").exists()
    assert not (tmp_path / "out" / "start").is_symlink()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("checkpoints", "another run"),
        ("checkpoints/4", "another run"),
        ("checkpoints/4", "missing"),
    ],
)
def test_a_run_is_resumed_through_a_link_to_its_folder_and_not_with_a_link_in_it(
    tmp_path, name, target
):
    folder, another = tmp_path / "disk", tmp_path / "another run" / "3"
    for path in (another, folder / "checkpoints" / "3"):
        path.mkdir(parents=True)
    (tmp_path / "out").symlink_to(folder)
    with open_output(tmp_path / "out", "auto") as output:
        assert output.resumes
    if name == "checkpoints":
        (folder / "checkpoints").rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / target)
    message = f"{name}: expected a folder, found a symbolic link; links in an output"
    with pytest.raises(NaloraError, match=message):
        open_output(tmp_path / "out", "auto").__enter__()
    assert another.is_dir()


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
def test_a_file_of_a_model_may_be_a_link_within_its_folder_and_the_hub_s_cache(
    tmp_path, link, accepted
):
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    for place in (folder, folder.parents[1] / "blobs"):
        place.mkdir(parents=True)
    (folder / "merges.txt").symlink_to(link)
    message = r"merges.txt: expected a file of that folder, found a link to"
    with nullcontext() if accepted else pytest.raises(NaloraError, match=message):
        refuse_link_out(folder, "merges.txt")


PRINTS = """
import os, sys
from nalora_jax.common import terminal
terminal.open_closed_streams()
with open(sys.argv[1], "w") as file:
    os.write(2, b"error")
"""


def test_errors_of_a_process_without_standard_error_are_not_written_into_its_files(tmp_path):
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", PRINTS]
    subprocess.run([*command, str(tmp_path / "file")], check=True)
    assert (tmp_path / "file").read_text() == ""
