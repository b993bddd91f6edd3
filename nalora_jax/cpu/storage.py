"""bf16 arrays stored as their bits, and what programs on a CPU prefer.

In every iteration of a scan XLA:CPU widens the whole bf16 stack to float32, and it widens a whole
bf16 table before it reads a row. It does not widen integers. Outside of a compiled program the bits
are a view that shares the array's memory. bf16 is rounded with integers, because XLA:CPU does not
vectorize loops that contain a conversion: ``silu(z) * u`` takes twice as long with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.common.trees import map_named, unflatten
from nalora_jax.cpu import native
from nalora_jax.cpu.native import bf16_bits, from_bits, library
from nalora_jax.ops import dispatch, storage
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED, STACKS, Kernel, LayerStack, Stored

# Embedding and output head.
_TABLES = ("embed/embedding", "lm_head/kernel")
# Largest d_model at which recomputing tiled matmuls is faster than saving their results (measured
# with benchmarks/versus_peft.py).
_WIDEST_RECOMPUTED = 1024


def usable(numerics: Numerics) -> bool:
    """Returns True if native kernels compile and support programs with these numerics: on one device."""
    return library.kind(numerics.platform.devices) is not None


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
        return from_bits(self.bits).astype(dtype or jnp.bfloat16)

    def layer(self, index: jax.Array) -> native.Slice:
        """Returns a layer of a stack without a copy."""
        return native.Slice(self.bits, index)


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


# ---------------------------------------------------------------- rounding


@storage.rounded.implements("cpu")
def rounded(x: jax.Array, dtype: Any, numerics: Numerics) -> jax.Array:
    """Rounds float32 to bf16."""
    if (jnp.dtype(dtype), x.dtype) == (jnp.bfloat16, jnp.float32):
        return _rounded(x)
    return x.astype(dtype)


@jax.custom_vjp
def _rounded(x: jax.Array) -> jax.Array:
    return from_bits(_upper_bits(x))


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (g.astype(jnp.float32),))


def _upper_bits(x: jax.Array) -> jax.Array:
    """Returns the bf16 bits of float32 ``x`` as uint16, rounded to nearest even.

    Infinities and NaN are kept.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 16) & jnp.uint32(1)
    return ((bits + jnp.uint32(0x7FFF) + odd) >> 16).astype(jnp.uint16)


@storage.save_residual.implements("cpu")
def save_residual(x: jax.Array, dtype: str, numerics: Numerics, name: str = SAVED) -> jax.Array | Stored:
    """Saves bf16 as its bits."""
    x = rounded(x, dtype, numerics)
    named: jax.Array = checkpoint_name(bf16_bits(x), name)
    if x.dtype == jnp.bfloat16:
        return Bits(named)
    return named


# ---------------------------------------------------------------- preferences


@dispatch.preferred.implements("cpu")
def preferred(numerics: Numerics) -> Numerics:
    """Returns bf16 between two matmuls with native kernels, which round while they store.

    XLA's matmuls would need a second pass over the result.
    """
    if numerics.operand == "bfloat16" and usable(numerics):
        return replace(numerics, inner="bfloat16")
    return numerics


@storage.best_remat.implements("cpu")
def best_remat(d_model: int, numerics: Numerics, *, gated: bool = True) -> str:
    """Returns "attention" for narrow gated models on AMX tiles, else "dots".

    The time of a matmul per byte of its result grows with d_model, the time to save a byte does
    not. A block with one wide matmul has half as much to save: CLIP ViT-B/16 is 6% faster with
    "dots".
    """
    tiles = numerics.operand == "bfloat16" and library.kind(numerics.platform.devices) == "tiles"
    if tiles and gated and d_model <= _WIDEST_RECOMPUTED:
        return "attention"
    return "dots"
