"""Matmuls on a TPU with kernels of 8 bits and scales of blocks, dequantized within the matmul.

XLA:TPU fuses scales of channels into a matmul. Scales of blocks it repeats in memory, in float32,
and then writes the whole dequantized kernel, up to 10 times the bytes of its codes. This Pallas
kernel reads the codes of one tile, multiplies them by their scales in vector memory, rounds as
`nalora_jax.ops.scaled.dequantize_scaled` does, and multiplies the tile::

    y [rows, d_out] = x [rows, d_in] W            W of codes [d_in, d_out]
    y [rows, d_in]  = x [rows, d_out] W^T         the gradient of x; a frozen W has none

Programs of several devices use the plain function: the compiler does not divide a Pallas kernel.
Pallas is imported inside functions, as in `nalora_jax.ops.attention_tpu`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.scaled import Scaled, decoded_scales
from nalora_jax.ops.storage import Kernel, dot

BY_BLOCKS = "blocks"
_LANES = 128  # width of a TPU register
_ROWS = (1024, 512, 256, 128, 64, 32, 16)  # of x in a tile; the smallest is bf16's
_SIDES = (512, 384, 256, _LANES)  # of a tile of the kernel
_DTYPES: dict[str, Any] = {
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
    "int8": jnp.int8,
}


@dot.implements(BY_BLOCKS)
def multiply_by_blocks(
    x: Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> Array:
    """Computes `dot` with a kernel of 8 bits whose scales differ along the inputs."""
    operand = operand or numerics.operand
    if not isinstance(y, Scaled) or dims[0] != 1 or operand != "bfloat16":
        return NotImplemented
    if numerics.platform.devices != 1 or not supports_blocks(y):
        return NotImplemented
    kernel = y.in_place()
    assert isinstance(kernel, Scaled)
    rows = x.astype(operand)
    return block_matmul(rows, kernel, transposed=dims[1] == 1, result=result)


def supports_blocks(kernel: Scaled) -> bool:
    """Returns True if `block_matmul` supports a kernel, and XLA would not fuse it."""
    scaling = kernel.scaling
    if kernel.ndim != 2 or kernel.zeros is not None or kernel.order is not None:
        return False
    if scaling.element not in _DTYPES or scaling.rounds == "float16":
        return False
    d_in, d_out = kernel.shape
    block = scaling.block[0]
    if block == 0 or block % _LANES or block > _SIDES[0]:
        return False
    return block < d_in and d_in % block == 0 and d_out % _LANES == 0


def block_matmul(
    x: Array, kernel: Scaled, *, transposed: bool, result: Any, interpret: bool = False
) -> Array:
    """Returns the product of bf16 ``x`` and a supported kernel, with sums in float32.

    Args:
      x: ``[rows, d_in]``; if transposed ``[rows, d_out]``.
      kernel: ``[d_in, d_out]``; see `supports_blocks`.
      transposed: multiply by the transpose.
      result: dtype of the product.
      interpret: run without a TPU, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    d_in, d_out = kernel.shape
    block = kernel.scaling.block[0]
    codes = lax.bitcast_convert_type(kernel.codes, _DTYPES[kernel.scaling.element])
    scales = _wide_scales(kernel)  # [blocks, d_out]
    count = x.shape[0]
    tile_rows = next((size for size in reversed(_ROWS) if size >= count), _ROWS[0])
    x = jnp.pad(x, ((0, -count % tile_rows), (0, 0)))
    inputs = next(size for size in _SIDES if d_in % size == 0 and size % block == 0)
    outputs = next(size for size in _SIDES if d_out % size == 0)
    tile = partial(_multiply_tile, block=block, transposed=transposed)
    # The last axis of the grid runs over the sum.
    if transposed:
        grid = (x.shape[0] // tile_rows, d_in // inputs, d_out // outputs)
        of_x = pl.BlockSpec((tile_rows, outputs), lambda i, j, k: (i, k))
        of_codes = pl.BlockSpec((inputs, outputs), lambda i, j, k: (j, k))
        of_scales = pl.BlockSpec((scales.shape[0], outputs), lambda i, j, k: (0, k))
        width = inputs
    else:
        grid = (x.shape[0] // tile_rows, d_out // outputs, d_in // inputs)
        of_x = pl.BlockSpec((tile_rows, inputs), lambda i, j, k: (i, k))
        of_codes = pl.BlockSpec((inputs, outputs), lambda i, j, k: (k, j))
        of_scales = pl.BlockSpec((scales.shape[0], outputs), lambda i, j, k: (0, j))
        width = outputs
    y = pl.pallas_call(
        tile,
        grid=grid,
        in_specs=[of_x, of_codes, of_scales],
        out_specs=pl.BlockSpec((tile_rows, width), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], grid[1] * width), result),
        scratch_shapes=[pltpu.VMEM((tile_rows, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * d_in * d_out,
            bytes_accessed=grid[0] * codes.size + 2 * x.size,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x, codes, scales)
    return y[:count]


def _wide_scales(kernel: Scaled) -> Array:
    """Returns the scales of every output, float32 ``[blocks of inputs, d_out]``."""
    scales = decoded_scales(kernel)
    d_out = kernel.shape[1]
    if scales.shape[1] == 1:
        return jnp.broadcast_to(scales, (scales.shape[0], d_out))
    return jnp.repeat(scales, kernel.scaling.block[1], axis=1)[:, :d_out]


def _multiply_tile(
    x_ref: Any,
    codes_ref: Any,
    scales_ref: Any,
    y_ref: Any,
    sums_ref: Any,
    *,
    block: int,
    transposed: bool,
) -> None:
    """Adds the product of one tile to the sums, and writes them after the last one.

    Refs hold x ``[rows, inputs]`` or transposed ``[rows, outputs]``, codes ``[inputs, outputs]``,
    scales ``[blocks, outputs]``, and y and its sums ``[rows, outputs]`` or ``[rows, inputs]``.
    """
    from jax.experimental import pallas as pl

    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    parts = codes_ref.shape[0] // block
    first = pl.program_id(1) if transposed else step
    for part in range(parts):
        inputs = pl.ds(part * block, block)
        values = codes_ref[inputs, :].astype(jnp.float32)
        scales = scales_ref[pl.ds(first * parts + part, 1), :]
        weights = (values * scales).astype(jnp.bfloat16)
        if transposed:
            # [rows, outputs] x [block, outputs] -> [rows, block]
            product = _product(x_ref[...], weights, 1)
            sums_ref[:, inputs] += product
        else:
            sums_ref[...] += _product(x_ref[:, inputs], weights, 0)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _product(x: Array, weights: Array, axis: int) -> Array:
    """Returns the float32 product over the last axis of x and an axis of the weights."""
    contract = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, weights, contract, preferred_element_type=jnp.float32)
