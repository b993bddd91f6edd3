from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nalora_jax.common.files import DIGESTS, file_digest, find_damage, write_atomically, write_digests
from nalora_jax.errors import NaloraError


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
    with pytest.raises(
        NaloraError, match=f"{folder}/none/file: expected a file that can be written, found No such"
    ):
        write_atomically(folder / "none" / "file", "text")
    write_atomically(folder / "small", "two")
    assert (folder / "small").read_text() == "two"
    assert sorted(path.name for path in folder.iterdir()) == ["d", DIGESTS, "small"]
