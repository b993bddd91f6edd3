"""Results in buckets: whole or absent, whatever kills the process that writes them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nalora_jax.common import buckets, uploads
from nalora_jax.common.folders import new_file, new_folder
from nalora_jax.errors import NaloraError
from tests import emulator

# gcsfs sends its chunks as bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")

FILES = {"README.md": b"card", "config.json": b"{}", "model.safetensors": bytes(6 << 20)}
WRITE = """
import sys
from nalora_jax.common.folders import new_folder

with new_folder(sys.argv[1]) as folder:
    for name, size in (("README.md", 4), ("config.json", 2), ("model.safetensors", 6 << 20)):
        (folder / name).write_bytes(bytes(size))
"""


def write(folder):
    with new_folder(folder) as scratch:
        for name, content in FILES.items():
            (scratch / name).write_bytes(content)


def test_a_folder_in_a_bucket_appears_whole_or_not_at_all(google, tmp_path):
    held, _ = google
    with new_folder(Path("gs://bucket/whole")) as folder:  # a Path has lost a slash
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        assert list(emulator.stored(held, "whole")) == [uploads.UPLOAD_MARK]
    assert emulator.stored(held, "whole") == FILES
    assert not list((tmp_path / "cache" / "uploads").iterdir())
    with pytest.raises(
        NaloraError, match="whole: expected a new name .*found one that holds README.md"
    ):
        uploads.require_free("gs://bucket/whole")
    with pytest.raises(NaloraError, match="whole: expected a new name"):
        write("gs://bucket/whole")
    assert emulator.stored(held, "whole") == FILES


def test_an_upload_that_fails_leaves_nothing(google, monkeypatch):
    put = uploads._put

    def fail(store, path, where, **options):
        if path.name == "config.json":
            raise OSError("connection lost")
        put(store, path, where, **options)

    monkeypatch.setattr(uploads, "_put", fail)
    with pytest.raises(NaloraError, match="connection lost"):
        write("gs://bucket/fails")
    assert not emulator.stored(google[0], "fails")


def test_a_file_in_a_bucket_appears_whole_and_replaces_no_other(google):
    for size in (10, 6 << 20):  # in one request, and in several
        url = f"gs://bucket/{size}.gguf"
        with new_file(url) as path:
            path.write_bytes(bytes(size))
            assert not buckets.exists(url)
        assert google[0].get_file("bucket", f"{size}.gguf") == bytes(size)
        with pytest.raises(NaloraError, match="found an existing file"):
            uploads.upload_file(Path(__file__), url)
        with pytest.raises(NaloraError, match="found an existing file"):
            uploads.require_free(url)
        assert google[0].get_file("bucket", f"{size}.gguf") == bytes(size)


def test_the_files_of_a_killed_upload_are_no_model_and_are_removed_by_the_next_upload(
    google, tmp_path
):
    held, requests = google
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", WRITE, "gs://bucket/killed"], env=environment)
    while not any("uploadType=resumable" in path for path, _ in requests):  # of the large file
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert "config.json" not in emulator.stored(held, "killed")
    assert uploads.UPLOAD_MARK in emulator.stored(held, "killed")
    write("gs://bucket/killed")
    assert emulator.stored(held, "killed") == FILES
    assert not list((tmp_path / "cache" / "uploads").iterdir())


def test_an_upload_of_a_second_machine_is_refused_until_the_first_has_been_silent(
    google, tmp_path, monkeypatch
):
    def second():
        monkeypatch.setattr(uploads.socket, "gethostname", lambda: "elsewhere")
        monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "elsewhere"))
        with pytest.raises(NaloraError, match=r"which wrote to it \d+ seconds ago; wait for it"):
            write("gs://bucket/two")
        monkeypatch.setattr(uploads, "_STALE", 0.0)
        write("gs://bucket/two")

    message = "found those of another process"
    with pytest.raises(NaloraError, match=message), new_folder("gs://bucket/two"):
        second()
    assert emulator.stored(google[0], "two") == FILES
