"""Reads the safetensors of a bucket folder by ranges, without copying files.

Memory holds a few chunks of a tensor.

A process reads the rows of a tensor that its devices need. If a mesh splits the other axis, it
reads full rows.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.errors import NaloraError
from nalora_jax.weights.hf import SafetensorsFolder, Stored, read_header
from nalora_jax.weights.slices import Index
from nalora_jax.weights.tensors import WORKERS, FileTensor

CHUNK = 4 << 20  # bytes of one request
_HELD = 2 * WORKERS  # chunks in memory
_HEADER = 64 << 10  # bytes of the first request for a file's header
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones


class StreamedFolder(SafetensorsFolder):
    """The tensors of a model's folder in a bucket, as a `TensorSource`.

    Args:
      folder: local copies of its small files, including the index of the shards.
      url: of the folder in the bucket.

    Raises:
      NaloraError: see `SafetensorsFolder`; or the bucket refuses or does not respond.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._url = url
        self._chunks = _Chunks()
        super().__init__(folder)

    @property
    def where(self) -> str:
        """The folder's URL."""
        return self._url

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor in the file's format, fetching the rows around it."""
        stored = self._tensors[name]
        if not stored.shape:
            return self._fetched(stored, 0, stored.stop - stored.start).view(stored.format).reshape(())
        rows, *columns = index
        row = (stored.stop - stored.start) // max(1, stored.shape[0])
        flat = self._fetched(stored, rows.start * row, rows.stop * row).view(stored.format)
        return flat.reshape(rows.stop - rows.start, *stored.shape[1:])[(slice(None), *columns)]

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes in the bucket."""
        tensor = self._tensors[name]
        size = tensor.stop - tensor.start
        return _StreamedTensor(tensor.file, tensor.start, size, tensor.dtype, self._url_of(tensor))

    def _url_of(self, stored: Stored) -> str:
        return f"{self._url}/{stored.file.name}"

    def _fetched(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Returns bytes of a tensor, uint8 ``[stop - start]``, from one or more chunks."""
        url, parts = self._url_of(stored), []
        for first in range(start // CHUNK * CHUNK, stop, CHUNK):
            last = min(first + CHUNK, stored.stop - stored.start)
            chunk = self._chunks.get(url, stored.start + first, stored.start + last)
            parts.append(chunk[max(start, first) - first : min(stop, last) - first])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([*parts, np.zeros(0, np.uint8)])

    def _names(self) -> list[str]:
        return buckets.names(self._url)

    def _header(self, file: str) -> dict[str, Stored]:
        """Returns the tensors of one file, from its first bytes.

        The safetensors library checks local files only: it gets a sparse file with the same header
        and size.
        """
        url = f"{self._url}/{file}"
        size, head = buckets.size(url), buckets.read(url, 0, _HEADER)
        stop = 8 + min(int.from_bytes(head[:8], "little"), _LARGEST_HEADER)
        if stop > len(head):
            head += buckets.read(url, len(head), min(stop, size))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / file
            path.write_bytes(head[:stop])
            os.truncate(path, size)
            try:
                tensors = read_header(path)
            except NaloraError as error:
                raise NaloraError(
                    url, expected=error.expected, found=error.found, remedy="upload it again"
                ) from error
        return {name: replace(stored, file=self.folder / file) for name, stored in tensors.items()}


@dataclass(frozen=True)
class _StreamedTensor(FileTensor):
    """The location of a tensor's bytes in a bucket."""

    url: str

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns bytes of the tensor, uint8 ``[count]``."""
        first = self.start + start
        return np.frombuffer(buckets.read(self.url, first, first + count), np.uint8)


class _Chunks:
    """A least-recently-used cache of file ranges; each cached range is fetched once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int, int], Future[np.ndarray]] = OrderedDict()

    def get(self, url: str, start: int, stop: int) -> np.ndarray:
        """Returns bytes ``start`` to ``stop`` of a file; waits for a fetch already in progress.

        Raises:
          NaloraError: the bucket does not deliver them, or delivers fewer.
        """
        key = (url, start, stop)
        with self._lock:
            chunk = self._held.get(key)
            fetches = chunk is None
            if chunk is None:
                chunk = self._held[key] = Future()
            self._held.move_to_end(key)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        if fetches:
            try:
                chunk.set_result(_bytes(url, start, stop))
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)  # a later call tries again
                chunk.set_exception(error)
        return chunk.result()


def _bytes(url: str, start: int, stop: int) -> np.ndarray:
    data = buckets.read(url, start, stop) if stop > start else b""
    if len(data) != stop - start:
        raise NaloraError(
            url, expected=f"{stop - start} bytes from {start}", found=len(data), remedy="upload it again"
        )
    return np.frombuffer(data, np.uint8)
