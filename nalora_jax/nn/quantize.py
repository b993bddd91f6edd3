"""Quantized frozen kernels: int8 or 4-bit codes with a scale per block of inputs (QLoRA, arXiv 2305.14314).

    kernel [d_in, d_out]   int8: codes int8 [d_in, d_out], one scale per output channel
                           nf4:  codes uint8 [d_in / 2, d_out], two to a byte; a scale per 64 inputs and output channel

A quantized kernel takes the place of the array in the ``params`` tree; operations expand it one layer at a time, in
the forward and again in the backward pass, so that the float kernel is never saved. Adapters and their
gradients stay float32. Norms, biases, embeddings and routers stay as they are. `nalora_jax.weights.load` quantizes a
model tensor by tensor while it reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax import trees
from nalora_jax.errors import NaloraError
from nalora_jax.ops.storage import Stored

Kind = Literal["int8", "nf4"]
_BLOCK = 64
KERNELS = r"layers/.*_proj/kernel$"  # the leaves that a quantized model holds quantized
# The 16 levels of NormalFloat4: quantiles of N(0, 1) with an exact zero, scaled to [-1, 1] (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(Stored):
    """Codes and scales of one kernel, or of a stack of them."""

    codes: jax.Array  # int8 [..., d_in, d_out], or uint8 [..., d_in / 2, d_out]
    scales: jax.Array  # float32 [..., blocks, d_out]
    kind: Kind = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float kernel."""
        *lead, rows, d_out = self.codes.shape
        return (*lead, rows * (2 if self.kind == "nf4" else 1), d_out)

    def expand(self) -> jax.Array:
        """The float32 kernel."""
        return dequantize(self)


def quantize(kernel: jax.Array, kind: Kind) -> Quantized:
    """The nearest codes of ``kernel``.

    Args:
      kernel: float ``[..., d_in, d_out]``.
      kind: "int8" (error at most half a step of the channel's largest weight / 127) or "nf4".

    Raises:
      NaloraError: d_in is no multiple of 64, for nf4.
    """
    *lead, d_in, d_out = kernel.shape
    if kind == "nf4" and d_in % _BLOCK:
        raise NaloraError("compute.quantize", expected=f"inputs in multiples of {_BLOCK} for nf4", found=d_in)
    block = d_in if kind == "int8" else _BLOCK
    w = kernel.astype(jnp.float32).reshape(*lead, d_in // block, block, d_out)
    largest = jnp.max(jnp.abs(w), axis=-2)
    unit = w / jnp.where(largest > 0, largest, 1.0)[..., None, :]
    if kind == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8).reshape(kernel.shape)
        return Quantized(codes, largest / 127, kind)
    # Compared with all midpoints at once, which XLA fuses; a search would keep several integer copies of the kernel.
    middle = jnp.asarray(_midpoints())
    nearest = jnp.searchsorted(middle, unit.reshape(kernel.shape), method="compare_all").astype(jnp.uint8)
    return Quantized(nearest[..., 0::2, :] | (nearest[..., 1::2, :] << 4), largest, kind)


def _midpoints() -> np.ndarray:
    levels = np.asarray(NF4_LEVELS, np.float32)
    return (levels[1:] + levels[:-1]) / 2


def dequantize(kernel: Quantized) -> jax.Array:
    """The float32 kernel that ``kernel`` stands for."""
    *lead, d_in, d_out = kernel.shape
    if kernel.kind == "int8":
        return kernel.codes.astype(jnp.float32) * kernel.scales
    low, high = kernel.codes & 15, kernel.codes >> 4
    # [..., d_in / 2, 2, d_out]: the two codes of a byte are neighbours along the inputs.
    codes = jnp.stack([low, high], axis=-2).reshape(*lead, d_in, d_out)
    unit = jnp.take(jnp.asarray(NF4_LEVELS, jnp.float32), codes.astype(jnp.int32))
    blocks = unit.reshape(*lead, d_in // _BLOCK, _BLOCK, d_out)
    return (blocks * kernel.scales[..., None, :]).reshape(*lead, d_in, d_out)


def quantize_params(params: Any, kind: Kind, pattern: str = KERNELS) -> dict[str, Any]:
    """``params``, already in memory, with every kernel that ``pattern`` matches quantized, one layer at a time."""
    one = jax.jit(quantize, static_argnums=1)

    def replace(path: str, leaf: jax.Array) -> Any:
        if not re.search(pattern, path):
            return leaf
        layers = [one(leaf[i], kind) for i in range(leaf.shape[0])]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return trees.map_named(replace, params)
