import hashlib
from contextlib import nullcontext

import pytest

from nalora_jax.common.digests import DIGESTS, file_digest, find_damage, write_digests
from nalora_jax.common.files import open_unlinked, refuse_link_out, write_atomically
from nalora_jax.common.locks import RunLock
from nalora_jax.errors import NaloraError
from nalora_jax.study.records import Records
from nalora_jax.train.output import open_output


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "large").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "small").write_text("one")
    write_digests(tmp_path)
    return tmp_path


def test_a_digest_is_sha256_of_the_file(folder):
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
def test_damage_is_named(folder, name, content, damage):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert find_damage(folder) == damage


def test_where_a_file_cannot_be_written_its_name_is_given_and_nothing_changes(folder):
    message = f"{folder}/none/file: expected a file that can be written, found No such"
    with pytest.raises(NaloraError, match=message):
        write_atomically(folder / "none" / "file", "text")
    write_atomically(folder / "small", "two")
    assert (folder / "small").read_text() == "two"
    assert sorted(path.name for path in folder.iterdir()) == ["d", DIGESTS, "small"]


def test_a_planted_link_is_refused_or_replaced_and_what_it_points_to_stays(tmp_path):
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
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "start").symlink_to(tmp_path / "data")
    with open_output(tmp_path / "out", "auto") as output:
        assert not output.resumes
    assert (tmp_path / "data" / "file").read_text() == "precious"
    assert not (tmp_path / "out" / "start").is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/4"])
def test_a_run_with_a_linked_folder_is_not_resumed(tmp_path, name):
    linked, another = tmp_path / "out" / name, tmp_path / "another run"
    (another / "3").mkdir(parents=True)
    (linked.parent if name == "checkpoints" else linked.with_name("3")).mkdir(parents=True)
    linked.symlink_to(another)
    message = f"{name}: expected a folder, found a symbolic link; links in an output"
    with pytest.raises(NaloraError, match=message):
        open_output(tmp_path / "out", True).__enter__()
    linked.unlink()
    if name != "checkpoints":
        linked.symlink_to(tmp_path / "missing")
        with pytest.raises(NaloraError, match="found a symbolic link"):
            open_output(tmp_path / "out", "auto").__enter__()
    assert another.is_dir()


def test_the_output_folder_itself_may_be_a_link(tmp_path):
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
    message = r"merges.txt: expected a file of that folder, found a link to"
    with nullcontext() if accepted else pytest.raises(NaloraError, match=message):
        refuse_link_out(folder, "merges.txt")
