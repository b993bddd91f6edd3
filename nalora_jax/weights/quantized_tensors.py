"""Quantizes a leaf while its tensors are read, some output channels of one layer at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from nalora_jax.ops.quantize import Kind, Quantized, quantize
from nalora_jax.ops.reductions import mesh_axes
from nalora_jax.weights.slices import Index, Key, aligned, span

_QUANTIZED = 1 << 18  # elements quantized at once
Read = Callable[[Index, Any], np.ndarray]  # of a slice of the float leaf

_quantize = jax.jit(quantize, static_argnums=1)


def quantized_leaf(shape: tuple[int, ...], kind: Kind, sharding: Sharding, read: Read) -> Quantized:
    """Quantizes this process's parts of the leaf, some output channels of one layer at a time."""
    like = jax.eval_shape(partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, np.float32))
    wholes = (like.codes, like.scales)
    places = [_fitted(array.shape, sharding) for array in wholes]
    held = [
        {span(index, array.shape) for index in place.addressable_devices_indices_map(array.shape).values()}
        for array, place in zip(wholes, places, strict=True)
    ]
    blocks = quantized_parts(shape, kind, held[0], held[1], read)

    def placed(array: jax.ShapeDtypeStruct, place: Sharding, of: Mapping[Key, np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(array.shape, place, lambda index: of[span(index, array.shape)])

    codes, scales = (placed(*triple) for triple in zip(wholes, places, blocks, strict=True))
    return Quantized(codes, scales, kind)


def quantized_parts(
    shape: tuple[int, ...],
    kind: Kind,
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
    like = jax.eval_shape(partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, np.float32))
    blocks: tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]] = ({}, {})
    # by leading axes (layers, experts) and columns
    parts_of: dict[tuple[Key, tuple[int, int]], list[_Target]] = defaultdict(list)
    for keys, array, parts in ((codes, like.codes, blocks[0]), (scales, like.scales, blocks[1])):
        for key in keys:
            parts[key] = aligned(tuple(stop - start for start, stop in key), array.dtype)
            rows = shape[-2] // array.shape[-2]
            parts_of[key[:-2], key[-1]].append(_Target(parts[key], key[-2], rows, array is like.codes))
    block = shape[-2] // like.scales.shape[-2]
    for (leads, (first, last)), targets in parts_of.items():
        spans = _joined(sorted(target.blocks(block) for target in targets))
        for lead in np.ndindex(*(stop - start for start, stop in leads)):
            index = tuple(
                slice(start + i, start + i + 1) for (start, _), i in zip(leads, lead, strict=True)
            )
            for begin, end in spans:
                columns = max(1, _QUANTIZED // (end - begin))
                for start in range(first, last, columns):
                    channels = slice(start, min(start + columns, last))
                    floats = read((*index, slice(begin, end), channels), np.float32)
                    quantized = _quantize(floats, kind)
                    for target in targets:
                        target.take(
                            quantized, lead, begin, slice(channels.start - first, channels.stop - first)
                        )
    return blocks


@dataclasses.dataclass(frozen=True)
class _Target:
    """A part of a quantized leaf's codes or scales that is being filled."""

    buffer: np.ndarray
    rows: tuple[int, int]  # of the codes or scales
    inputs: int  # input channels per row
    codes: bool

    def blocks(self, block: int) -> tuple[int, int]:
        """Returns start and stop of the input channels in the blocks that this part overlaps."""
        start, stop = self.rows[0] * self.inputs, self.rows[1] * self.inputs
        return start // block * block, -(-stop // block) * block

    def take(self, quantized: Quantized, lead: tuple[int, ...], begin: int, channels: slice) -> None:
        """Copies this part's share of ``made``, whose first input channel is ``begin``."""
        block: np.ndarray = np.asarray(quantized.codes if self.codes else quantized.scales)
        block, first = block.reshape(block.shape[-2:]), begin // self.inputs
        start, stop = max(self.rows[0], first), min(self.rows[1], first + len(block))
        if start < stop:
            mine = slice(start - self.rows[0], stop - self.rows[0])
            self.buffer[lead][mine, channels] = block[start - first : stop - first]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merges sorted spans that touch or overlap."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _fitted(shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    """Returns the float kernel's sharding, without splits that do not divide the new shape."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    parts = [mesh_axes(entry) for entry in sharding.spec]
    ways = [math.prod(sharding.mesh.shape[name] for name in names) for names in parts]
    axes = [names if size % n == 0 else None for names, n, size in zip(parts, ways, shape, strict=False)]
    return NamedSharding(sharding.mesh, P(*axes))
