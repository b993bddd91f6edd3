"""Hugging Face folders: config.json, and the tensors of one or several safetensors files.

Only safetensors is read. ``.bin`` and ``.pt`` files are pickles, which can execute arbitrary code
when they are opened. A folder in a bucket is read by ranges, without copying files: memory holds a
few chunks of a tensor. A process reads the rows of a tensor that its devices need; if a mesh splits
the other axis, it reads full rows.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nalora_jax.common import buckets
from nalora_jax.data.tokenizer import is_unicode, read_json
from nalora_jax.errors import NaloraError
from nalora_jax.weights.tensors import WORKERS, FileTensor, Index

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# NumPy dtypes by their names in safetensors.
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_MAPPED = 16 << 20  # bytes
_NEIGHBOURS = 1 << 20  # bytes that the system may map in addition to the requested bytes


@dataclass(frozen=True)
class ResolvedSource:
    """The location of a model's files."""

    kind: Literal["gguf", "hf"]
    path: Path  # the GGUF file, or the Hugging Face folder
    name: str  # of the base in an adapter's config: hub id, package's file, or path as given
    copy_of: str = ""  # hub id of the model that a package's community GGUF file was converted from
    streamed: str = ""  # bucket folder whose safetensors are read by ranges; the rest is at `path`
    rope_scaling: str = ""  # in place of the config's: see `models.rope_scaling.with_rope_scaling`


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int  # bytes from the beginning of the file
    stop: int

    @property
    def format(self) -> np.dtype:
        """NumPy type of the numbers; raw bytes if they are not floats (e.g. an unused mask)."""
        return DTYPES.get(self.dtype) or np.dtype(
            (np.void, (self.stop - self.start) // max(1, math.prod(self.shape)))
        )


class SafetensorsFolder:
    """The tensors of a folder, as a `TensorSource`.

    Raises:
      NaloraError: no safetensors file, or several without an index; a damaged or truncated file;
        an index that names a missing file, or a tensor that is not in its file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._maps: dict[Path, np.ndarray] = {}  # memory maps of the files
        self._mapped = 0  # bytes of the maps in memory
        self._tensors = self._read_headers()

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def check_readable(self, name: str) -> None:
        """Raises an error if a tensor's type is not in `DTYPES`."""
        stored = self._tensors[name]
        if stored.dtype not in DTYPES:
            raise NaloraError(
                f"{stored.file}: {name}",
                expected=f"one of {', '.join(DTYPES)}",
                found=stored.dtype,
                remedy="use the model's unquantized files",
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a read-only slice of a tensor in the file's format, read on access."""
        stored = self._tensors[name]
        flat = self._bytes(stored.file)[stored.start : stored.stop].view(stored.format)
        array = flat.reshape(stored.shape or (1,))[index]
        self._mapped += max(array.nbytes, _NEIGHBOURS)
        return array

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes."""
        tensor = self._tensors[name]
        return FileTensor(tensor.file, tensor.start, tensor.stop - tensor.start, tensor.dtype)

    def _bytes(self, path: Path) -> np.ndarray:
        """Returns a memory map of a file, renewed every `_MAX_MAPPED` bytes.

        Mapped pages count as this process's memory until the map is renewed.
        """
        if self._mapped > _MAX_MAPPED:
            self._maps, self._mapped = {}, 0
        maps = self._maps  # another thread may replace self._maps
        if path not in maps:
            with _complaints(path):
                maps[path] = np.asarray(np.memmap(path, np.uint8, "r"))
        return maps[path]

    def _names(self) -> list[str]:
        """Returns the names of the folder's files."""
        return [path.name for path in self.folder.iterdir() if path.is_file()]

    def _header(self, file: str) -> dict[str, StoredTensor]:
        """Returns the tensors of one file."""
        return read_header(self.folder / file)

    def _read_headers(self) -> dict[str, StoredTensor]:
        listed = self._index()
        tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(listed.values())) or [self._only_file()]:
            for name, stored in self._header(file).items():
                if not listed or listed.get(name) == file:
                    tensors[name] = stored
        lost = [name for name in listed if name not in tensors]
        if lost:
            raise NaloraError(
                str(self.folder / INDEX),
                expected=f"{lost[0]} in {listed[lost[0]]}",
                found="a file without it",
                remedy="download the folder again: index and files are of different versions",
            )
        return tensors

    def _index(self) -> dict[str, str]:
        """Returns the file of each tensor; empty if one file has all tensors or there is no index.

        If both exist, the single file is used, as in transformers.
        """
        path = self.folder / INDEX
        if SINGLE in self._names() or not path.exists():
            return {}
        listed = read_json(path).get("weight_map")
        if not listed or not isinstance(listed, dict) or not all(map(_is_file_name, listed.values())):
            expected = "file names of this folder by tensor name"
            raise NaloraError(f"{path}: weight_map", expected=expected, found="something else")
        files = set(listed.values())
        missing = sorted(files - set(self._names()))
        if missing:
            raise NaloraError(
                str(path),
                expected=f"the file {missing[0]} that it names",
                found=f"{len(missing)} of {len(files)} files missing",
                remedy="download the folder again",
            )
        return dict(listed)

    def _only_file(self) -> str:
        files = sorted(name for name in self._names() if name.endswith(".safetensors"))
        if SINGLE in files:
            return SINGLE
        if len(files) != 1:
            raise NaloraError(
                self.where,
                expected=f"{SINGLE}, or several files and {INDEX}",
                found=", ".join(files) or "no safetensors file",
                remedy=_pickle_remedy(self._names()) if not files else f"add {INDEX}",
            )
        return files[0]


def _is_file_name(text: object) -> bool:
    """Returns True if ``text`` can be a file's name: at most 255 bytes, and valid Unicode."""
    if not isinstance(text, str) or Path(text).name != text:
        return False
    return 0 < len(text.encode("utf-8", "replace")) <= 255 and is_unicode(text)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, after the safetensors library has validated its header."""
    with _complaints(path), safe_open(str(path), framework="numpy"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, tuple(each["shape"]), each["dtype"], *(8 + length + at for at in each["data_offsets"])
        )
        for name, each in header.items()
    }


def _pickle_remedy(names: Collection[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        return "give a folder with config.json, tokenizer.json and safetensors files"
    return (
        f"{pickles[0]} is a pickle, which can run any code when it is opened, and is never read; "
        "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Converts errors of safetensors to a `NaloraError` that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        expected = "a complete safetensors file"
        remedy = "download it again: it is truncated, damaged or of another format"
        raise NaloraError(str(path), expected=expected, found=str(error), remedy=remedy) from error


# ---------------------------------------------------------------- folders in buckets


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

    def _url_of(self, stored: StoredTensor) -> str:
        return f"{self._url}/{stored.file.name}"

    def _fetched(self, stored: StoredTensor, start: int, stop: int) -> np.ndarray:
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

    def _header(self, file: str) -> dict[str, StoredTensor]:
        """Returns the tensors of one file, from its first bytes.

        The safetensors library checks local files only: it gets a sparse file with the same header
        and size.
        """
        url = f"{self._url}/{file}"
        size, head = buckets.size(url), buckets.read_range(url, 0, _HEADER)
        stop = 8 + min(int.from_bytes(head[:8], "little"), _LARGEST_HEADER)
        if stop > len(head):
            head += buckets.read_range(url, len(head), min(stop, size))
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
        return np.frombuffer(buckets.read_range(self.url, first, first + count), np.uint8)


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
    data = buckets.read_range(url, start, stop) if stop > start else b""
    if len(data) != stop - start:
        raise NaloraError(
            url, expected=f"{stop - start} bytes from {start}", found=len(data), remedy="upload it again"
        )
    return np.frombuffer(data, np.uint8)
