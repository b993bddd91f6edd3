"""Storage forms of frozen weights, matmuls with them, and activations that are saved for the
backward pass.

A frozen array is stored as floats or in another form that expands to floats: quantized codes with
scales (`nalora_jax.ops.quantize`), or the bits of bf16 on a CPU. The caller who compiles a program
passes its variables to `prepare` once, outside of the program. Inside, code that reads a frozen
array calls `expand`, `take_rows`, `dot`, `matmul` or an operation, which accept every form. Matmuls
are accumulated in float32.

In every iteration of a scan XLA:CPU widens the whole bf16 stack to float32, and it widens a whole
bf16 table before it reads a row. It does not widen integers. Outside of a compiled program the bits
are a view that shares the array's memory. On a CPU bf16 is rounded with integers, because XLA:CPU
does not vectorize loops that contain a conversion: ``silu(z) * u`` takes twice as long with one.

A rematerialized layer saves the arrays with these names: `SAVED` for those that take a matmul to
recompute, `SAVED_WIDE` for the ones among them that are as wide as the feed-forward block, and
`LAYER_INPUT` for its input, which every policy saves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from nalora_jax.common.trees import map_named, unflatten
from nalora_jax.ops.dispatch import Numerics, native_kind, operation
from nalora_jax.ops.shardings import RowSharding

# The collection of kernels that stay in the stack of all layers while layers are scanned. A
# kernel's leaf in ``params`` then holds the number of the layer, `Bits.at`.
STACKS = "stacks"
SAVED = "saved"
SAVED_WIDE = "saved_wide"
LAYER_INPUT = "layer_input"
SUMS = "sums"  # a block's statistics, which every policy saves
_TABLES = ("embed/embedding", "lm_head/kernel")


class Stored(ABC):
    """A frozen array in another form than floats; a pytree that can be scanned, sharded and
    donated."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the float array."""

    @property
    def ndim(self) -> int:
        """Rank of the float array."""
        return len(self.shape)

    @abstractmethod
    def expand(self, dtype: Any = None) -> Array:
        """Returns the float array, rounded to ``dtype`` if it is given."""


Kernel = Array | Stored  # a frozen kernel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits(Stored):
    """A bf16 array as its bits, or one of a stack, read in place: slicing would copy it every
    time."""

    bits: Array  # uint16; with ``at`` those of all arrays, [n, ...]
    at: Array | None = None  # int [], index in the stack

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.bits.shape if self.at is None else self.bits.shape[1:])

    def expand(self, dtype: Any = None) -> Array:
        """Returns the array in ``dtype``, by default bf16; of a stack a copy."""
        bits = self.bits
        if self.at is not None:
            bits = lax.dynamic_index_in_dim(bits, self.at, keepdims=False)
        return bf16_from_bits(bits).astype(dtype or jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trained(Stored):
    """An array that is trained itself: float32, and rounded where it is an operand."""

    value: Array
    # of the array and of its gradient on a mesh
    sharding: RowSharding = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    def expand(self, dtype: Any = None) -> Array:
        """Returns the array, with a gradient."""
        return self.value.astype(dtype or self.value.dtype)


def stop_frozen_gradient(array: Kernel) -> Kernel:
    """Returns an array as a constant of the backward pass, unless it is trained."""
    if isinstance(array, Trained):
        return array
    return lax.stop_gradient(array)


def bf16_bits(x: Array) -> Array:
    """Returns the bits of bf16 ``x`` as uint16; other dtypes are unchanged."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def bf16_from_bits(x: Array) -> Array:
    """Computes the inverse of `bf16_bits`."""
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    return x


def bits_of(table: Kernel) -> Array:
    """Returns a frozen array as bits if it is bf16, otherwise as floats."""
    if isinstance(table, Bits):
        return table.bits
    return bf16_bits(expand(table))


def expand(array: Kernel, dtype: Any = None) -> Array:
    """Returns a frozen array as floats; forms other than floats are rounded to ``dtype`` if it is
    given."""
    if isinstance(array, Stored):
        return array.expand(dtype)
    return array


def take_rows(table: Kernel, rows: Array, numerics: Numerics, axis: int = 0) -> Array:
    """Returns the rows of a frozen table that have the indices ``rows``, along ``axis``, as
    floats."""
    if numerics.facts_of == "cpu" and isinstance(table, Bits | Array):
        return bf16_from_bits(jnp.take(bits_of(table), rows, axis=axis))
    return jnp.take(expand(table), rows, axis=axis)


def prepare(
    variables: Mapping[str, Any], numerics: Numerics, *, tables: bool = True
) -> dict[str, Any]:
    """Returns a model's variables in the form that compiled programs read fastest; memory is
    shared.

    Call it once, outside of the program. Programs accept unprepared variables, too. On a CPU, bf16
    kernels of layers become views of their bits, and with ``tables`` the embedding and the head,
    unless logits are computed in a loop. Kernels for native matmuls stay in stacks that are not
    scanned: native matmuls read a layer's kernel in place, a scan over the stack would copy it.
    """
    if numerics.facts_of != "cpu" or STACKS in variables:  # `STACKS`: already prepared
        return dict(variables)
    stacks: dict[str, Bits] = {}

    def view(path: str, leaf: Any) -> Any:
        """Returns the leaf, its bits, or the layer numbers that replace a stack moved to
        ``stacks``."""
        of_layers = path.endswith("_proj/kernel") and leaf.ndim >= 3
        is_table = tables and path in _TABLES
        if not of_layers and not is_table:
            return leaf
        bits = view_bits(leaf)
        is_stack = of_layers and isinstance(bits, Bits) and bits.ndim == 3
        if not is_stack or not native_kind(numerics):
            return bits
        stacks[path] = bits
        return jnp.arange(bits.shape[0], dtype=jnp.int32)

    viewed = {**variables, "params": map_named(view, variables["params"])}
    if not stacks:
        return viewed
    return viewed | {STACKS: unflatten(stacks)}


def view_bits(leaf: Any) -> Any:
    """Returns a bf16 array as bits that share its memory; other arrays are unchanged.

    A tracer becomes its bits within the program, a `jax.ShapeDtypeStruct` their shape.
    """
    if getattr(leaf, "dtype", None) != jnp.bfloat16:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        bits = jax.ShapeDtypeStruct(leaf.shape, jnp.uint16, sharding=leaf.sharding)
        return Bits(bits)  # type: ignore[arg-type]
    if isinstance(leaf, jax.core.Tracer):
        return Bits(bf16_bits(leaf))
    shards = []
    for shard in leaf.addressable_shards:
        view = np.asarray(shard.data).view(np.uint16)
        shards.append(jax.device_put(view, shard.device, may_alias=True))
    return Bits(
        jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    )


def store(x: Array, numerics: Numerics) -> Kernel:
    """Returns an array that a program carries from step to step in the platform's best form."""
    if numerics.facts_of == "cpu" and x.dtype == jnp.bfloat16:
        return Bits(bf16_bits(x))
    return x


def restore_layout(x: Any, numerics: Numerics) -> Any:
    """Returns an array of one layer in the layout of the stack of all layers, if the compiler would
    change it.

    This is row-major order on a TPU. Otherwise XLA chooses the layout that gathers, transposed
    matmuls or the loss prefer, and copies the stack of all layers' kernels, or of their saved
    inputs. Qwen3-30B-A3B on 2 x v6e:4x4 (fsdp 8, one row a chip), compiled: 21.1 instead of 33.4 GB
    a chip.
    """
    if numerics.facts_of != "tpu":
        return x
    row_major = Layout(tuple(range(x.ndim)))
    return with_layout_constraint(x, row_major)


def round_to(x: Array, dtype: Any, numerics: Numerics) -> Array:
    """Returns ``x.astype(dtype)``; on a CPU, float32 is rounded to bf16 with integers, which is
    faster."""
    narrows = x.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16
    if narrows and numerics.facts_of == "cpu":
        return _rounded(x)
    return x.astype(dtype)


@jax.custom_vjp
def _rounded(x: Array) -> Array:
    """Returns float32 ``x`` in bf16, rounded to nearest even by integers; infinities and NaN are
    kept."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # bf16 is the upper half of a float32. Adding half of its last place rounds to the nearest; a
    # number halfway is rounded up only if its last bit is odd.
    odd = (bits >> 16) & jnp.uint32(1)
    high = (bits + jnp.uint32(0x7FFF) + odd) >> 16
    return bf16_from_bits(high.astype(jnp.uint16))


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (g.astype(jnp.float32),))


def save_residual(
    x: Array, dtype: str, numerics: Numerics, name: str = SAVED
) -> Array | Stored:
    """Returns ``x`` rounded to ``dtype`` and named for rematerialized layers; `read_residual` is
    the inverse."""
    x = round_to(x, dtype, numerics)
    if numerics.facts_of == "cpu" and x.dtype == jnp.bfloat16:
        return Bits(checkpoint_name(bf16_bits(x), name))
    return checkpoint_name(x, name)


def read_residual(x: Array | Stored, dtype: Any) -> Array:
    """Returns the argument of `save_residual` as ``dtype``."""
    return expand(x).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_and_save(x: Array, numerics: Numerics) -> Array:
    """Returns ``x`` rounded to ``numerics.residual`` and saved in that dtype; its gradient is
    unchanged."""
    return _rounded_and_saved(x, numerics)


def _rounded_and_saved(x: Array, numerics: Numerics) -> Array:
    return read_residual(save_residual(x, numerics.residual, numerics), x.dtype)


# The rule itself calls no custom function: a rematerialization policy sees no names inside of one.
round_and_save.defvjp(
    lambda x, numerics: (_rounded_and_saved(x, numerics), None),
    lambda numerics, _, g: (g,),
)


# ---------------------------------------------------------------- matmuls


@operation
def dot(
    x: Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> Array:
    """Multiplies two matrices over dimension ``dims[0]`` of x and ``dims[1]`` of y, with sums in
    float32.

    y has any storage form. Both are rounded to ``operand``, by default ``numerics.operand``, and
    the product to ``result``.
    """
    operand = operand or numerics.operand
    left = round_to(x, operand, numerics)
    right = round_to(expand(y, operand), operand, numerics)
    contract = (((dims[0],), (dims[1],)), ((), ()))  # no batch dimensions
    product = lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
    return round_to(product, result, numerics)


def matmul(x: Array, kernel: Kernel, numerics: Numerics) -> Array:
    """Computes ``x @ kernel`` for ``[..., d_in]``; a frozen kernel receives **no gradient**: zeros.

    The result ``[..., d_out]`` is in ``numerics.result``.
    """
    # Two-dimensional operands: XLA:CPU needs 60% more time for the same matmul in three dimensions.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, Trained):
        y = _trained_matmul(rows, kernel.value, numerics, kernel.sharding)
    else:
        y = _matmul(rows, kernel, numerics)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, kernel: Any, numerics: Numerics) -> Array:
    return dot(x, kernel, numerics, result=numerics.result)


def _matmul_fwd(
    x: Array, kernel: Any, numerics: Numerics
) -> tuple[Array, tuple[Any, ...]]:
    """Returns the product and the residuals of `_matmul_bwd`: the kernel as it is stored, and x's
    dtype."""
    # x is not saved, because a frozen kernel has no gradient.
    return _matmul(x, kernel, numerics), (kernel, jnp.zeros((0,), x.dtype))


def _matmul_bwd(
    numerics: Numerics, residuals: tuple[Any, ...], g: Array
) -> tuple[Array, None]:
    """Returns the gradient of x, in its dtype; the kernel receives none."""
    # Autodiff would mix a float32 cotangent with a bf16 kernel; here both are rounded to the
    # operands' dtype.
    kernel, like_x = residuals
    return dot(g, kernel, numerics, dims=(1, 1), result=like_x.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _trained_matmul(
    x: Array, kernel: Array, numerics: Numerics, sharding: RowSharding
) -> Array:
    return dot(x, kernel, numerics, result=numerics.result)


def _trained_matmul_fwd(
    x: Array, kernel: Array, numerics: Numerics, sharding: RowSharding
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the product and the residuals of `_trained_matmul_bwd`."""
    return _trained_matmul(x, kernel, numerics, sharding), (x, kernel)


def _trained_matmul_bwd(
    numerics: Numerics,
    sharding: RowSharding,
    residuals: tuple[Array, Array],
    g: Array,
) -> tuple[Array, Array]:
    """Returns the gradients of x ``[rows, d_in]``, in its dtype, and of the kernel, float32.

    The kernel's gradient is split like the kernel in the layer itself, so that no stack of whole
    gradients takes memory.
    """
    x, kernel = residuals
    of_x = dot(g, kernel, numerics, dims=(1, 1), result=x.dtype)
    of_kernel = dot(x, g, numerics, dims=(0, 0))
    if sharding is not None:
        of_kernel = lax.with_sharding_constraint(of_kernel, sharding)
    return of_x, of_kernel


_trained_matmul.defvjp(_trained_matmul_fwd, _trained_matmul_bwd)
