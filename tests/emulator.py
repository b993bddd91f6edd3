"""An emulator of Google's store on this machine, for this process and for those that it starts."""

from __future__ import annotations

import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import Request, RequestHandler, Response, Router
from gcp_storage_emulator.storage import Storage

# As Google answers whoever has no credentials.
MESSAGE = (
    "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
)
REFUSAL = json.dumps({"error": {"code": HTTPStatus.UNAUTHORIZED, "message": MESSAGE}}).encode()


def variables(address: str) -> dict[str, str]:
    """The environment of a process that shall find the emulator in place of Google."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google itself what kind of bucket it is
    }


class Server(ThreadingHTTPServer):
    """Answers several processes at once; what hangs up early is no error."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def honour_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers with generations, and refuses by them, as Google's does.

    TensorStore's manifests are written with ``ifGenerationMatch`` and read again with
    ``ifGenerationNotMatch``. The
    emulator knows neither: a manifest that had not changed was sent whole, without a generation,
    and now and then the writer waited for ever.
    """
    download = objects.download

    def generation(storage: Storage, bucket: str, name: str) -> str:
        held = storage.objects.get(bucket, {}).get(name)
        return "0" if held is None else held["generation"]

    def guarded(upload: Callable[..., None]) -> Callable[..., None]:
        def uploaded(request: Request, response: Response, storage: Storage) -> None:
            data = request.data  # what is not read resets the connection
            named = data.get("meta", data) if isinstance(data, dict) else {}
            name = request.query.get("name", [named.get("name")])[0]
            found = generation(storage, request.params["bucket_name"], name)
            if request.query.get("ifGenerationMatch", [found]) == [found]:
                upload(request, response, storage)
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED

        return uploaded

    def downloaded(request: Request, response: Response, storage: Storage) -> None:
        found = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if found != "0" and request.query.get("ifGenerationNotMatch") == [found]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = found
            download(request, response, storage)

    for name in ("_media_upload", "_multipart_upload", "_create_resumable_upload"):
        monkeypatch.setattr(objects, name, guarded(getattr(objects, name)))
    monkeypatch.setattr(objects, "download", downloaded)


def put(address: str, name: str, content: bytes) -> str:
    """Uploads an object to the emulator's bucket; returns its URL."""
    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    urllib.request.urlopen(f"{address}/upload/storage/v1/b/bucket/o?{query}", content).close()
    return f"gs://bucket/{name}"


def stored(held: Storage, folder: str) -> dict[str, bytes]:
    """Returns the objects of a folder by their names in it."""
    names = [name for name in held.objects.get("bucket", {}) if name.startswith(f"{folder}/")]
    return {name.removeprefix(f"{folder}/"): held.get_file("bucket", name) for name in names}


@contextmanager
def emulator(
    folder: Path, requests: list[tuple[str, str]] | None = None
) -> Iterator[tuple[Storage, str]]:
    """The objects of the emulator, with an empty bucket "bucket", and its address.

    Args:
      folder: scratch of the emulator.
      requests: receives the path and the range ("" without one) of every request.
    """
    held = Storage(use_memory_fs=True, data_dir=str(folder))
    one_by_one, handle = threading.Lock(), Router.handle

    def handled(self: Router, method: str) -> None:
        handler = self._request_handler
        if requests is not None:
            requests.append((handler.path, handler.headers.get("Range", "")))
        if "/private/" in handler.path or handler.path.endswith("/private"):
            handler.send_response(HTTPStatus.UNAUTHORIZED)
            handler.send_header("Content-Length", str(len(REFUSAL)))
            handler.end_headers()
            handler.wfile.write(REFUSAL)
            return
        with one_by_one:
            handle(self, method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "handle", handled)
        honour_generations(patch)
        buckets.create_bucket("bucket", held)
        with Server(("localhost", 0), partial(RequestHandler, held)) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield held, f"http://localhost:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()
