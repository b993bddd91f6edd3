"""Quantized frozen kernels: int8 or 4-bit codes with scales per block (QLoRA, arXiv 2305.14314).

    kernel [d_in, d_out]   int8: codes int8 [d_in, d_out], one scale per output channel
                           nf4:  codes uint8 [d_in / 2, d_out], one scale per block of 64 inputs and
                                 output channel; a byte has the codes of an input in the first half
                                 of its block and of the one 32 inputs later
                           mxfp4: the same with blocks of 32 inputs and scales uint8; feed-forward
                                 kernels only, as gpt-oss's files store experts

In mxfp4 (OCP Microscaling Formats 1.0) a weight is ``MXFP4_LEVELS[code] * 2 ** (scale - 127)``. A
kernel that was read from a file is stored again without loss: every level times a smaller power of
two is a level as long as the largest of the block remains one.

A quantized kernel replaces the array in the ``params`` tree. Operations expand it one layer at a
time, in the forward pass and again in the backward pass, so that the float kernel is never saved.
Adapters and their gradients stay float32. Norms, biases, embeddings and routers are not quantized.
`nalora_jax.weights.tensors` quantizes a model one tensor at a time while it reads it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax.errors import NaloraError
from nalora_jax.ops.shardings import mesh_axes, mesh_sharding
from nalora_jax.ops.storage import Stored

QuantizedFormat = Literal["int8", "nf4", "mxfp4"]
_BLOCKS = {"nf4": 64, "mxfp4": 32}  # inputs that share a scale
MXFP4_BLOCK = _BLOCKS["mxfp4"]
# Patterns of the leaves of ``params`` that are quantized.
_KERNELS = r"layers/.*_proj(_[a-z]+)?/kernel$"
_FFN_KERNELS = r"layers/(.*/)?ffn/.*_proj/kernel$"
# Quantiles of N(0, 1) with an exact zero, scaled to [-1, 1] (QLoRA, appendix E).
# fmt: off
NF4_LEVELS: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
# Sign, two bits of exponent, one bit of mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_LEVELS: tuple[float, ...] = (*_POSITIVE, *(-level for level in _POSITIVE))
_BIAS = 127  # a scale is stored as its exponent plus this number
_LARGEST = 2  # exponent of 4.0, the largest power of two among the levels


class Coded(Stored):
    """A frozen kernel as codes and scales: arrays with the kernel's number of axes."""

    codes: Array
    # Shardings of one layer's arrays for matmuls, in their order as leaves, if a mesh splits the
    # stored ones further (`mark_gathered`).
    places: tuple[NamedSharding, ...] | None

    @abstractmethod
    def splits(self, axis: int, parts: int) -> bool:
        """Returns True if equal parts of all arrays along ``axis``, as stored, are the arrays of
        equal parts of the kernel."""

    def in_place(self) -> Self:
        """Returns the kernel with its arrays sharded as in `places`, in which they are expanded."""
        if self.places is None:
            return self
        leaves, structure = jax.tree.flatten(self)
        placed = [_at(*pair) for pair in zip(leaves, self.places, strict=True)]
        kernel: Self = jax.tree.unflatten(structure, placed)
        return kernel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(Coded):
    """Codes and scales of one kernel, or of a stack of them."""

    codes: Array  # int8 [..., d_in, d_out], or uint8 [..., d_in / 2, d_out]
    scales: Array  # float32 (mxfp4: uint8) [..., blocks, d_out]
    kind: QuantizedFormat = field(metadata={"static": True})
    places: tuple[NamedSharding, ...] | None = field(
        default=None, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float kernel."""
        *lead, rows, d_out = self.codes.shape
        if self.kind == "int8":
            return self.codes.shape
        return (*lead, 2 * rows, d_out)

    def expand(self, dtype: Any = None) -> Array:
        """Returns the kernel in ``dtype``, by default float32; codes are gathered before they are
        expanded."""
        return dequantize(self.in_place(), dtype or jnp.float32)

    def splits(self, axis: int, parts: int) -> bool:
        """See `Coded`."""
        arrays = [self.codes]
        if self.kind != "int8" or axis != 1:  # int8 has one scale for all inputs
            arrays.append(self.scales)
        return all(array.shape[axis] % parts == 0 for array in arrays)


def _at(array: Array, place: NamedSharding) -> Array:
    """Returns codes or scales with their last two axes sharded as in ``place``."""
    sharding = mesh_sharding(place, *[None] * (array.ndim - 2), *place.spec)
    return lax.with_sharding_constraint(array, sharding)


def kernels(kind: QuantizedFormat) -> str:
    """Returns the pattern of the leaves that are quantized in a model of that kind."""
    if kind == "mxfp4":
        return _FFN_KERNELS
    return _KERNELS


def quantize(kernel: Array, kind: QuantizedFormat) -> Quantized:
    """Returns the nearest codes of a float kernel ``[..., d_in, d_out]``.

    The error of int8 is at most half a step of the channel's largest weight / 127.

    Raises:
      NaloraError: d_in is not a multiple of 64, for nf4, or of 32, for mxfp4.
    """
    *lead, d_in, d_out = kernel.shape
    block = _BLOCKS.get(kind, d_in)
    if d_in % block:
        raise NaloraError(
            "compute.quantize",
            expected=f"inputs in multiples of {block} for {kind}",
            found=d_in,
        )
    w = kernel.astype(jnp.float32).reshape(*lead, d_in // block, block, d_out)
    largest = jnp.max(jnp.abs(w), axis=-2)
    if kind == "mxfp4":
        _, exponent = jnp.frexp(largest)  # largest = m 2^exponent with 1/2 <= m < 1
        # 0 is a subnormal number and 255 is NaN.
        scales = jnp.clip(exponent - 1 - _LARGEST + _BIAS, 1, 254).astype(jnp.uint8)
        codes = _mxfp4_codes(w / powers_of_two(scales)[..., None, :])
        return Quantized(_packed(codes), scales, kind)
    # Weights over the largest of their block: [..., blocks, block, d_out].
    unit = w / jnp.where(largest > 0, largest, 1.0)[..., None, :]
    if kind == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8).reshape(kernel.shape)
        return Quantized(codes, largest / 127, kind)
    codes = _nearest(unit, _midpoints(NF4_LEVELS))
    return Quantized(_packed(codes), largest, kind)


def _midpoints(levels: Sequence[float]) -> np.ndarray:
    """Returns the numbers halfway between neighbouring ``levels``, which are ascending."""
    ascending = np.asarray(levels, np.float32)
    return (ascending[1:] + ascending[:-1]) / 2


def _nearest(unit: Array, thresholds: np.ndarray) -> Array:
    """Returns the number of thresholds below each number, uint8: the index of its nearest level.

    Each number is compared with all thresholds, which XLA fuses; a search would store several
    integer copies of the kernel.
    """
    index = jnp.searchsorted(jnp.asarray(thresholds), unit, method="compare_all")
    return index.astype(jnp.uint8)


def _mxfp4_codes(unit: Array) -> Array:
    """Returns the code uint8 of the nearest level of every number; beyond 6 it is 6."""
    # A number halfway between two levels takes the one with an even code. If this is the upper
    # one, the threshold is the next smaller float.
    thresholds = _midpoints(_POSITIVE)
    thresholds[1::2] = np.nextafter(thresholds[1::2], np.float32(0))
    sign = jnp.signbit(unit).astype(jnp.uint8) << 3  # the highest of the four bits
    return _nearest(jnp.abs(unit), thresholds) | sign


def powers_of_two(scales: Array) -> Array:
    """Returns ``2 ** (scale - 127)`` in float32, from its bits: a scale is the exponent of a
    float32. A scale of 0 becomes 0."""
    return lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def _packed(codes: Array) -> Array:
    """Packs two 4-bit codes into a byte: returns ``[..., blocks * block / 2, d_out]`` of ``[...,
    blocks, block, d_out]``."""
    *lead, blocks, block, d_out = codes.shape
    halves = codes.reshape(*lead, blocks, 2, block // 2, d_out)
    # [..., blocks, block / 2, d_out]
    low = halves[..., 0, :, :]
    high = halves[..., 1, :, :]
    pairs = low | (high << 4)
    return pairs.reshape(*lead, blocks * block // 2, d_out)


def dequantize(kernel: Quantized, dtype: Any = jnp.float32) -> Array:
    """Returns the kernel of codes and scales, computed in float32 and rounded to ``dtype``."""
    *lead, d_in, d_out = kernel.shape
    if kernel.kind == "int8":
        return (kernel.codes.astype(jnp.float32) * kernel.scales).astype(dtype)
    levels = NF4_LEVELS
    scales = kernel.scales
    if kernel.kind == "mxfp4":
        levels = MXFP4_LEVELS
        scales = powers_of_two(kernel.scales)
    block = _BLOCKS[kernel.kind]
    pairs = kernel.codes.reshape(*lead, d_in // block, block // 2, d_out)
    codes = unpack_pairs(pairs)
    blocks = (look_up_levels(codes, levels) * scales[..., None, None, :]).astype(dtype)
    # One pass over HBM: without the barrier, the TPU compiler multiplies in the final shape and
    # stores the repeated codes and scales, three times the traffic.
    return lax.optimization_barrier(blocks).reshape(*lead, d_in, d_out)


def unpack_pairs(pairs: Array) -> Array:
    """Returns the low and the high four bits of bytes ``[..., n, d_out]``.

    The result is ``[..., 2, n, d_out]``, the low bits first.
    """
    leading = pairs.ndim - 2
    shifts = jnp.array([0, 4], jnp.uint8).reshape(*[1] * leading, 2, 1, 1)
    return (pairs[..., None, :, :] >> shifts) & 15


def look_up_levels(codes: Array, levels: Sequence[float]) -> Array:
    """Returns float32 ``levels[codes]``.

    The levels are selected bit by bit, the highest bit first, because a TPU gathers slowly from a
    table. Pairs of levels are selected by integers, since a rematerialized scan would keep their
    broadcasts as its constants: on a GPU, 16 arrays of a kernel's size in float32.
    """
    half = len(levels) // 2
    if half == 1:
        low, high = np.asarray(levels, np.float32).view(np.int32).tolist()
        odd = -(codes & 1).astype(jnp.int32)  # all bits, or none
        return lax.bitcast_convert_type((odd & (low ^ high)) ^ low, jnp.float32)
    first = look_up_levels(codes, levels[:half])
    second = look_up_levels(codes, levels[half:])
    return jnp.where((codes & half) > 0, second, first)


def mark_gathered(params: Any, axes: Collection[str]) -> Any:
    """Returns ``params`` with quantized kernels marked to be gathered over mesh ``axes`` as codes.

    Without the mark the compiler expands each device's part and gathers float32: four times the
    bytes of int8 and seven times the bytes of nf4. Leaves may be descriptions of arrays, with
    shardings. Experts are not marked: `nalora_jax.models.moe` gathers the arrays that it maps over
    the mesh.
    """

    def marked(leaf: Any) -> Any:
        """Returns a quantized leaf with the shardings that it has after the gather; other leaves
        are unchanged."""
        # Kernels of experts have four axes, [layers, experts, ...].
        if not isinstance(leaf, Coded) or leaf.codes.ndim > 3:
            return leaf
        places = []
        for array in jax.tree.leaves(leaf):
            place = _without(array.sharding, array.ndim, axes)
            if place is None:
                return leaf
            places.append(place)
        return replace(leaf, places=tuple(places))  # type: ignore[type-var]

    return jax.tree.map(marked, params, is_leaf=lambda leaf: isinstance(leaf, Coded))


def _without(sharding: Any, ndim: int, axes: Collection[str]) -> NamedSharding | None:
    """Returns the sharding of the last two axes without ``axes``; None if the mesh has none."""
    if not isinstance(sharding, NamedSharding):
        return None
    if not set(axes) & set(sharding.mesh.shape):
        return None
    missing = ndim - len(sharding.spec)
    spec = (*sharding.spec, *[None] * missing)
    remaining = []
    for entry in spec[-2:]:
        names = tuple(name for name in mesh_axes(entry) if name not in axes)
        remaining.append(names or None)
    return mesh_sharding(sharding, *remaining)
