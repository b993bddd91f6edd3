"""Hugging Face folders: config.json, and the tensors of one or several safetensors files.

Only safetensors is read. ``.bin`` and ``.pt`` files are pickles, which can execute arbitrary code
when they are opened. A folder in a bucket is read by ranges, without copying files: memory holds a
few chunks of a tensor. A process reads the rows of a tensor that its devices need; if a mesh splits
the other axis, it reads full rows.
"""

from __future__ import annotations

import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.weights.shards import (
    INDEX,
    SAFETENSORS_DTYPES,
    SINGLE,
    FileTensor,
    complaints,
    dtype_of,
    read_header,
)
from nalora_jax.weights.tensors import WORKERS, Index, TensorSource

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "convert it with transformers: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
)
_MAX_MAPPED = 16 << 20  # bytes
# bytes that the system may map in addition to the requested bytes
_NEIGHBOURS = 1 << 20


@dataclass(frozen=True)
class ResolvedSource:
    """The location of a model's files."""

    kind: Literal["gguf", "hf"]
    path: Path  # the GGUF file, or the Hugging Face folder
    name: str  # of the base in an adapter's config: hub id, package's file, or path as given
    copy_of: str = ""  # hub id of the model that a package's community GGUF file was converted from
    # bucket folder whose safetensors are read by ranges; the rest is at `path`
    streamed: str = ""
    # in place of the config's: see `models.rope_scaling.with_rope_scaling`
    rope_scaling: str = ""


class SafetensorsFolder(TensorSource):
    """The tensors of a folder, as a `TensorSource`.

    Raises:
      NaloraError: no safetensors file, or several without an index; a damaged or truncated file;
        an index that names a missing file, or a tensor that is not in its file.
    """

    readable = tuple(SAFETENSORS_DTYPES)
    remedy = "use the model's unquantized files"

    def __init__(self, folder: str | Path, where: str = "") -> None:
        self.folder = Path(folder)
        self.where = where or str(folder)
        self._maps: dict[Path, np.ndarray] = {}  # memory maps of the files
        self._mapped = 0  # bytes of the maps in memory
        super().__init__(self.where, self._read_headers())

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a read-only slice of a tensor in the file's format, read on access."""
        stored = self._tensors[name]
        data = self._bytes(stored.file)[stored.start : stored.start + stored.size]
        flat = data.view(dtype_of(stored))
        array = flat.reshape(stored.shape or (1,))[index]
        self._mapped += max(array.nbytes, _NEIGHBOURS)
        return array

    def _bytes(self, path: Path) -> np.ndarray:
        """Returns a memory map of a file, renewed every `_MAX_MAPPED` bytes.

        Mapped pages count as this process's memory until the map is renewed.
        """
        if self._mapped > _MAX_MAPPED:
            self._maps = {}
            self._mapped = 0
        maps = self._maps  # another thread may replace self._maps
        if path not in maps:
            with complaints(path):
                maps[path] = np.asarray(np.memmap(path, np.uint8, "r"))
        return maps[path]

    def _names(self) -> list[str]:
        """Returns the names of the folder's files."""
        return [path.name for path in self.folder.iterdir() if path.is_file()]

    def _header(self, file: str) -> dict[str, FileTensor]:
        """Returns the tensors of one file."""
        return read_header(self.folder / file)[0]

    def _read_headers(self) -> dict[str, FileTensor]:
        """Returns the tensors of all files by name, checked against the index.

        With an index, a tensor counts only in the file that the index names.
        """
        present = self._names()
        listed = self._index(present)
        tensors: dict[str, FileTensor] = {}
        for file in sorted(set(listed.values())) or [self._only_file(present)]:
            for name, stored in self._header(file).items():
                if not listed or listed.get(name) == file:
                    tensors[name] = stored
        if lost := [name for name in listed if name not in tensors]:
            expected = f"{lost[0]} in {listed[lost[0]]}"
            remedy = "index and files are of different versions"
            raise NaloraError(
                str(self.folder / INDEX),
                expected=expected,
                found="a file without it",
                remedy=f"download the folder again: {remedy}",
            )
        return tensors

    def _index(self, present: list[str]) -> dict[str, str]:
        """Returns the file of each tensor; empty if one file has all tensors or there is no index.

        If both exist, the single file is used, as in transformers.
        """
        path = self.folder / INDEX
        if SINGLE in present or not path.exists():
            return {}
        listed = read_json(path).get("weight_map")
        if (
            not isinstance(listed, dict)
            or not listed
            or any(type(file) is not str for file in listed.values())
        ):
            expected = "file names of this folder by tensor name"
            raise NaloraError(
                f"{path}: weight_map",
                expected=expected,
                found="something else",
            )
        files = set(listed.values())
        if missing := sorted(files - set(present)):
            expected = f"the file {missing[0]!r} that it names"
            found = f"{len(missing)} of {len(files)} files missing"
            remedy = "download the folder again"
            raise NaloraError(str(path), expected=expected, found=found, remedy=remedy)
        return dict(listed)

    def _only_file(self, present: list[str]) -> str:
        """Returns the safetensors file of a folder without an index.

        Raises:
          NaloraError: there is none, or several and none has the usual name.
        """
        files = sorted(name for name in present if name.endswith(".safetensors"))
        if SINGLE in files:
            return SINGLE
        if len(files) == 1:
            return files[0]
        remedy = "give a folder with config.json, tokenizer.json and safetensors files"
        pickles = sorted(name for name in present if name.endswith(PICKLES))
        if files:
            remedy = f"add {INDEX}"
        elif pickles:
            code = "which can run any code when it is opened"
            remedy = f"{pickles[0]} is a pickle, {code}; {CONVERT}"
        found = ", ".join(files) or "no safetensors file"
        expected = f"{SINGLE}, or several files and {INDEX}"
        raise NaloraError(self.where, expected=expected, found=found, remedy=remedy)


def open_tensors(resolved: ResolvedSource) -> SafetensorsFolder:
    """Returns the tensors of a Hugging Face folder on this machine or in a bucket."""
    if resolved.streamed:
        return StreamedFolder(resolved.path, resolved.streamed)
    return SafetensorsFolder(resolved.path)


# ---------------------------------------------------------------- folders in buckets


_CHUNK = 4 << 20  # bytes of one request
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
        pool = ThreadPoolExecutor(WORKERS)
        self._lock = threading.Lock()
        self._fetch = lru_cache(_HELD)(lambda *place: pool.submit(_bytes, *place))
        super().__init__(folder, url)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor in the file's format, fetching the rows around it."""
        stored = self._tensors[name]
        if not stored.shape:
            data = self._fetch_bytes(stored, 0, stored.size)
            return data.view(dtype_of(stored)).reshape(())
        rows, *columns = index
        row = stored.size // max(1, stored.shape[0])
        data = self._fetch_bytes(stored, rows.start * row, rows.stop * row)
        shape = (rows.stop - rows.start, *stored.shape[1:])
        return data.view(dtype_of(stored)).reshape(shape)[(slice(None), *columns)]

    def _fetch_bytes(self, stored: FileTensor, start: int, stop: int) -> np.ndarray:
        """Returns bytes of a tensor, uint8 ``[stop - start]``, from one or more chunks."""
        url = f"{self.where}/{stored.file.name}"
        parts = []
        # Chunks start at multiples of CHUNK in the tensor, so neighbouring slices share them.
        for first in range(start // _CHUNK * _CHUNK, stop, _CHUNK):
            last = min(first + _CHUNK, stored.size)
            chunk = self._chunk(url, stored.start + first, stored.start + last)
            begin = max(start, first) - first
            parts.append(chunk[begin : min(stop, last) - first])
        if len(parts) == 1:
            return parts[0]
        # An empty tensor has no parts.
        return np.concatenate([*parts, np.zeros(0, np.uint8)])

    def _chunk(self, url: str, start: int, stop: int) -> np.ndarray:
        """Returns bytes ``start`` to ``stop`` of a file, fetched once; waits for a fetch already in
        progress."""
        with self._lock:  # two threads would both miss the cache
            chunk = self._fetch(url, start, stop)
        try:
            return chunk.result()
        except Exception:
            self._fetch.cache_clear()  # a later call tries again
            raise

    def _names(self) -> list[str]:
        return buckets.names(self.where)

    def _header(self, file: str) -> dict[str, FileTensor]:
        """Returns the tensors of one file, from its first bytes.

        The safetensors library checks local files only: it gets a sparse file with the same header
        and size.
        """
        url = f"{self.where}/{file}"
        size = buckets.size(url)
        head = buckets.read_range(url, 0, _HEADER)
        stop = 8 + min(int.from_bytes(head[:8], "little"), _LARGEST_HEADER)
        if stop > len(head):
            head += buckets.read_range(url, len(head), min(stop, size))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / file
            path.write_bytes(head[:stop])
            os.truncate(path, size)
            try:
                tensors, _ = read_header(path)
            except NaloraError as error:
                expected = error.expected
                found = error.found
                raise NaloraError(
                    url,
                    expected=expected,
                    found=found,
                    remedy="upload it again",
                ) from error
        streamed: dict[str, FileTensor] = {}
        for name, stored in tensors.items():
            streamed[name] = _StreamedTensor(
                self.folder / file,
                stored.shape,
                stored.format,
                stored.start,
                stored.size,
                url,
            )
        return streamed


@dataclass(frozen=True)
class _StreamedTensor(FileTensor):
    """The location of a tensor's bytes in a bucket."""

    url: str

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns bytes of the tensor, uint8 ``[count]``."""
        return _bytes(self.url, self.start + start, self.start + start + count)


def _bytes(url: str, start: int, stop: int) -> np.ndarray:
    """Returns bytes ``start`` to ``stop`` of a file in a bucket: uint8 ``[stop - start]``."""
    data = b""
    if stop > start:
        data = buckets.read_range(url, start, stop)
    if len(data) != stop - start:
        raise NaloraError(
            url,
            expected=f"{stop - start} bytes from {start}",
            found=len(data),
            remedy="upload it again",
        )
    return np.frombuffer(data, np.uint8)
