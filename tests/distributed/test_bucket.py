"""Two real processes whose output is a bucket, as an emulator of Google's store has it on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import Request, RequestHandler, Response, Router
from gcp_storage_emulator.storage import Storage

from tests import tiny

WORKER = """
import sys
import jax, numpy as np
from nalora_jax import distributed
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.output import open_output

assert distributed.initialize_distributed() and jax.process_count() == 2
first = jax.process_index() == 0
mesh = distributed.make_mesh(MeshConfig(data=1, fsdp=-1))
state = {"layers": {"ffn": {"gate_proj": {"a": np.arange(48, dtype=np.float32).reshape(3, 8, 2)}}}, "step": np.int32(1)}
where = distributed.shardings(state, mesh, distributed.STATE_RULES)

def placed(times):
    one = lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: times * x[index])
    return jax.tree.map(one, state, where)

def opened(resume):
    return open_output("gs://bucket/run", resume)

with opened(False) as output:
    assert not output.resumes
    with Checkpointer(output.checkpoints, fingerprint="f", config={}, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, placed(step), {"row": step})
    if first:
        (output.folder / "adapter").mkdir()
        (output.folder / "adapter" / "weights").write_text("trained")
    output.share("adapter")
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
with opened("auto") as output:
    assert output.resumes
    assert (output.folder / "adapter" / "weights").read_text() == "trained"
    with Checkpointer(output.checkpoints, fingerprint="f", config={}) as checkpoints:
        restored, position = checkpoints.restore("latest", placed(1))
assert position == {"row": 2}
for before, after in zip(jax.tree.leaves(placed(2)), jax.tree.leaves(restored)):
    for one, other in zip(before.addressable_shards, after.addressable_shards):
        np.testing.assert_array_equal(one.data, other.data)
try:
    with opened(False):
        pass
except NaloraError as error:
    print("DONE", error)
"""


class Server(ThreadingHTTPServer):
    """Answers several processes at once; what hangs up early is no error."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def honour_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers with generations, and refuses by them, as Google's does.

    TensorStore's manifests are written with ``ifGenerationMatch`` and read again with ``ifGenerationNotMatch``. The
    emulator knows neither: a manifest that had not changed was sent whole, without a generation, and now and then the
    writer waited for ever.
    """
    upload, download = objects._media_upload, objects.download

    def generation(storage: Storage, bucket: str, name: str) -> str:
        held = storage.objects.get(bucket, {}).get(name)
        return "0" if held is None else held["generation"]

    def uploaded(request: Request, response: Response, storage: Storage) -> None:
        found = generation(storage, request.params["bucket_name"], request.query["name"][0])
        if request.query.get("ifGenerationMatch", [found]) == [found]:
            upload(request, response, storage)
        else:
            assert request.data is not None  # what is not read resets the connection
            response.status = HTTPStatus.PRECONDITION_FAILED

    def downloaded(request: Request, response: Response, storage: Storage) -> None:
        found = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if found != "0" and request.query.get("ifGenerationNotMatch") == [found]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = found
            download(request, response, storage)

    monkeypatch.setattr(objects, "_media_upload", uploaded)
    monkeypatch.setattr(objects, "download", downloaded)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Storage, str]]:
    """What the emulator holds, and its address."""
    held, one_by_one, handle = Storage(use_memory_fs=True, data_dir=str(tmp_path)), threading.Lock(), Router.handle

    def handled(self: Router, method: str) -> None:
        with one_by_one:
            handle(self, method)

    monkeypatch.setattr(Router, "handle", handled)
    honour_generations(monkeypatch)
    buckets.create_bucket("bucket", held)
    with Server(("localhost", 0), partial(RequestHandler, held)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield held, f"http://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_two_processes_write_one_run_into_a_bucket_and_go_on_from_it(store, two_processes, tmp_path):
    held, address = store
    finished = two_processes(
        ["-c", WORKER],
        devices=2,
        NALORA_CACHE=tiny.new_cache(tmp_path / "cache"),
        STORAGE_EMULATOR_HOST=address,
        TENSORSTORE_GCS_HTTP_URL=address,
        GOOGLE_AUTH_TOKEN_FOR_TESTING="any",
        GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",  # asks Google itself what kind of bucket it is
    )
    for (status, out, error), said in zip(finished, ("found gs://bucket/run, which holds", "process 0"), strict=True):
        assert status == 0, error
        assert "DONE" in out
        assert said in out
    names = {name.removeprefix("run/") for name in held.objects["bucket"]}
    assert {"adapter/weights", "checkpoints/2/commit_success.txt", "checkpoints/2/state/digests.json"} <= names
    assert {f"checkpoints/2/state/ocdbt.process_{i}/manifest.ocdbt" for i in (0, 1)} <= names
    # One checkpoint is kept, and neither locks nor marks are left.
    assert not [name for name in names if name.startswith(("checkpoints/1/", ".", "remote.lock"))]
