"""Reads GGUF files: metadata, and tensors dequantized block by block.

Block layouts and dequantization come from the ``gguf`` package. Its `GGUFReader` is not used: it
creates several Python objects for every token of the vocabulary (3 s for 49,152 tokens, 10 s for
262,144), and it trusts every count in a damaged file. The header is read here instead, and every
count and offset is checked against the file's size before use.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from nalora_jax.errors import NaloraError
from nalora_jax.models.family import Metadata
from nalora_jax.weights.shards import DTYPES, FileTensor
from nalora_jax.weights.tensors import Index, TensorSource, whole

READABLE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
# Value types by number; 8 is a string, 9 an array.
_SCALARS = dict(
    enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"))
)
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 1 << 16  # metadata keys, tensors
_MAX_STRINGS = 1 << 22  # in all arrays; the largest vocabularies and merge lists have 2^18 to 2^19
_MAX_DIMENSIONS = 4


class GGUFFile(TensorSource):
    """A GGUF file, as a `TensorSource`.

    Attributes:
      metadata: values by key: numbers, strings, numpy arrays, or lists of strings.

    Raises:
      NaloraError: not a GGUF file, another version or byte order, or a header that does not fit
        the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
            ):
                self.metadata, tensors = _read_header(_Cursor(memory, self.path))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            if isinstance(error, NaloraError):
                raise
            raise NaloraError(str(self.path), expected="a GGUF file", found=error) from error
        super().__init__(str(self.path), tensors, READABLE, "use another quantization of the model")

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor: float32, or the file's 16-bit floats."""
        stored = self._tensors[name]
        *lead, columns = index
        if len(lead) == 2 and lead[0].stop == lead[0].start + 1:  # of one expert
            start = lead[0].start * stored.shape[1]
            return self._rows(stored, start + lead[1].start, start + lead[1].stop)[None, :, columns]
        first = lead[0] if lead else slice(0, 1)
        per_row = math.prod(stored.shape[1:-1])  # rows of bytes in one row of the tensor
        flat = self._rows(stored, first.start * per_row, first.stop * per_row)
        shape = (-1, *stored.shape[1:]) if lead else stored.shape
        return flat.reshape(shape)[(*(slice(None) for _ in lead[:1]), *lead[1:], columns)]

    def whole(self, name: str) -> np.ndarray:
        """Returns a small tensor as float64."""
        self.check_readable(name)
        return self.read(name, whole(self._shapes[name])).astype(np.float64)

    def about(self, prefix: str) -> Metadata:
        """Returns the metadata whose keys begin with ``prefix``."""
        return Metadata(self.metadata, prefix, self.where)

    def _rows(self, stored: FileTensor, start: int, stop: int) -> np.ndarray:
        """Returns dequantized rows along the last axis: ``[stop - start, shape[-1]]``."""
        row = stored.size // math.prod(stored.shape[:-1])
        # Read, not mapped: a mapped file's pages would count as this process's memory.
        raw = stored.read(start * row, (stop - start) * row).reshape(stop - start, row)
        if stored.format in ("F16", "BF16"):
            return raw.view(DTYPES[stored.format])
        return dequantize(raw, GGMLQuantizationType[stored.format])


# ---------------------------------------------------------------- the header


class _Cursor:
    """A reader that moves forward through a mapped file and checks its end."""

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self.memory, self.path = memory, path
        self.size, self.at = len(memory), 0
        self.strings_left = _MAX_STRINGS

    def error(self, expected: object, actual: object) -> NaloraError:
        remedy = "download the file again: it is truncated or damaged"
        where = f"{self.path}: GGUF header, byte {self.at}"
        return NaloraError(where, expected=expected, found=actual, remedy=remedy)

    def skip(self, count: int) -> int:
        """Skips ``count`` bytes, which must be in the file, and returns their start."""
        if count > self.size - self.at:
            raise self.error(f"{count} more bytes", f"{self.size - self.at} until the end of the file")
        self.at += count
        return self.at - count

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack_from(form, self.memory, self.skip(struct.calcsize(form)))

    def count(self, limit: int, what: str) -> int:
        """Reads a count of items that take at least one byte each."""
        (count,) = self.numbers("<Q")
        if count > min(limit, self.size - self.at):
            raise self.error(f"at most {min(limit, self.size - self.at)} {what}", count)
        return int(count)

    def string(self) -> str:
        (length,) = self.numbers("<Q")
        start = self.skip(length)
        try:
            return self.memory[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a UTF-8 string", error.reason) from error

    def value(self) -> Any:
        (kind,) = self.numbers("<I")
        if kind == _STRING:
            return self.string()
        expected, array = "a value type of GGUF", kind == _ARRAY
        if array:
            expected, (kind,) = "an array of numbers or strings", self.numbers("<I")
            if kind == _STRING:
                count = self.count(self.strings_left, "strings")
                self.strings_left -= count
                return [self.string() for _ in range(count)]
        if not _SCALARS.get(kind):
            raise self.error(expected, f"type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        count = self.count(self.size, "numbers") if array else 1
        values = np.frombuffer(self.memory, dtype, count, self.skip(count * dtype.itemsize)).copy()
        if array:
            return values
        if dtype == np.float32:  # the decimal that it was written from: 1e-05, not 9.999999747378752e-06
            return float(str(values[0]))
        return values[0].item()


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    where, magic = str(cursor.path), cursor.memory[cursor.skip(4) : 4]
    if magic != b"GGUF":
        raise NaloraError(where, expected="a GGUF file", found=f"a file that begins with {magic!r}")
    (version,) = cursor.numbers("<I")
    if version not in (2, 3):
        actual = f"version {version}"
        if version >= 1 << 16:
            actual = "a big-endian file or a damaged version number"
        raise NaloraError(where, expected="GGUF version 2 or 3, little-endian", found=actual)
    n_tensors = cursor.count(_MAX_ITEMS, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(_MAX_ITEMS, "metadata keys")):
        key = cursor.string()
        if key in metadata:
            raise cursor.error("each key once", f"{key} again")
        metadata[key] = cursor.value()
    if metadata.get("split.count", 1) != 1:
        found, remedy = f"a part of {metadata['split.count']}", "llama.cpp's llama-gguf-split --merge"
        raise NaloraError(
            where, expected="a model in one file", found=found, remedy=f"join the parts with {remedy}"
        )
    return metadata, _read_tensor_table(cursor, n_tensors, metadata.get("general.alignment", 32))


def _read_tensor_table(cursor: _Cursor, count: int, alignment: object) -> dict[str, FileTensor]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error("a power of two as general.alignment", alignment)
    tensors: dict[str, FileTensor] = {}
    for _ in range(count):
        name = cursor.string()
        (dimensions,) = cursor.numbers("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.error(f"{name}: 1 to {_MAX_DIMENSIONS} dimensions", dimensions)
        shape = cursor.numbers(f"<{dimensions}Q")[::-1]
        number, offset = cursor.numbers("<IQ")
        if min(shape) < 1:
            raise cursor.error(f"{name}: dimensions of 1 or more", shape)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise cursor.error(f"{name}: a tensor type of GGUF", number) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.error(
                f"{name}: rows of whole {kind.name} blocks of {block}", f"rows of {shape[-1]}"
            )
        if name in tensors:
            raise cursor.error("each tensor once", f"{name} again")
        size = math.prod(shape) // block * block_bytes
        tensors[name] = FileTensor(cursor.path, shape, kind.name, offset, size)
    start = -(-cursor.at // alignment) * alignment  # of the data, which offsets are relative to
    for name, tensor in tensors.items():
        tensors[name] = replace(tensor, start=start + tensor.start)
        beyond = start + tensor.start + tensor.size - cursor.size
        if beyond > 0:
            raise cursor.error(f"{name} to end within the file", f"its end {beyond} bytes beyond")
    return tensors
