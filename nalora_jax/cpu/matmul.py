"""Matrix products on a CPU: native ones (`nalora_jax.cpu.native`) where this CPU has them, else XLA's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.cpu import native
from nalora_jax.cpu.implementation import CPU, usable
from nalora_jax.cpu.storage import Bits
from nalora_jax.ops import matmul
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel, expand, rounded

# Products of fewer rows, those of text generation, are XLA's where it is faster at them.
_FEWEST_ROWS = 32


def is_native(rows: int, operand: str, numerics: Numerics) -> bool:
    """Whether products of so many rows are native."""
    if operand != "bfloat16" or not usable(numerics):
        return False
    return rows >= _FEWEST_ROWS or native.multiplies_few_rows()


def native_sums(numerics: Numerics, *sums: native.Sum) -> list[jax.Array]:
    """`nalora_jax.cpu.native.products` of operands that are yet to be rounded, stored in any form."""

    def operand(y: Any) -> Any:
        if isinstance(y, native.Slice):
            return y
        return y.bits if isinstance(y, Bits) else rounded(expand(y), "bfloat16", numerics)

    terms = ([native.Term(operand(x), operand(y), transposed) for x, y, transposed in s.terms] for s in sums)
    return native.products(*(native.Sum(t, s.dtype) for t, s in zip(terms, sums, strict=True)))


@CPU.implements(matmul.dot)
def dot(
    x: jax.Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> jax.Array:
    """Natively, or by XLA's faster product where there is a single row."""
    operand = operand or numerics.operand
    if dims[0] != 1:
        return NotImplemented
    if is_native(x.shape[0], operand, numerics):
        return native_sums(numerics, native.Sum([native.Term(x, y, dims[1] == 1)], result))[0]
    if x.shape[0] == 1 and operand == "bfloat16":
        # XLA:CPU multiplies a single row in float32, after widening the whole bf16 matrix; two rows it does not.
        return matmul.dot.plain(jnp.concatenate([x, x]), y, numerics, dims, operand, result)[:1]
    return NotImplemented
