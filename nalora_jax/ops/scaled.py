"""Frozen kernels in the number formats of quantized checkpoints: fp8, int8, int4 and NVFP4.

    kernel [d_in, d_out] = (code - zero) * scale     in float32, rounded once to `Scaling.rounds`

    codes   uint8 or int8 [..., d_in, d_out], fp8 as its bits. With 4 bits uint8 [..., d_in / 2,
            d_out]: a byte has the codes of an input in the first half of a run of 16 inputs and
            of the input 8 later
    scales  [..., blocks of inputs, blocks of outputs]; the last block along an axis may be smaller
    zeros   integers of the same shape; None for `ZEROS`
    outer   float32 [..., 1, 1], a scale of the scales; None for 1
    order   int32 [..., d_in, 1], the block of each input; None for blocks of consecutive inputs

The numbers are those of the file, with the axes in this library's order and 4-bit codes in another
order within a run, so memory holds as many bytes as the file. Operations expand a kernel one layer
at a time, as those of `nalora_jax.ops.quantize`. `nalora_jax.weights.quantized` reads the files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax.ops.quantize import (
    MXFP4_LEVELS,
    Coded,
    look_up_levels,
    powers_of_two,
    unpack_pairs,
)

PACKED_INPUTS = 16  # inputs whose 4-bit codes share 8 bytes
ZEROS = {"int4": 8, "uint8": 128}  # of unsigned codes without zeros; 0 for others
_SMALLEST_NORMAL = 2.0**-14  # of float16
_STEP = 2.0**-24  # between the numbers of float16 below it

Element = Literal["e4m3", "e5m2", "int8", "uint8", "int4", "e2m1"]
_FLOATS: dict[str, Any] = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@dataclass(frozen=True)
class Scaling:
    """The number format of a kernel."""

    element: Element  # of the codes; "int4" is unsigned, "e2m1" are the levels of mxfp4
    block: tuple[int, int]  # inputs and outputs that share a scale; 0 for all
    # Dtype of the scales, or the format of bits: "e4m3", or "e8m0" for powers of two.
    scale: str = "float32"
    # Dtype to which the format's reference implementation rounds a product.
    rounds: Literal["float32", "bfloat16", "float16"] = "float32"
    divides: bool = False  # scales are divided by the outer scale, not multiplied

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        if self.element in ("int4", "e2m1"):
            return 2
        return 1

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the number of blocks along the inputs and outputs of a kernel."""
        counts = []
        for size, block in zip(shape, self.block, strict=True):
            counts.append(-(-size // (block or size)))
        return (counts[0], counts[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Coded):
    """One kernel as codes and scales, or a stack of them; see the top of this module."""

    codes: Array
    scales: Array
    zeros: Array | None
    outer: Array | None
    order: Array | None
    scaling: Scaling = field(metadata={"static": True})
    places: tuple[NamedSharding, ...] | None = field(
        default=None, metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float kernel."""
        *lead, rows, d_out = self.codes.shape
        return (*lead, rows * self.scaling.per_byte, d_out)

    def expand(self, dtype: Any = None) -> Array:
        """Returns the kernel in ``dtype``, by default float32; codes are gathered before they are
        expanded."""
        return dequantize_scaled(self.in_place(), dtype or jnp.float32)

    def splits(self, axis: int, parts: int) -> bool:
        """See `Coded`."""
        ndim = self.codes.ndim
        size = self.shape[axis]
        if axis < ndim - 2:
            return size % parts == 0
        if axis == ndim - 2 and self.order is not None:
            return False
        steps = [1]
        if axis == ndim - 2 and self.scaling.per_byte == 2:
            steps.append(PACKED_INPUTS)
        if self.scales.shape[axis] > 1:
            steps.append(self.scaling.block[axis - ndim])
        return all(size % (parts * step) == 0 for step in steps)


def dequantize_scaled(kernel: Scaled, dtype: Any = jnp.float32) -> Array:
    """Returns the kernel of codes and scales, rounded to the format's dtype and to ``dtype``."""
    scaling = kernel.scaling
    *lead, d_in, d_out = kernel.shape
    values = _decoded(kernel.codes, scaling.element)
    scales = decoded_scales(kernel)
    zeros = kernel.zeros
    if zeros is not None:
        zeros = zeros.astype(jnp.float32)
    else:
        values = values - ZEROS.get(scaling.element, 0)
    n_in, n_out = scales.shape[-2:]
    block_in, block_out = (d_in // n_in, d_out // n_out)
    even = kernel.order is None
    for axis, size in ((-2, d_in), (-1, d_out)):
        count = scales.shape[axis]
        even &= count == 1 or count * scaling.block[axis] == size
    if even:
        # Scales are repeated along outputs only: [..., blocks, d_out]. XLA:TPU then fuses scales of
        # channels into the matmul, and stores no repeated scales of both axes.
        if n_out > 1:
            scales = jnp.repeat(scales, block_out, axis=-1)
            if zeros is not None:
                zeros = jnp.repeat(zeros, block_out, axis=-1)
        # [..., d_in, d_out] -> [..., blocks, inputs, d_out]
        values = values.reshape(*lead, n_in, block_in, d_out)
        scales = scales[..., None, :]
        if zeros is not None:
            zeros = zeros[..., None, :]
    else:
        scales = _repeated(scales, kernel)
        if zeros is not None:
            zeros = _repeated(zeros, kernel)
    if zeros is not None:
        values = values - zeros
    products = _rounded(values * scales, scaling.rounds, dtype)
    if scaling.per_byte == 2:
        # One pass over HBM, see `nalora_jax.ops.quantize.dequantize`.
        products = lax.optimization_barrier(products)
    return products.reshape(*lead, d_in, d_out)


def _decoded(codes: Array, element: Element) -> Array:
    """Returns float32 ``[..., d_in, d_out]``, the values of codes."""
    if element in _FLOATS:
        floats = lax.bitcast_convert_type(codes, _FLOATS[element])
        return floats.astype(jnp.float32)
    if element in ("int8", "uint8"):
        return codes.astype(jnp.float32)
    *lead, rows, d_out = codes.shape
    runs = 2 * rows // PACKED_INPUTS
    pairs = codes.reshape(*lead, runs, PACKED_INPUTS // 2, d_out)
    nibbles = unpack_pairs(pairs)  # [..., runs, 2, 8, d_out]
    if element == "int4":
        values = nibbles.astype(jnp.float32)
    else:
        values = look_up_levels(nibbles, MXFP4_LEVELS)
    return values.reshape(*lead, 2 * rows, d_out)


def decoded_scales(kernel: Scaled) -> Array:
    """Returns the scales as float32, with the outer scale."""
    scaling = kernel.scaling
    if scaling.scale == "e8m0":
        scales = powers_of_two(kernel.scales)
    elif scaling.scale in _FLOATS:
        scales = _decoded(kernel.scales, "e4m3")
    else:
        scales = kernel.scales.astype(jnp.float32)
    if kernel.outer is None:
        return scales
    if scaling.divides:
        return scales / kernel.outer
    return scales * kernel.outer


def _repeated(scales: Array, kernel: Scaled) -> Array:
    """Returns scales or zeros of blocks for each weight, ``[..., d_in, d_out]`` with 1 for an axis
    that is one block."""
    *_, d_in, d_out = kernel.shape
    block_in, block_out = kernel.scaling.block
    if kernel.order is not None:
        scales = jnp.take_along_axis(scales, kernel.order, axis=-2)
    elif scales.shape[-2] > 1:
        scales = jnp.repeat(scales, block_in, axis=-2)[..., :d_in, :]
    if scales.shape[-1] > 1 and block_out > 1:
        scales = jnp.repeat(scales, block_out, axis=-1)[..., :d_out]
    return scales


def _rounded(products: Array, rounds: str, dtype: Any) -> Array:
    """Returns float32 products rounded to ``rounds``, then to ``dtype``.

    Without a conversion to ``rounds`` and back, which XLA may leave out.
    """
    if rounds == "bfloat16" and jnp.dtype(dtype) != jnp.bfloat16:
        products = lax.reduce_precision(products, exponent_bits=8, mantissa_bits=7)
    elif rounds == "float16":
        # `reduce_precision` has no subnormal numbers.
        normal = lax.reduce_precision(products, exponent_bits=5, mantissa_bits=10)
        nearest_even = lax.RoundingMethod.TO_NEAREST_EVEN
        subnormal = lax.round(products / _STEP, nearest_even) * _STEP
        small = jnp.abs(products) < _SMALLEST_NORMAL
        products = jnp.where(small, subnormal, normal)
    return products.astype(dtype)
