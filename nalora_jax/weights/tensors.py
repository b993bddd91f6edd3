"""Loads a file's tensors into the parameter tree, block by block, directly to their devices.

A file format is a `TensorSource`; a `KeyMap` maps its tensor names to leaves and states how each
is transposed. Each device's part of a leaf is one buffer that all cores fill from slices of the
file: allocating memory takes longer than copying into it, and is faster on several cores at once.
On a CPU JAX uses such a buffer without a copy, so loading needs the size of the parameters plus
one block per core.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, make_single_device_sharding

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import sharding
from nalora_jax.models.targets import leaf_dtype
from nalora_jax.ops.quantize import Quantized, QuantizedFormat, kernels, quantize
from nalora_jax.ops.shardings import mesh_axes, mesh_sharding, ways
from nalora_jax.weights.keymaps import KeyMap, SourceTensor
from nalora_jax.weights.shards import FileTensor

PARAM_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# Elements per read: 0.25 MB in float32, which stays in a core's cache during the transposition.
READ_BLOCK = 1 << 16
WORKERS = min(8, os.cpu_count() or 1)  # more do not read memory faster


class TensorSource(ABC):
    """The named tensors of a file or folder, in PyTorch's orientation (``[out, in]``), as headers
    describe them.

    Attributes:
      where: the file or folder, for messages.
      readable: number formats that `TensorSource.read` supports.
      remedy: for tensors in other formats.
    """

    where: str
    readable: tuple[str, ...]
    remedy: str

    def __init__(self, where: str, tensors: Mapping[str, FileTensor]) -> None:
        self.where = where
        self._tensors = tensors
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name in the file, slowest axis first."""
        return self._shapes

    def check_readable(self, name: str) -> None:
        """Raises an error if the tensor's number format is not supported."""
        tensor = self._tensors[name]
        if tensor.format not in self.readable:
            where = f"{tensor.file}: {name}"
            expected = f"one of {', '.join(self.readable)}"
            raise NaloraError(
                where,
                expected=expected,
                found=tensor.format,
                remedy=self.remedy,
            )

    def stored(self, name: str) -> FileTensor:
        """Returns the location and number format of a tensor's bytes."""
        return self._tensors[name]

    @abstractmethod
    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats, reading little more of the file."""


def load_params(
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    keymap: KeyMap,
    *,
    dtype: str,
    shardings: Mapping[str, Sharding] | None = None,
    quantized: QuantizedFormat | None = None,
    loaders: Mapping[str, Callable[[Sharding], Any]] | None = None,
) -> dict[str, Any]:
    """Loads the parameter tree of a model.

    Args:
      shapes: of the leaves, by slash-joined path.
      source: the file(s); its tensors' shapes are checked before anything is read.
      keymap: of the same model and file format.
      dtype: of every parameter, "bfloat16" or "float32".
      shardings: sharding of each leaf; by default the first device.
      quantized: format of the projections' kernels, instead of ``dtype``. Each tensor is quantized
        from the file's values as it is read, so that at most one tensor is in memory as floats.
      loaders: functions that return leaves in another storage form, by path
        (`nalora_jax.weights.quantized`); ``quantized`` takes precedence.

    Returns:
      The tree as nested dicts of global arrays; quantized kernels are `Quantized`.

    Raises:
      NaloraError: an unknown dtype; a missing, unknown, misshapen or unreadable tensor; or a
        separate output head although the config ties it to the embedding.
    """
    names = check_tensors(source, keymap, dtype)
    fills: dict[str, list[_Fill]] = defaultdict(list)
    for tensor in keymap.tensors:
        for number, slot in enumerate(tensor.slots):
            fills[slot.path].append(
                _Fill(names[tensor.name], tensor, number, slot.index)
            )
    where: Mapping[str, Sharding] = shardings or dict.fromkeys(
        shapes, make_single_device_sharding(jax.local_devices()[0])
    )
    leaves: dict[str, Any] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, shape in shapes.items():
            read = partial(_read, fills[path], source, pool)
            if quantized and re.search(kernels(quantized), path):
                read_slice = partial(_read_slice, read)
                leaves[path] = quantized_leaf(shape, quantized, where[path], read_slice)
            elif loaders and path in loaders:
                leaves[path] = loaders[path](where[path])
            else:
                leaves[path] = _leaf(
                    shape, PARAM_DTYPES[leaf_dtype(path, dtype)], where[path], read
                )
    return trees.unflatten(leaves)


def param_shardings(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh | None, prefix: str = ""
) -> dict[str, Sharding] | None:
    """Returns the sharding of each parameter on ``mesh`` by path; None without a mesh.

    Args:
      shapes: of the leaves, by path.
      mesh: the devices.
      prefix: path of these leaves in the tree that they will be part of.
    """
    if mesh is None:
        return None
    likes = {
        prefix + path: jax.ShapeDtypeStruct(shape, "float32")
        for path, shape in shapes.items()
    }
    placed = sharding.shardings(likes, mesh, sharding.PARAM_RULES)
    return {path.removeprefix(prefix): sharding for path, sharding in placed.items()}


def require_dtype(dtype: str) -> None:
    """Raises an error unless parameters can have this dtype."""
    if dtype not in PARAM_DTYPES:
        raise NaloraError(
            "dtype", expected=" or ".join(PARAM_DTYPES), found=repr(dtype)
        )


def check_tensors(
    source: TensorSource, keymap: KeyMap, dtype: str = "float32"
) -> dict[str, str]:
    """Runs every check that needs no weights, and compares a tied head with the embedding.

    Returns:
      The file's name of every tensor, by canonical name.
    """
    require_dtype(dtype)
    names = keymap.check(source.shapes(), source.where)
    for name in names.values():
        source.check_readable(name)
    shapes = source.shapes()
    aliases = dict(keymap.aliases)
    for name in shapes:
        if (other := aliases.get(keymap.canonical(name))) is None:
            continue
        twin = names[other]  # of a tied head that is stored as a separate tensor
        same = shapes[name] == shapes[twin] and all(
            np.array_equal(source.read(name, block), source.read(twin, block))
            for block in _blocks(whole(shapes[name]))
        )
        if not same:
            raise NaloraError(
                f"{source.where}: {name}",
                expected=f"the same numbers as {twin}, since the config ties the output head to "
                "the embedding",
                found="a different tensor",
                remedy='set "tie_word_embeddings": false in config.json if the model has its own '
                "head",
            )
    return names


# ---------------------------------------------------------------- one leaf


@dataclasses.dataclass(frozen=True)
class _Fill:
    """The position of a tensor, or of one part of a fused tensor, in a leaf."""

    name: str  # in the file
    tensor: SourceTensor
    number: int  # of the part
    lead: tuple[int, ...]  # the leaf's leading indices: layer, expert

    def find_view(
        self, buffer: np.ndarray, index: Index
    ) -> tuple[np.ndarray, Index] | None:
        """Returns the view of ``buffer``, the leaf's slice ``index``, that this part fills; None if
        it fills none."""
        trailing = index[len(self.lead) :]
        at = []
        for i, place in zip(self.lead, index[: len(self.lead)], strict=True):
            if not place.start <= i < place.stop:
                return None
            at.append(i - place.start)
        return buffer[(*at, ...)], trailing  # a view, of a scalar too

    def write(
        self,
        target: np.ndarray,
        index: Index,
        source: TensorSource,
        share: tuple[int, int],
    ) -> None:
        """Writes the slice ``index`` of this part, in our layout, to ``target`` of the same shape.

        Args:
          share: ``(k, n)`` writes the k-th of n pieces.
        """
        (k, n) = share
        transform = self.tensor.transform
        if transform.mixes_rows:
            # A slice may need any row of the part, so the first worker reads and writes all of it.
            if k:
                return
            rows = self.tensor.rows[self.number]
            part = whole((rows, *self.tensor.shape[1:]))
            complete = source.read(self.name, self._shifted(part))
            target[...] = transform.into(complete)[index].astype(target.dtype)
            return
        theirs = transform.reordered(index)
        blocks = list(_blocks(theirs, each=transform.swaps))
        first = len(blocks) * k // n
        last = len(blocks) * (k + 1) // n
        for block in blocks[first:last]:
            stored = source.read(self.name, self._shifted(block))
            read = stored.astype(target.dtype, copy=False)
            relative = tuple(
                slice(b.start - t.start, b.stop - t.start)
                for b, t in zip(block, theirs, strict=True)
            )
            target[transform.reordered(relative)] = transform.into(read)

    def _shifted(self, index: Index) -> Index:
        """Returns the slice ``index`` of this part as a slice of the file's complete tensor."""
        if self.tensor.transform.alternates:
            # column c of this part is column c * step + number of the tensor
            step = len(self.tensor.slots)
            *others, columns = index
            start = columns.start * step + self.number
            return (*others, slice(start, columns.stop * step, step))
        axis = self.tensor.axis
        first = sum(self.tensor.rows[: self.number])
        shifted = slice(index[axis].start + first, index[axis].stop + first)
        return (*index[:axis], shifted, *index[axis + 1 :])


def _read(
    fills: Sequence[_Fill],
    source: TensorSource,
    pool: Executor,
    indices: Sequence[Index],
    dtype: Any,
) -> list[np.ndarray]:
    """Returns the slices ``indices`` of a leaf, one array each, filled by the workers of ``pool``.

    Ranges of a tensor that several slices need are read close together.
    """
    buffers = [allocate_aligned(_lengths(index), dtype) for index in indices]
    jobs = []
    for fill in fills:
        for index, buffer in zip(indices, buffers, strict=True):
            view = fill.find_view(buffer, index)
            if view is not None:
                jobs.append((fill, *view))
    # several workers share a tensor if there are few
    shares = -(-WORKERS // max(1, len(jobs)))

    def run(job: tuple[_Fill, np.ndarray, Index], k: int) -> None:
        fill, target, index = job
        # no warnings about infinities and NaNs in the file
        with np.errstate(all="ignore"):
            fill.write(target, index, source, (k, shares))

    tasks = itertools.product(jobs, range(shares))
    list(pool.map(run, *zip(*tasks, strict=True)))  # list() raises the workers' errors
    return buffers


def _read_slice(read: Callable[..., Any], index: Index, dtype: Any) -> np.ndarray:
    """Returns one slice by a function that reads several."""
    (array,) = read([index], dtype)
    return array


def _leaf(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding, read: Callable[..., Any]
) -> jax.Array:
    """Returns the leaf as a global array; each distinct slice is read once per process.

    ``read(indices, dtype)`` returns a list of slices.
    """
    keys = list(_local_spans(shape, sharding))
    arrays = read(list(map(_index_of, keys)), dtype)
    buffers = dict(zip(keys, arrays, strict=True))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: buffers[span(index, shape)]
    )


def filled_array(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding,
    fill: Callable[[np.ndarray, Index], None],
) -> jax.Array:
    """Returns an array of which ``fill(buffer, index)`` writes each distinct slice in this process.

    Its sharding is that of its kernel. A split that does not divide ``shape`` is moved to the last
    axis, or left out if it does not divide that one, too.
    """
    placed = _fit_sharding(shape, sharding, moves=True)
    buffers = {}
    for key in _local_spans(shape, placed):
        index = _index_of(key)
        buffers[key] = allocate_aligned(_lengths(index), dtype)
        fill(buffers[key], index)
    return jax.make_array_from_callback(
        shape, placed, lambda index: buffers[span(index, shape)]
    )


def _local_spans(shape: tuple[int, ...], sharding: Sharding) -> set[Key]:
    """Returns the distinct slices of an array that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return {span(index, shape) for index in indices}


def whole(shape: tuple[int, ...]) -> Index:
    """Returns the index of all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def _blocks(index: Index, *, each: bool = False) -> Iterator[Index]:
    """Yields ``index`` cut along its first axis into pieces of about `READ_BLOCK` elements.

    ``each`` cuts each of several matrices.
    """
    first, *inner = index
    if each and len(inner) > 1:
        for i in range(first.start, first.stop):
            for block in _blocks(tuple(inner)):
                yield (slice(i, i + 1), *block)
        return
    row = math.prod(_lengths(inner))
    step = max(1, READ_BLOCK // max(1, row))
    for start in range(first.start, first.stop, step):
        yield (slice(start, min(start + step, first.stop)), *inner)


# bytes; XLA's requirement for a host buffer that it uses without a copy
_ALIGNMENT = 64
# start and stop are set; a step only where columns of several leaves alternate
Index = tuple[slice, ...]
Key = tuple[tuple[int, int], ...]  # the same, hashable


def _index_of(key: Key) -> Index:
    return tuple(slice(start, stop) for start, stop in key)


def _lengths(index: Sequence[slice]) -> tuple[int, ...]:
    """Returns the shape of a slice."""
    return tuple(place.stop - place.start for place in index)


def span(index: Index | None, shape: tuple[int, ...]) -> Key:
    """Returns start and stop along every axis."""
    places = zip(index or (), shape, strict=True)
    return tuple(place.indices(size)[:2] for place, size in places)


def allocate_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an uninitialized array that JAX can use on a CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


# ---------------------------------------------------------------- quantized leaves


_QUANTIZED = 1 << 18  # elements quantized at once
Read = Callable[[Index, Any], np.ndarray]  # of a slice of the float leaf

_quantize = jax.jit(quantize, static_argnums=1)


def quantized_leaf(
    shape: tuple[int, ...], kind: QuantizedFormat, sharding: Sharding, read: Read
) -> Quantized:
    """Quantizes this process's parts of the leaf, some output channels of one layer at a time."""
    like = jax.eval_shape(
        partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, np.float32)
    )
    shapes = (like.codes.shape, like.scales.shape)
    shardings = [_fit_sharding(shape, sharding) for shape in shapes]
    codes, scales = map(_local_spans, shapes, shardings)
    parts = quantized_parts(shape, kind, codes, scales, read)

    def place(
        stored: tuple[int, ...], placed: Sharding, of: Mapping[Key, np.ndarray]
    ) -> jax.Array:
        return jax.make_array_from_callback(
            stored, placed, lambda index: of[span(index, stored)]
        )

    stored_codes, stored_scales = map(place, shapes, shardings, parts)
    return Quantized(stored_codes, stored_scales, kind)


def quantized_parts(
    shape: tuple[int, ...],
    kind: QuantizedFormat,
    codes: Iterable[Key],
    scales: Iterable[Key],
    read: Read,
) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """Computes parts of a quantized leaf, reading only the blocks of weights that they need.

    Args:
      shape: of the float leaf.
      kind: of the codes.
      codes: parts of its codes, as starts and stops.
      scales: parts of its scales, in the same form.
      read: returns a slice of the float leaf.

    Returns:
      The codes and the scales by part.
    """
    like = jax.eval_shape(
        partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, np.float32)
    )
    # codes [..., d_in, d_out] (d_in / 2 with 4 bits: two codes per byte),
    # scales [..., d_in / block, d_out]
    wholes = (like.codes, like.scales)
    # input channels per row of codes, and of scales
    inputs = [shape[-2] // array.shape[-2] for array in wholes]
    # Of codes (0) and scales (1), by leading axes (layers, experts) and columns.
    groups: dict[Key, list[tuple[int, Key]]] = defaultdict(list)
    for number, keys in enumerate((codes, scales)):
        for key in keys:
            *outer, _, columns = key
            groups[*outer, columns].append((number, key))
    parts: tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]] = ({}, {})
    # input channels that share a scale
    block = inputs[1]
    for (*leads, (first, last)), members in groups.items():
        # 1 for blocks that a member needs; signed, since np.diff below gives -1 at the ends of runs
        needed = np.zeros(shape[-2] // block, np.int8)
        for number, key in members:
            *_, (start, stop), _ = key
            first_block = start * inputs[number] // block
            needed[first_block : -(-stop * inputs[number] // block)] = 1
        # Start and stop of each run of blocks.
        changes = np.flatnonzero(np.diff(needed, prepend=0, append=0))
        spans = changes.reshape(-1, 2) * block
        counts = tuple(stop - start for start, stop in leads)
        # With all rows, of which only the needed ones are touched and so take memory.
        filled = [
            allocate_aligned((*counts, array.shape[-2], last - first), array.dtype)
            for array in wholes
        ]
        for lead in np.ndindex(*counts):
            index = tuple(
                slice(start + i, start + i + 1)
                for (start, _), i in zip(leads, lead, strict=True)
            )
            for begin, end in spans.tolist():
                width = max(1, _QUANTIZED // (end - begin))
                for start in range(first, last, width):
                    stop = min(start + width, last)
                    block_index = (*index, slice(begin, end), slice(start, stop))
                    quantized = _quantize(read(block_index, np.float32), kind)
                    stored = (quantized.codes, quantized.scales)
                    for array, per_row, part in zip(
                        filled, inputs, stored, strict=True
                    ):
                        rows = np.asarray(part).reshape(part.shape[-2:])
                        row = begin // per_row
                        places = array[lead][row : row + len(rows)]
                        places[:, start - first : stop - first] = rows
        for number, key in members:
            *_, (start, stop), _ = key
            parts[number][key] = filled[number][..., start:stop, :]
    return parts


def _fit_sharding(
    shape: tuple[int, ...], sharding: Sharding, *, moves: bool = False
) -> Sharding:
    """Returns the sharding of a kernel's codes or scales, which have the shape ``shape``.

    It is the kernel's ``sharding``, without the splits that do not divide ``shape``; with ``moves``
    these divide the last axis, if they can.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes: list[tuple[str, ...] | None] = []
    left: tuple[str, ...] = ()
    # A spec may have fewer entries than axes.
    for entry, size in zip(sharding.spec, shape, strict=False):
        names = mesh_axes(entry)
        if size % ways(sharding.mesh, names):
            axes.append(None)
            left += names
        else:
            axes.append(names)
    if moves and left and len(axes) == len(shape):
        names = (*left, *(axes[-1] or ()))
        if shape[-1] % ways(sharding.mesh, names) == 0:
            axes[-1] = names
    return mesh_sharding(sharding, *axes)
