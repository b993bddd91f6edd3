"""Storage forms of frozen weights, matmuls with them, and activations that are saved for the backward pass.

A frozen array is stored as floats or in another form that expands to floats: quantized codes with
scales (`nalora_jax.ops.quantize`), or the bits of bf16 on a CPU. The caller who compiles a program
passes its variables to `prepare` once, outside of the program. Inside, code that reads a frozen
array calls `expand`, `take_rows`, `dot`, `matmul` or an operation, which accept every form. Matmuls are
accumulated in float32.

A rematerialized layer saves the arrays with these names: `SAVED` for those that take a matmul to
recompute, `SAVED_WIDE` for the ones among them that are as wide as the feed-forward block, and
`LAYER_INPUT` for its input, which every policy saves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from nalora_jax.ops.dispatch import Numerics, operation

# The collection of kernels that stay in the stack of all layers while layers are scanned. A
# kernel's leaf in ``params`` then holds the number of the layer, and `LayerStack.layer` of
# both is the kernel.
STACKS = "stacks"
SAVED, SAVED_WIDE, LAYER_INPUT = "saved", "saved_wide", "layer_input"
SUMS = "sums"  # a block's statistics, which every policy saves


class Stored(ABC):
    """A frozen array in another form than floats; a pytree that can be scanned, sharded and donated."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the float array."""

    @property
    def ndim(self) -> int:
        """Rank of the float array."""
        return len(self.shape)

    @abstractmethod
    def expand(self, dtype: Any = None) -> jax.Array:
        """Returns the float array, rounded to ``dtype`` if it is given."""


class LayerStack(Stored):
    """Arrays of all layers ``[layers, ...]``, of which a program reads one without a copy."""

    @abstractmethod
    def layer(self, index: jax.Array) -> Stored:
        """Returns the array of layer ``index``."""


Kernel = jax.Array | Stored  # a frozen kernel


def expand(array: Kernel, dtype: Any = None) -> jax.Array:
    """Returns a frozen array as floats; forms other than floats are rounded to ``dtype`` if it is given."""
    return array.expand(dtype) if isinstance(array, Stored) else array


@operation
def take_rows(table: Kernel, rows: jax.Array, numerics: Numerics, axis: int = 0) -> jax.Array:
    """Returns ``jnp.take`` of a frozen table, as floats."""
    return jnp.take(expand(table), rows, axis=axis)


@operation
def prepare(variables: Mapping[str, Any], numerics: Numerics, *, tables: bool = True) -> dict[str, Any]:
    """Returns a model's variables in the form that compiled programs read fastest; memory is shared.

    Call it once, outside of the program. Programs accept unprepared variables, too.

    Args:
      variables: collections of arrays, ``params`` among them.
      numerics: the model's.
      tables: also convert the embedding and the head; False if logits are computed in a loop.
    """
    return dict(variables)


@operation
def store(x: jax.Array, numerics: Numerics) -> Kernel:
    """Returns an array that a program carries from step to step in the platform's best form."""
    return x


@operation
def best_remat(d_model: int, numerics: Numerics, *, gated: bool = True) -> str:
    """Returns the cheapest rematerialization policy (`nalora_jax.models.remat.REMAT`).

    Args:
      d_model: width of the residual stream.
      numerics: dtypes and platform.
      gated: True if feed-forward blocks have two wide projections, False if they have one.
    """
    return "full"


def in_stored_layout(x: Any, numerics: Numerics) -> Any:
    """Returns an array of one layer in the layout of the stack of all layers, if the compiler would change it.

    This is row-major order on a TPU. Otherwise XLA chooses the layout that gathers, transposed matmuls or
    the loss prefer, and copies the stack of all layers' kernels, or of their saved inputs. Qwen3-30B-A3B on
    2 x v6e:4x4 (fsdp 8, one row a chip), compiled: 21.1 instead of 33.4 GB a chip.
    """
    if numerics.facts_of != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


# ---------------------------------------------------------------- rounding


@operation
def rounded(x: jax.Array, dtype: Any, numerics: Numerics) -> jax.Array:
    """Returns ``x.astype(dtype)``."""
    return x.astype(dtype)


@operation
def save_residual(x: jax.Array, dtype: str, numerics: Numerics, name: str = SAVED) -> jax.Array | Stored:
    """Returns ``x`` rounded to ``dtype`` and named for rematerialized layers.

    `read_residual` is the inverse; an implementation may store the bits in another form.
    """
    return checkpoint_name(rounded(x, dtype, numerics), name)


def read_residual(x: jax.Array | Stored, dtype: Any) -> jax.Array:
    """Returns the argument of `save_residual` as ``dtype``."""
    return expand(x).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_and_save(x: jax.Array, numerics: Numerics) -> jax.Array:
    """Returns ``x`` rounded to ``numerics.residual`` and saved in that dtype; its gradient is unchanged."""
    return _rounded_and_saved(x, numerics)


def _rounded_and_saved(x: jax.Array, numerics: Numerics) -> jax.Array:
    return read_residual(save_residual(x, numerics.residual, numerics), x.dtype)


# The rule itself calls no custom function: a rematerialization policy sees no names inside of one.
round_and_save.defvjp(
    lambda x, numerics: (_rounded_and_saved(x, numerics), None), lambda numerics, _, g: (g,)
)


# ---------------------------------------------------------------- matmuls


@operation
def dot(
    x: jax.Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> jax.Array:
    """Multiplies two matrices over one dimension of each, with sums in float32.

    Args:
      x: matrix.
      y: matrix, in any storage form.
      numerics: of the forward pass.
      dims: contracted dimension of x and of y.
      operand: dtype that both are rounded to; "" is ``numerics.operand``.
      result: dtype of the result.
    """
    operand = operand or numerics.operand
    operands = rounded(x, operand, numerics), rounded(expand(y, operand), operand, numerics)
    contract = (((dims[0],), (dims[1],)), ((), ()))
    product = lax.dot_general(*operands, contract, preferred_element_type=jnp.float32)
    return rounded(product, result, numerics)


def matmul(x: jax.Array, kernel: Kernel, numerics: Numerics) -> jax.Array:
    """Computes ``x @ kernel`` for a frozen kernel.

    Args:
      x: ``[..., d_in]``.
      kernel: ``[d_in, d_out]``, as it is stored. It receives **no gradient**: zeros.
      numerics: dtypes of operands and result.

    Returns:
      ``[..., d_out]`` in ``numerics.result``.
    """
    # Two-dimensional operands: XLA:CPU needs 60% more time for the same matmul in three dimensions.
    y = _matmul(x.reshape(-1, x.shape[-1]), kernel, numerics)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: Any, numerics: Numerics) -> jax.Array:
    return dot(x, kernel, numerics, result=numerics.result)


def _matmul_fwd(x: jax.Array, kernel: Any, numerics: Numerics) -> tuple[jax.Array, tuple[Any, ...]]:
    # x is not saved, because a frozen kernel has no gradient. The kernel is saved as it is stored.
    return _matmul(x, kernel, numerics), (kernel, jnp.zeros((0,), x.dtype))


def _matmul_bwd(numerics: Numerics, residuals: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, None]:
    # Autodiff would mix a float32 cotangent with a bf16 kernel; here both are rounded to
    # the operands' dtype.
    kernel, like_x = residuals
    return dot(g, kernel, numerics, dims=(1, 1), result=like_x.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
