"""Non-zero initializations (PiSSA, LoRA-GA): the adjusted kernels, and back to plain LoRA.

A kernel is split as ``W = W_low + s A0 B0``; training changes A and B on the frozen ``W_low``.
Tools that load the original kernel need ``s (A B - A0 B0)``, a plain adapter of twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.models.adapters import merged_kernel
from nalora_jax.models.targets import AdapterSpec, TargetSpec, scale_divisor


def lower_kernels(params: Mapping[str, Any], start: Mapping[str, Any], spec: AdapterSpec) -> dict[str, Any]:
    """Subtracts the adapters' initial contribution from a model's weights.

    Args:
      params: base weights, layers stacked; they are not changed.
      start: the adapters before the first step, in float32.
      spec: of the adapters.

    Returns:
      ``params`` with ``W - s A0 B0`` instead of every adapted kernel, in its dtype (rounded once)
      and with its sharding.
    """
    leaves, adapters = flatten(params), flatten(start)
    for path, _ in spec.targets:
        kernel = leaves[f"{path}/kernel"]
        lower = jax.jit(_lower, out_shardings=kernel.sharding)
        leaves[f"{path}/kernel"] = lower(
            kernel, adapters[f"{path}/a"], adapters[f"{path}/b"], spec.scales(path)
        )
    return unflatten(leaves)


def _lower(kernel: jax.Array, a: jax.Array, b: jax.Array, scales: jax.Array) -> jax.Array:
    """Computes one layer at a time, so that at most one layer is in memory in float32."""

    def one(layer: tuple[jax.Array, ...]) -> jax.Array:
        w, a, b, scale = layer
        lowered: jax.Array = merged_kernel(w, a, b, -scale)
        return lowered.astype(w.dtype)

    lowered: jax.Array = jax.lax.map(one, (kernel, a, b, scales))
    return lowered


def difference_as_lora(
    lora: Mapping[str, Any], start: Mapping[str, Any], spec: AdapterSpec
) -> tuple[dict[str, Any], AdapterSpec]:
    """Converts a trained adapter of the adjusted kernels to one of the original kernels.

    ``s (A B - A0 B0) = s [A | A0] [B ; -B0]``: every rank doubles, and alpha with it (times
    sqrt(2) with rsLoRA), so that the scale stays the same. DoRA's magnitudes are unchanged:
    ``|W_low + s A B|`` is the norm of the same sum.

    Args:
      lora: the trained tree, stacked (``layers/ffn/gate_proj/{a, b}``).
      start: the tree before training, same shapes.
      spec: the trained adapter's spec.
    """
    now, before = flatten(lora), flatten(start)
    factor = scale_divisor(2.0, rslora=spec.rslora)
    targets, leaves = [], {}
    for path, target in spec.targets:
        ranks = tuple(2 * rank for rank in target.ranks)
        targets.append((path, TargetSpec(ranks, tuple(factor * alpha for alpha in target.alphas))))
        pairs = ((np.asarray(now[f"{path}/{n}"]), np.asarray(before[f"{path}/{n}"])) for n in ("a", "b"))
        (a, a0), (b, b0) = pairs
        leaves[f"{path}/a"] = _join(a, a0, target, axis=-1)
        leaves[f"{path}/b"] = _join(b, -b0, target, axis=-2)
    magnitudes = {path: leaf for path, leaf in now.items() if path.endswith("/magnitude")}
    plain = AdapterSpec(tuple(targets), rslora=spec.rslora, dora=spec.dora, dropout=spec.dropout)
    return unflatten(leaves | magnitudes), plain


def _join(trained: np.ndarray, start: np.ndarray, target: TargetSpec, axis: int) -> np.ndarray:
    """Concatenates both factors on the rank axis, layer by layer, without padding in between."""
    joined = np.zeros_like(np.concatenate([trained, start], axis=axis))
    for layer, rank in enumerate(target.ranks):
        place, first, second = (np.moveaxis(leaf[layer], axis, 0) for leaf in (joined, trained, start))
        place[:rank], place[rank : 2 * rank] = first[:rank], second[:rank]
    return joined
