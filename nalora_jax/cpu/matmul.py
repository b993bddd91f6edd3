"""Matmuls on a CPU: native (`nalora_jax.cpu.native`) if this CPU supports them, else XLA's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.cpu import native
from nalora_jax.cpu.implementation import usable
from nalora_jax.cpu.storage import Bits
from nalora_jax.ops import matmul
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel, expand, rounded

# With fewer rows, as in text generation, XLA's matmuls are used if they are faster.
_FEWEST_ROWS = 32


def is_native(rows: int, operand: str, numerics: Numerics) -> bool:
    """Returns True if matmuls with this number of rows are native."""
    if operand != "bfloat16" or not usable(numerics):
        return False
    return rows >= _FEWEST_ROWS or native.multiplies_few_rows()


def native_sums(numerics: Numerics, *sums: native.Sum) -> list[jax.Array]:
    """Computes `nalora_jax.cpu.native.products` of unrounded operands in any storage form."""

    def operand(y: Any) -> Any:
        if isinstance(y, native.Slice):
            return y
        if isinstance(y, Bits):
            return y.bits
        return rounded(expand(y), "bfloat16", numerics)

    terms = (
        [native.Term(operand(x), operand(y), transposed) for x, y, transposed in s.terms] for s in sums
    )
    return native.products(*(native.Sum(t, s.dtype) for t, s in zip(terms, sums, strict=True)))


@matmul.dot.implements("cpu")
def dot(
    x: jax.Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> jax.Array:
    """Computes the matmul natively, or by XLA's faster matmul if there is a single row."""
    operand = operand or numerics.operand
    if dims[0] != 1:
        return NotImplemented
    if is_native(x.shape[0], operand, numerics):
        return native_sums(numerics, native.Sum([native.Term(x, y, dims[1] == 1)], result))[0]
    if x.shape[0] == 1 and operand == "bfloat16":
        # XLA:CPU widens the whole bf16 matrix to float32 for a single row, but not for two.
        return matmul.dot.plain(jnp.concatenate([x, x]), y, numerics, dims, operand, result)[:1]
    return NotImplemented
