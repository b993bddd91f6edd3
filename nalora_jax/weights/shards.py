"""Reads the headers of safetensors files, writes such files one tensor at a time, and checks the
digests of adapters' files.

The safetensors library's writer needs every tensor of a file in memory at once, which for a model
is a second copy of the model. The format is a header with names, dtypes, shapes and byte ranges,
followed by the bytes, so it can be streamed:

    8 bytes  length of the header, little endian
    header   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
              "__metadata__": {"format": "pt"}}
    data     the tensors' bytes in the header's order

The metadata of an adapter's file contains a digest of the tensors and of the other metadata. Two
fields announce it, so that a file in which the name of one is damaged does not count as a file
without a digest:

    {"format": "pt", "nalora.digest": "sha256", "nalora.content_sha256": "9f86d081884c7d65..."}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nalora_jax.common.folders import write_json
from nalora_jax.errors import NaloraError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# NumPy dtypes by their names in safetensors.
SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# What files are written with: floats, and the codes of quantized weights.
WRITTEN_DTYPES = SAFETENSORS_DTYPES | {
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "I32": np.dtype("int32"),
    "I64": np.dtype("int64"),
}
_NAMES = {dtype: name for name, dtype in WRITTEN_DTYPES.items()}
_TORCH = {"format": "pt"}
_DIGEST = "nalora.content_sha256"
_DIGEST_KIND = "nalora.digest"
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]  # slowest axis first
    format: str  # of the numbers, by the file's name for it: "BF16", "Q4_1"
    start: int  # bytes from the beginning of the file
    size: int  # bytes

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads bytes of the tensor: uint8 ``[count]``.

        Raises:
          NaloraError: the file cannot be read, or is shorter than its header states.
        """
        try:
            data = np.fromfile(self.file, np.uint8, count, offset=self.start + start)
        except OSError as error:
            raise NaloraError(
                str(self.file),
                expected="a file that can be read",
                found=error,
            ) from error
        if data.size != count:
            expected = f"{count} bytes from {self.start + start}"
            remedy = "the file changed; load again"
            raise NaloraError(
                str(self.file),
                expected=expected,
                found=data.size,
                remedy=remedy,
            )
        return data


def dtype_of(stored: FileTensor) -> np.dtype:
    """Returns the NumPy type of a tensor's numbers; raw bytes if they are not floats (e.g. an
    unused mask)."""
    size = stored.size // max(1, math.prod(stored.shape))
    return SAFETENSORS_DTYPES.get(stored.format) or np.dtype((np.void, size))


def read_whole(stored: FileTensor) -> np.ndarray:
    """Returns a tensor in the file's format."""
    return stored.read(0, stored.size).view(dtype_of(stored)).reshape(stored.shape)


def read_header(path: Path) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Returns the tensors of one file and its metadata, after the safetensors library has validated
    its header.

    Raises:
      NaloraError: the file is missing, truncated or damaged.
    """
    with (
        complaints(path),
        safe_open(str(path), framework="numpy"),
        path.open("rb") as file,
    ):
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = FileTensor(
            path,
            tuple(entry["shape"]),
            entry["dtype"],
            8 + length + start,
            stop - start,
        )
    return tensors, metadata


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns every tensor of an adapter's file in float32, and the file's metadata.

    Files without a digest, of other tools and of earlier versions, are read unchecked.

    Raises:
      NaloraError: the file is missing or damaged, its digest does not match its content, or a
        tensor has no floats or an infinite one.
    """
    stored, metadata = read_header(path)
    tensors = {}
    for name, tensor in stored.items():
        if tensor.format not in SAFETENSORS_DTYPES:
            expected = f"one of {', '.join(SAFETENSORS_DTYPES)}"
            raise NaloraError(f"{path}: {name}", expected=expected, found=tensor.format)
        tensors[name] = read_whole(tensor)
    if _DIGEST in metadata or _DIGEST_KIND in metadata:
        noted = metadata.get(_DIGEST, "none")
        actual = _content_digest(tensors, metadata)
        if noted != actual:
            raise NaloraError(
                str(path),
                expected=f"content with the digest {noted[:16]}, as {_DIGEST} in its header states",
                found=f"the digest {actual[:16]}",
                remedy="the file is damaged: restore it from a copy, or export it again; if you "
                "changed it on purpose, save it without this metadata",
            )
    for name, array in tensors.items():
        tensors[name] = array.astype(np.float32, copy=False)
        if not np.isfinite(tensors[name]).all():
            raise NaloraError(
                f"{path}: {name}",
                expected="finite numbers",
                found="NaN or infinity",
            )
    return tensors, metadata


def _content_digest(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
    """Returns the SHA-256 of the metadata and of every tensor's name, dtype, shape and bytes."""
    facts = {name: value for name, value in metadata.items() if name != _DIGEST}
    types = {name: [str(array.dtype), array.shape] for name, array in tensors.items()}
    sha256 = hashlib.sha256(json.dumps([facts, types], sort_keys=True).encode())
    for name in sorted(tensors):
        sha256.update(_bytes_of(tensors[name]))
    return sha256.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextmanager
def complaints(path: Path) -> Iterator[None]:
    """Converts errors of safetensors to a `NaloraError` that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        expected = "a complete safetensors file"
        remedy = "download it again: it is truncated, damaged or of another format"
        raise NaloraError(
            str(path),
            expected=expected,
            found=str(error),
            remedy=remedy,
        ) from error


# ---------------------------------------------------------------- writing


def parse_size(text: str) -> int:
    """Returns the number of bytes of a size in transformers' notation.

    Example:
      >>> parse_size("5GB"), parse_size("500MiB")
      (5000000000, 524288000)

    Raises:
      NaloraError: the text is not a size, or is less than one byte.
    """
    match = re.fullmatch(
        r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]i?B)?",
        text.strip(),
        re.IGNORECASE | re.ASCII,
    )
    size = 0
    if match:
        size = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if size < 1:
        raise NaloraError(
            "--shard-size",
            expected="bytes, or a number with KB, MB or GB",
            found=repr(text),
        )
    return size


def size_of(like: Any) -> int:
    """Returns the bytes of an array's data, of its shape and dtype."""
    return math.prod(like.shape) * np.dtype(like.dtype).itemsize


def write_shards(
    folder: Path,
    likes: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_bytes: int,
) -> None:
    """Writes ``model.safetensors``, or shards with an index if it would exceed ``shard_bytes``.

    Args:
      folder: an existing folder.
      likes: shape and dtype of every tensor, in order.
      tensors: name and array of each, in the same order; only one is in memory at a time.
      shard_bytes: largest file; a larger tensor gets a separate file.
    """
    shards: list[dict[str, Any]] = [{}]
    for name, like in likes.items():
        size = sum(map(size_of, shards[-1].values())) + size_of(like)
        if shards[-1] and size > shard_bytes:
            shards.append({})
        shards[-1][name] = like
    files = [SINGLE]
    if len(shards) > 1:
        files = [
            f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            for i in range(len(shards))
        ]
        weight_map: dict[str, str] = {}
        for file, shard in zip(files, shards, strict=True):
            weight_map |= dict.fromkeys(shard, file)
        total = {"total_size": sum(map(size_of, likes.values()))}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    stream = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, stream)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes an adapter's file, sorted by name, with a digest in its metadata.

    Equal tensors and metadata give equal bytes. The safetensors library's writer orders the
    metadata by a hash that differs between processes.
    """
    tensors = dict(sorted(tensors.items()))
    metadata = {**metadata, _DIGEST_KIND: "sha256"}
    metadata[_DIGEST] = _content_digest(tensors, metadata)
    _write_file(path, tensors, iter(tensors.items()), metadata)


def _write_file(
    path: Path,
    likes: Mapping[str, Any],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] = _TORCH,
) -> None:
    """Writes one safetensors file, as described at the top of this module.

    Args:
      path: the file.
      likes: shape and dtype of each of its tensors, in order.
      tensors: name and array of each; those of this file are taken from it.
      metadata: strings by name.
    """
    described: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, like in likes.items():
        stop = start + size_of(like)
        kind = _NAMES[np.dtype(like.dtype)]
        described[name] = {
            "dtype": kind,
            "shape": list(like.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the data aligned
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for expected, like in likes.items():
            name, array = next(tensors)
            described_as = (expected, like.shape, like.dtype)
            assert (name, array.shape, array.dtype) == described_as, (name, like)
            file.write(_bytes_of(array))
