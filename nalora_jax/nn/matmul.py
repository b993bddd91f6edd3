"""Matrix products with frozen kernels: the one room that knows each platform's quirks.

Model code says ``matmul(x, kernel, numerics)`` and reads the same on every platform. What differs is here:

- operand and result dtypes. On CPU only bf16 x bf16 -> float32 reaches the fast kernels, in both passes, so that
  activations stay float32 between products; on TPU and GPU the result is rounded to bf16, accumulated in float32.
- how a bf16 kernel is held while layers are scanned (`pack`).
- the backward pass of a frozen kernel: it has no gradient, so its input is not kept for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.cpu import native
from nalora_jax.errors import NaloraError
from nalora_jax.nn.quantize import Quantized, dequantize
from nalora_jax.trees import flatten, map_named, unflatten

# The collection of kernels that stay in the stack of all layers, see `in_stacks`.
STACKS = "stacks"
# Names of what a rematerialised layer keeps nonetheless: what costs a product to make again, and that part of it which
# is as wide as the feed-forward block.
KEPT, KEPT_WIDE = "kept", "kept_wide"
# Fewer rows, those of text generation, are XLA's where it is faster at them.
_FEWEST_ROWS = 32


@dataclass(frozen=True)
class Numerics:
    """Dtypes of one forward pass."""

    operand: str = "float32"  # what frozen kernels and their inputs are rounded to
    result: str = "float32"  # what products, and with them the residual stream, are rounded to
    adapter: str = "float32"  # what the adapters' operands are rounded to; masters stay float32
    kept: str = "float32"  # what activations are rounded to where they wait for the backward pass
    fused: bool = False  # adapters ride along in the frozen product (`nalora_jax.nn.fused_lora`)
    inner: str | None = None  # what arrays between two products of a block are rounded to; None: as ``result``

    def within(self) -> Numerics:
        """Those of products whose results only meet elementwise functions before they are operands again."""
        return self if self.inner is None else replace(self, result=self.inner)


def numerics_for(dtype: str, platform: str) -> Numerics:
    """The numerics that were measured to be best for base weights of ``dtype`` on ``platform`` ("cpu", "gpu", "tpu").

    Raises:
      NaloraError: ``dtype`` is neither "float32" nor "bfloat16".
    """
    if dtype == "float32":
        return Numerics(fused=platform == "cpu")
    if dtype != "bfloat16":
        raise NaloraError("compute.dtype", expected="'float32' or 'bfloat16'", found=repr(dtype))
    if platform == "cpu":
        # Only native kernels round their sums on the way out; XLA's products would take another pass for it.
        inner = "bfloat16" if native.available() else None
        return Numerics("bfloat16", "float32", adapter="bfloat16", kept="bfloat16", fused=True, inner=inner)
    return Numerics("bfloat16", "bfloat16", adapter="bfloat16", kept="bfloat16")


# A frozen kernel as it is stored: float, packed, quantized, or in the stack of all layers.
Kernel = jax.Array | Quantized | native.Slice


def matmul(x: jax.Array, kernel: Kernel, numerics: Numerics) -> jax.Array:
    """``x @ kernel`` for a frozen kernel, accumulated in float32.

    Args:
      x: ``[..., d_in]``.
      kernel: ``[d_in, d_out]``, as it is stored. It receives **no gradient**: zeros.
      numerics: dtypes of operands and result.

    Returns:
      ``[..., d_out]`` in ``numerics.result``.
    """
    # Two-dimensional operands: XLA:CPU needs 60% more time for the same product over a [batch, seq, d] operand.
    y = _frozen(x.reshape(-1, x.shape[-1]), kernel, numerics)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x.astype(dtype)``, and as differentiable, by the fastest way that the platform has.

    On CPU a conversion to bf16 keeps XLA from vectorising what it is fused with: ``silu(z) * u`` takes twice as long.
    """
    if jax.default_backend() != "cpu" or (jnp.dtype(dtype), x.dtype) != (jnp.bfloat16, jnp.float32):
        return x.astype(dtype)
    return _rounded(x)


@jax.custom_vjp
def _rounded(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_upper_bits(x), jnp.bfloat16)


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (g.astype(jnp.float32),))


def _upper_bits(x: jax.Array) -> jax.Array:
    """The bits of float32 ``x`` in bf16, rounded to nearest even, as uint16; infinities and NaN stay what they are."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 16) & jnp.uint32(1)
    return ((bits + jnp.uint32(0x7FFF) + odd) >> 16).astype(jnp.uint16)


def as_integers(x: jax.Array) -> jax.Array:
    """bf16 ``x`` viewed as uint16 on CPU, where XLA leaves integers alone; anything else as it is."""
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def stored(x: jax.Array, dtype: str, name: str = KEPT) -> jax.Array:
    """``x`` as it waits for the backward pass: rounded to ``dtype``, and named for rematerialised layers.

    On CPU bf16 is held as integers, for the reason that `pack` gives; `restored` undoes it.
    """
    return checkpoint_name(as_integers(rounded(x, dtype)), name)


def restored(x: jax.Array, dtype: Any) -> jax.Array:
    """What `stored` was given, as ``dtype``."""
    return unpack_leaf(x).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def kept(x: jax.Array, dtype: str) -> jax.Array:
    """``x`` rounded to ``dtype``, and kept so by a rematerialised layer; its gradient is passed on as it is."""
    return restored(stored(x, dtype), x.dtype)


kept.defvjp(lambda x, dtype: (restored(stored(x, dtype), x.dtype), None), lambda dtype, _, g: (g,))


def dot(
    x: jax.Array,
    y: jax.Array | native.Slice,
    operand: str,
    dims: tuple[int, int] = (1, 0),
    result: Any = "float32",
) -> jax.Array:
    """The product of two matrices over dimensions ``dims``, operands rounded to ``operand``, summed in float32.

    y may lie in a stack where the product is native: see `factor`.
    """
    contract = (((dims[0],), (dims[1],)), ((), ()))
    rows = x.shape[0]
    if dims[0] == 1 and is_native(rows, operand):
        return native_sums(native.Sum([native.Term(x, y, dims[1] == 1)], result))[0]
    if rows == 1 and dims[0] == 1 and operand == "bfloat16" and jax.default_backend() == "cpu":
        # XLA:CPU multiplies a single row in float32, after widening the whole bf16 matrix; two rows it does not.
        x = jnp.concatenate([x, x])
    assert not isinstance(y, native.Slice)
    y = lax.dot_general(rounded(x, operand), rounded(y, operand), contract, preferred_element_type=jnp.float32)
    return rounded(y[:rows] if dims[0] == 1 else y, result)


def is_native(rows: int, operand: str) -> bool:
    """Whether products of so many rows are `nalora_jax.cpu.native`'s."""
    enough = rows >= _FEWEST_ROWS or native.multiplies_few_rows()
    return enough and operand == "bfloat16" and native.available()


def native_sums(*sums: native.Sum) -> list[jax.Array]:
    """`nalora_jax.cpu.native.products` of operands that are yet to be rounded."""

    def operand(y: Any) -> Any:
        return y if isinstance(y, native.Slice) else rounded(y, "bfloat16")

    terms = ([native.Term(operand(x), operand(y), turned) for x, y, turned in s[0]] for s in sums)
    return native.products(*(native.Sum(t, s.dtype) for t, s in zip(terms, sums, strict=True)))


def contraction_multiple(operand: str) -> int:
    """What the length of a contraction should be a multiple of, for operands of dtype ``operand``.

    Tiles of AMX take 32 bf16 numbers: 608 columns, the last 24 of them zeros, are a fifth faster than 584.
    """
    return 32 if operand == "bfloat16" and jax.default_backend() == "cpu" and native.has_tiles() else 1


def beside_masked(b: jax.Array, mask: jax.Array | None) -> jax.Array:
    """An adapter's B ``[r, d_out]`` for dx, and below it ``B * mask`` for dA where there is a mask: ``[2 r, d_out]``.

    One product over the wide cotangent then serves both.
    """
    return b if mask is None else jnp.concatenate([b, b * mask[None, :]], axis=0)


def look_up(table: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """``jnp.take`` of a table, packed or not; what comes out may be packed: `unpack_leaf`.

    XLA:CPU would widen a whole bf16 table to float32 before it takes a row; integers it leaves alone.
    """
    return jnp.take(as_integers(table), rows, axis=axis)


def block_of(table: jax.Array, start: jax.Array, size: int, axis: int = 0) -> jax.Array:
    """``size`` rows (or columns) of a table from ``start`` on, as floats; the table may be packed, as for `look_up`."""
    return unpack_leaf(lax.dynamic_slice_in_dim(as_integers(table), start, size, axis=axis))


def expand(kernel: Kernel) -> jax.Array:
    """A stored kernel as floats."""
    if isinstance(kernel, Quantized):
        return dequantize(kernel)
    return unpack_leaf(kernel.copied() if isinstance(kernel, native.Slice) else kernel)


def factor(kernel: Kernel, rows: int, operand: str) -> jax.Array | native.Slice:
    """A stored kernel as products with so many rows take it: in its stack if they are native, else as floats."""
    return kernel if isinstance(kernel, native.Slice) and is_native(rows, operand) else expand(kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen(x: jax.Array, kernel: Any, numerics: Numerics) -> jax.Array:
    return dot(x, factor(kernel, x.shape[0], numerics.operand), numerics.operand, result=numerics.result)


def _frozen_fwd(x: jax.Array, kernel: Any, numerics: Numerics) -> tuple[jax.Array, tuple[Any, ...]]:
    # The kernel is kept as it is stored: packed or quantized, a slice of what the scan reads anyway.
    return _frozen(x, kernel, numerics), (kernel, jnp.zeros((0,), x.dtype))


def _frozen_bwd(numerics: Numerics, residuals: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, Any]:
    # Autodiff would mix a float32 cotangent with a bf16 kernel, the slow path on CPU; here both are operands.
    kernel, like_x = residuals
    y = factor(kernel, g.shape[0], numerics.operand)
    return dot(g, y, numerics.operand, dims=(1, 1), result=like_x.dtype), None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


def pack(params: Any) -> Any:
    """``params`` with bf16 leaves of rank 3 and more (layer stacks) viewed as uint16; a no-op elsewhere than on CPU.

    XLA:CPU widens a scanned bf16 stack to float32 as a whole, in every iteration; integers it leaves alone. The view is
    taken inside the compiled step, so that trees outside always hold real dtypes.
    """
    if jax.default_backend() != "cpu":
        return params
    return jax.tree.map(_pack_leaf, params)


def _pack_leaf(leaf: jax.Array) -> jax.Array:
    return as_integers(leaf) if leaf.ndim >= 3 else leaf


def in_stacks(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits packed ``params`` so that native products read the kernels of dense layers where they lie.

    Returns:
      The params, with the number of the layer in place of such a kernel, and the stacks, by the same paths: the
      collection `STACKS`, which is not scanned (see `nalora_jax.nn.lora.LoRADense`). Without native products everything
      stays where it is.
    """
    if not native.available():
        return dict(params), {}
    kernels = {path: leaf for path, leaf in flatten(params).items() if path.endswith("_proj/kernel")}
    stacks = {path: leaf for path, leaf in kernels.items() if (leaf.ndim, leaf.dtype) == (3, jnp.uint16)}

    def number(path: str, leaf: jax.Array) -> jax.Array:
        return jnp.arange(leaf.shape[0], dtype=jnp.int32) if path in stacks else leaf

    return map_named(number, params), unflatten(stacks)


def packed(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A model's variables as its layers take them fastest, within a compiled program: `pack` and `in_stacks`."""
    params, stacks = in_stacks(pack(variables["params"]))
    return {**variables, "params": params} | ({STACKS: stacks} if stacks else {})


def pack_views(params: Any, *, rank: int = 3) -> Any:
    """`pack` outside of a compiled program, without a copy: the views share the memory of ``params``.

    For programs that run for milliseconds (one token), where the copy that `pack` makes on entry would count.

    Args:
      params: arrays; those on several devices are returned as they are, for `pack` to view.
      rank: of the smallest arrays that are viewed.
    """
    if jax.default_backend() != "cpu":
        return params

    def view(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.dtype != jnp.bfloat16 or leaf.ndim < rank or len(leaf.devices()) > 1:
            return leaf
        return jax.device_put(np.asarray(leaf).view(np.uint16), leaf.sharding, may_alias=True)

    return jax.tree.map(view, params)


def view_params(params: Any) -> Any:
    """`pack_views` of a model's ``params``: its stacks of layers, and the tables at both ends of it."""
    tables = {name: pack_views(params[name], rank=2) for name in ("embed", "lm_head") if name in params}
    return {**pack_views(params), **tables}


def unpack_leaf(leaf: jax.Array) -> jax.Array:
    """One leaf as `pack` found it."""
    return lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf
