"""bf16 arrays stored as their bits.

In every iteration of a scan XLA:CPU widens the whole bf16 stack to float32, and it widens a whole
bf16 table before it reads a row. It does not widen integers. Outside of a compiled program the bits
are a view that shares the array's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.common.trees import map_named, unflatten
from nalora_jax.cpu import native
from nalora_jax.cpu.implementation import usable
from nalora_jax.ops import storage
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import STACKS, Kernel, LayerStack, Stored

# Embedding and output head.
_TABLES = ("embed/embedding", "lm_head/kernel")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits(LayerStack):
    """A bf16 array as its bits."""

    bits: jax.Array  # uint16

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.bits.shape)

    def expand(self, dtype: Any = None) -> jax.Array:
        """Returns the array in ``dtype``, by default bf16."""
        return lax.bitcast_convert_type(self.bits, jnp.bfloat16).astype(dtype or jnp.bfloat16)

    def layer(self, index: jax.Array) -> native.Slice:
        """Returns a layer of a stack without a copy."""
        return native.Slice(self.bits, index)


def bf16_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of bf16 ``x``; other dtypes are unchanged."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_bits(x: jax.Array) -> jax.Array:
    """Computes the inverse of `bf16_bits`."""
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    return x


@storage.store.implements("cpu")
def store(x: jax.Array, numerics: Numerics) -> Kernel:
    """Returns bf16 as its bits."""
    if x.dtype == jnp.bfloat16:
        return Bits(bf16_bits(x))
    return x


def bits_of(table: Kernel) -> jax.Array:
    """Returns a frozen array as bits if it is bf16, otherwise as floats."""
    if isinstance(table, Bits):
        return table.bits
    return bf16_bits(storage.expand(table))


@storage.take_rows.implements("cpu")
def take_rows(table: Kernel, rows: jax.Array, numerics: Numerics, axis: int = 0) -> jax.Array:
    """Reads rows of the bits."""
    if isinstance(table, Stored) and not isinstance(table, Bits):
        return NotImplemented
    return from_bits(jnp.take(bits_of(table), rows, axis=axis))


def slice_rows(table: Kernel, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Returns ``size`` rows (or columns) of a table, starting at ``start``."""
    return from_bits(lax.dynamic_slice_in_dim(bits_of(table), start, size, axis=axis))


@storage.prepare.implements("cpu")
def prepare(variables: Mapping[str, Any], numerics: Numerics, *, tables: bool = True) -> dict[str, Any]:
    """Returns variables with bf16 kernels of layers, and tables, as views of their bits.

    Kernels for native matmuls stay in stacks that are not scanned: native matmuls read a layer's
    kernel in place, whereas a scan over the stack would copy each kernel.
    """
    if STACKS in variables:  # already prepared
        return dict(variables)

    stacks: dict[str, Bits] = {}

    def view(path: str, leaf: Any) -> Any:
        layers = path.endswith("_proj/kernel") and leaf.ndim >= 3
        if not layers and not (tables and path in _TABLES):
            return leaf
        bits = view_bits(leaf)
        if not (layers and isinstance(bits, Bits) and bits.ndim == 3 and usable(numerics)):
            return bits
        stacks[path] = bits
        return jnp.arange(bits.shape[0], dtype=jnp.int32)

    viewed = {**variables, "params": map_named(view, variables["params"])}
    if stacks:
        viewed[STACKS] = unflatten(stacks)
    return viewed


def view_bits(leaf: Any) -> Any:
    """Returns a bf16 array as bits that share its memory; other arrays are unchanged.

    A tracer becomes its bits within the program, a `jax.ShapeDtypeStruct` their shape.
    """
    if getattr(leaf, "dtype", None) != jnp.bfloat16:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Bits(jax.ShapeDtypeStruct(leaf.shape, jnp.uint16, sharding=leaf.sharding))  # type: ignore[arg-type]
    if isinstance(leaf, jax.core.Tracer):
        return Bits(bf16_bits(leaf))
    shards = [
        jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device, may_alias=True)
        for shard in leaf.addressable_shards
    ]
    return Bits(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards))
