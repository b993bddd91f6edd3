"""Tensors of a file into the parameter tree, one block at a time, straight to the devices that hold them.

A file format is a `TensorSource`; what its tensors are called and how they are transposed is a `KeyMap`. Every device's
part of every leaf is one buffer that is filled from slices of the file, by all cores: memory that the system has to
find first costs more than the copy into it, and comes faster to several at once. On a CPU JAX takes such a buffer over
without a copy, so loading needs the parameters' own bytes and a block per core.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig, param_shapes
from nalora_jax.nn.quantize import KERNELS, Kind, Quantized, quantize
from nalora_jax.weights.keymaps import KeyMap, SourceTensor

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
BLOCK = 1 << 16  # elements read at once: a quarter of a megabyte, which stays in a core's cache while it is transposed
_QUANTIZED = 1 << 18  # elements quantized at once
WORKERS = min(8, os.cpu_count() or 1)  # more do not read memory faster
_ALIGNMENT = 64  # bytes; what XLA asks of a host buffer that it uses as it is

Index = tuple[slice, ...]  # start and stop given, no step


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor's bytes in a file."""

    file: Path
    start: int  # bytes from the beginning of the file
    size: int
    format: str  # as the file calls it: "BF16", "Q4_1"


class TensorSource(Protocol):
    """The named tensors of a file or folder, in PyTorch's orientation (``[out, in]``)."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by the file's own name."""

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless the tensor's number format is one that `read` knows."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor as floating-point numbers, reading little more of the file than that."""

    def stored(self, name: str) -> Stored:
        """Where a tensor's bytes lie, and in which number format."""


def load_params(
    config: ModelConfig,
    source: TensorSource,
    keymap: KeyMap,
    *,
    dtype: str,
    shardings: Mapping[str, Sharding] | None = None,
    quantized: Kind | None = None,
) -> dict[str, Any]:
    """The parameter tree of a model.

    Args:
      config: the model; its shapes are checked against the source's before anything is read.
      source: the file(s).
      keymap: of the same model and file format.
      dtype: of every parameter, "bfloat16" or "float32".
      shardings: where each leaf lives, by slash-joined path; by default on the first device.
      quantized: what the projections' kernels are held as, in place of ``dtype``; each tensor is quantized from the
        file's own numbers as it is read, so that no more than one is ever held as floats.

    Raises:
      NaloraError: an unknown dtype; a missing, unknown, misshapen or unreadable tensor; or a separate output head where
        the config says that it is the embedding.
    """
    return load_leaves(param_shapes(config), source, keymap, dtype=dtype, shardings=shardings, quantized=quantized)


def load_leaves(
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    keymap: KeyMap,
    *,
    dtype: str,
    shardings: Mapping[str, Sharding] | None = None,
    quantized: Kind | None = None,
) -> dict[str, Any]:
    """`load_params` of a model that is described by the shapes of its leaves alone."""
    names = check_tensors(source, keymap, dtype)
    fills: dict[str, list[_Fill]] = defaultdict(list)
    for tensor in keymap.tensors:
        for number, slot in enumerate(tensor.slots):
            lead = tuple(i for i in (slot.layer, slot.expert) if i is not None)
            fills[slot.path].append(_Fill(names[tensor.name], tensor, number, lead))
    where = shardings or defaultdict(lambda: SingleDeviceSharding(jax.local_devices()[0]))
    leaves: dict[str, Any] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, shape in shapes.items():
            reader = _Reader(fills[path], source, pool)
            if quantized and re.search(KERNELS, path):
                leaves[path] = _quantized_leaf(shape, quantized, where[path], reader)
            else:
                leaves[path] = _leaf(shape, DTYPES[dtype], where[path], reader)
    return trees.unflatten(leaves)


def check_tensors(source: TensorSource, keymap: KeyMap, dtype: str = "float32") -> dict[str, str]:
    """The file's name of every canonical tensor, after every check that needs no weights (and the tied head's)."""
    if dtype not in DTYPES:
        raise NaloraError("dtype", expected=" or ".join(DTYPES), found=dtype)
    names = keymap.check(source.shapes(), source.where)
    for name in names.values():
        source.check_readable(name)
    _check_aliases(source, keymap, names)
    return names


def _check_aliases(source: TensorSource, keymap: KeyMap, names: Mapping[str, str]) -> None:
    """A tied head may be stored as well, but only as the embedding's equal."""
    aliases = dict(keymap.aliases)
    for name, shape in source.shapes().items():
        other = aliases.get(keymap.canonical(name))
        if other is None:
            continue
        twin = names[other]
        same = shape == source.shapes()[twin] and all(
            np.array_equal(source.read(name, block), source.read(twin, block)) for block in _blocks(_whole(shape))
        )
        if not same:
            raise NaloraError(
                f"{source.where}: {name}",
                expected=f"the same numbers as {twin}, since the config ties the output head to the embedding",
                found="a different tensor",
                remedy='set "tie_word_embeddings": false in config.json if the model has its own head',
            )


# ---------------------------------------------------------------- one leaf


class _Fill:
    """One tensor's (or, of a fused one, one part's) place in a leaf."""

    def __init__(self, name: str, tensor: SourceTensor, number: int, lead: tuple[int, ...]) -> None:
        self.name = name  # in the file
        self.tensor = tensor
        self.lead = lead  # the leaf's leading indices: layer, expert
        self.first_row = sum(tensor.rows[:number])
        self.rows = tensor.rows[number]

    def into(self, target: np.ndarray, index: Index, source: TensorSource, share: tuple[int, int]) -> None:
        """Writes the slice ``index`` of this part, in our layout, to ``target`` of the same shape.

        Args:
          share: ``(k, n)`` writes the k-th of n pieces.
        """
        k, n = share
        if self.tensor.transform.mixes_rows:
            if k:  # the first share is all of it
                return
            whole = source.read(self.name, self._shifted(_whole((self.rows, *self.tensor.shape[1:]))))
            target[...] = self.tensor.transform.into(whole)[index].astype(target.dtype)
            return
        swaps = self.tensor.transform.swaps
        theirs = (*index[:-2], index[-1], index[-2]) if swaps else index
        blocks = list(_blocks(theirs))
        for block in blocks[len(blocks) * k // n : len(blocks) * (k + 1) // n]:
            read = source.read(self.name, self._shifted(block)).astype(target.dtype, copy=False)
            relative = tuple(slice(b.start - t.start, b.stop - t.start) for b, t in zip(block, theirs, strict=True))
            place = (*relative[:-2], relative[-1], relative[-2]) if swaps else relative
            target[place] = self.tensor.transform.into(read)

    def _shifted(self, index: Index) -> Index:
        first, *rest = index
        return (slice(first.start + self.first_row, first.stop + self.first_row), *rest)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What fills one leaf, and who does the work."""

    fills: list[_Fill]
    source: TensorSource
    pool: Executor

    def read(self, index: Index, dtype: Any) -> np.ndarray:
        """A slice of the leaf."""
        buffer = _aligned(tuple(part.stop - part.start for part in index), dtype)
        jobs = []
        for fill in self.fills:
            lead, rest = index[: len(fill.lead)], index[len(fill.lead) :]
            if all(part.start <= i < part.stop for i, part in zip(fill.lead, lead, strict=True)):
                place = tuple(i - part.start for i, part in zip(fill.lead, lead, strict=True))
                jobs.append(partial(fill.into, buffer[(*place, ...)], rest, self.source))  # a view, of a scalar too
        shares = -(-WORKERS // max(1, len(jobs)))  # few tensors are shared by several workers each
        tasks = [(job, (k, shares)) for job in jobs for k in range(shares)]
        list(self.pool.map(_run, tasks))  # a list, for the errors
        return buffer


def _run(task: tuple[Callable[[tuple[int, int]], None], tuple[int, int]]) -> None:
    job, share = task
    with np.errstate(all="ignore"):  # a file's own infinities and NaNs are not ours to warn about
        job(share)


def _leaf(shape: tuple[int, ...], dtype: Any, sharding: Sharding, reader: _Reader) -> jax.Array:
    """The leaf as a global array; each distinct slice of this process's devices is read once, on its own."""
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: Index | None) -> np.ndarray:
        given = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), shape, strict=True))
        key = tuple((part.start, part.stop) for part in given)
        if key not in read:
            read[key] = reader.read(given, dtype)
        return read[key]

    return jax.make_array_from_callback(shape, sharding, shard)


_quantize = jax.jit(quantize, static_argnums=1)


def _quantized_leaf(shape: tuple[int, ...], kind: Kind, sharding: Sharding, reader: _Reader) -> Quantized:
    """The leaf's codes and scales, some output channels of one layer (one expert) after the other.

    On several devices each process quantizes all of the leaf, since blocks of weights may cross the devices' borders.
    """
    like = jax.eval_shape(partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, np.float32))
    codes, scales = (_aligned(part.shape, part.dtype) for part in (like.codes, like.scales))
    columns = max(1, _QUANTIZED // shape[-2])
    for lead in np.ndindex(*shape[:-2]):
        for start in range(0, shape[-1], columns):
            channels = slice(start, min(start + columns, shape[-1]))
            index = (*(slice(i, i + 1) for i in lead), slice(0, shape[-2]), channels)
            one = _quantize(reader.read(index, np.float32), kind)
            for whole, part in ((codes, one.codes), (scales, one.scales)):
                whole[(*lead, slice(None), channels)] = np.asarray(part).reshape(part.shape[-2:])
    return Quantized(_placed(codes, sharding), _placed(scales, sharding), kind)


def _placed(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """``array`` where the float kernel would be; an axis that became too short to be split is whole everywhere."""
    if isinstance(sharding, NamedSharding):
        parts = [(part,) if isinstance(part, str) else part or () for part in sharding.spec]
        ways = [math.prod(sharding.mesh.shape[name] for name in names) for names in parts]
        kept = [names if size % n == 0 else None for names, n, size in zip(parts, ways, array.shape, strict=False)]
        sharding = NamedSharding(sharding.mesh, P(*kept))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that JAX can use on a CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)


def _blocks(index: Index) -> Iterator[Index]:
    """``index`` cut along its first axis into pieces of about `BLOCK` elements."""
    first, *rest = index
    step = max(1, BLOCK // max(1, math.prod(part.stop - part.start for part in rest)))
    for start in range(first.start, first.stop, step):
        yield (slice(start, min(start + step, first.stop)), *rest)
