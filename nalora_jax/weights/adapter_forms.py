"""Converts adapters with a non-zero initialization (PiSSA, LoRA-GA) or allocated ranks (AdaLoRA) to
plain adapters.

A kernel is split as ``W = W_low + s A0 B0``; training changes A and B on the frozen ``W_low``.
Tools that load the original kernel need ``s (A B - A0 B0)``, a plain adapter of twice the rank.
PiSSA (arXiv 2404.02948) takes ``A0 B0`` from the kernel's principal components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.models.adapters import merged_kernel, pad_rank
from nalora_jax.models.targets import AdapterSpec, TargetSpec, scale_divisor


def lower_kernels(
    params: Mapping[str, Any], start: Mapping[str, Any], spec: AdapterSpec
) -> dict[str, Any]:
    """Subtracts the adapters' initial contribution from a model's weights.

    Args:
      params: base weights, layers stacked; they are not changed.
      start: the adapters before the first step, in float32.
      spec: of the adapters.

    Returns:
      ``params`` with ``W - s A0 B0`` instead of every adapted kernel, in its dtype (rounded once)
      and with its sharding.
    """
    leaves = flatten(params)
    adapters = flatten(start)
    for path, _ in spec.targets:
        kernel = leaves[f"{path}/kernel"]
        lower = jax.jit(_merged_stack, out_shardings=kernel.sharding)
        a = adapters[f"{path}/a"]
        b = adapters[f"{path}/b"]
        leaves[f"{path}/kernel"] = lower(kernel, a, b, -spec.scales(path))
    return unflatten(leaves)


def _merged_stack(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scales: jax.Array
) -> jax.Array:
    """Merges every layer of a stacked kernel ``[layers, ..., d_in, d_out]``.

    It computes one layer at a time, so that at most one layer is in memory in float32.
    """

    def merge_layer(layer: tuple[jax.Array, ...]) -> jax.Array:
        """Returns ``w + s a b`` of one layer, in the dtype of ``w``."""
        w, a, b, s = layer
        return merged_kernel(w, a, b, s).astype(w.dtype)

    return jax.lax.map(merge_layer, (kernel, a, b, scales))


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

    Returns:
      The tree, whose factors have twice the rank and are NumPy arrays, and its spec.
    """
    now = flatten(lora)
    before = flatten(start)
    factor = scale_divisor(2.0, rslora=spec.rslora)  # of alpha
    leaves = {path: leaf for path, leaf in now.items() if path.endswith("/magnitude")}
    targets = []
    for path, target in spec.targets:
        ranks = tuple(2 * rank for rank in target.ranks)
        alphas = tuple(factor * alpha for alpha in target.alphas)
        targets.append((path, TargetSpec(ranks, alphas)))
        a = np.asarray(now[f"{path}/a"])
        b = np.asarray(now[f"{path}/b"])
        a0 = np.asarray(before[f"{path}/a"])
        b0 = np.asarray(before[f"{path}/b"])
        layers = []
        for i, rank in enumerate(target.ranks):
            # [..., d_in, rank] and [..., rank, d_out] each; padding is left out
            both_a = a[i, ..., :rank], a0[i, ..., :rank]
            both_b = b[i, ..., :rank, :], -b0[i, ..., :rank, :]
            joined_a = np.concatenate(both_a, axis=-1)
            joined_b = np.concatenate(both_b, axis=-2)
            layers.append(pad_rank(joined_a, joined_b, 2 * a.shape[-1]))
        padded_a, padded_b = zip(*layers, strict=True)
        leaves[f"{path}/a"] = np.stack(padded_a)
        leaves[f"{path}/b"] = np.stack(padded_b)
    plain = AdapterSpec(
        tuple(targets), rslora=spec.rslora, dora=spec.dora, dropout=spec.dropout
    )
    return unflatten(leaves), plain


def remaining_ranks(
    lora: Mapping[str, Any], spec: AdapterSpec
) -> tuple[dict[str, Any], AdapterSpec]:
    """Converts ``s A diag(e) B`` to plain adapters without the ranks whose ``e`` is 0.

    A layer's alpha decreases with its rank, so that its scale stays the same; a layer with no
    remaining rank has no adapter. Experts of one layer share a rank, the largest of their ranks.

    Args:
      lora: the trained tree in host memory, stacked (``layers/ffn/gate_proj/{a, b, singular}``),
        float32.
      spec: of these adapters.

    Returns:
      The tree, zero-padded to the largest rank of each projection, and its spec; both omit
      projections with no remaining rank.
    """
    leaves = flatten(lora)
    targets = []
    for path, target in spec.targets:
        a = np.asarray(leaves.pop(f"{path}/a"))
        b = np.asarray(leaves.pop(f"{path}/b"))
        singular = np.asarray(leaves.pop(f"{path}/singular"))
        # [layers, r], or [layers, experts, r]
        nonzero = singular != 0
        ranks = tuple(int(layer.sum(-1).max()) for layer in nonzero)
        if not max(ranks):
            continue
        # Remaining ranks first, then zeros.
        order = np.argsort(~nonzero, axis=-1, kind="stable")
        first = order[..., : max(ranks)]
        scaled_a = a * singular[..., None, :]
        live_b = b * nonzero[..., None]
        leaves[f"{path}/a"] = np.take_along_axis(scaled_a, first[..., None, :], axis=-1)
        leaves[f"{path}/b"] = np.take_along_axis(live_b, first[..., None], axis=-2)
        alphas = []
        for rank, before, alpha in zip(ranks, target.ranks, target.alphas, strict=True):
            factor = scale_divisor(rank / max(before, 1), rslora=spec.rslora)
            alphas.append(alpha * factor or 1.0)  # an alpha of rank 0 is not used
        targets.append((path, TargetSpec(ranks, tuple(alphas))))
    plain = replace(
        spec, targets=tuple(targets), dora=False, adalora=False, zero_a=False
    )
    return unflatten(leaves), plain


_ITERATIONS = 4  # of the randomized decomposition, as PEFT's ``pissa_niter_4``


@partial(jax.jit, static_argnums=(1,))
def pissa_init(
    kernel: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits a kernel into its principal factors and the residual.

    The decomposition is randomized, which costs ``O(d_in d_out rank)`` instead of ``O(d_in d_out
    min(d_in, d_out))``, and deterministic: the same kernel gives the same split.

    Args:
      kernel: ``[d_in, d_out]``, or ``[..., d_in, d_out]``: each matrix is split separately.
      rank: number of components, at most ``min(d_in, d_out)``.
      scale: the adapter's ``s``; ``s A B`` is the best rank-``rank`` approximation of the kernel.

    Returns:
      ``(a [..., d_in, rank], b [..., rank, d_out], residual)``: factors in float32, the residual
      in the kernel's dtype, rounded once (in bfloat16 that rounding is the only difference between
      residual + adapter and the kernel).
    """
    w = kernel.astype(jnp.float32)
    u, s, vt = _randomized_svd(w, rank)
    root = jnp.sqrt(s / scale)
    a = u * root[..., None, :]
    b = root[..., None] * vt
    return a, b, merged_kernel(w, a, b, -scale).astype(kernel.dtype)


def pissa_split(
    params: Mapping[str, Any], spec: AdapterSpec
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moves every adapted kernel's principal components from the weights to the adapters.

    Args:
      params: base weights, layers stacked; they are not changed.
      spec: of the adapters; the number of components of each layer is its rank.

    Returns:
      ``(params, lora)``; together they compute the same as the original ``params``, up to the
      rounding of the residual's dtype.
    """
    leaves: dict[str, Any] = flatten(params)
    adapters: dict[str, Any] = {}
    for path, target in spec.targets:
        kernel = leaves[f"{path}/kernel"]
        layers = []
        *lead, d_in, d_out = kernel.shape[1:]
        scales = spec.scales(path)
        for i, (rank, scale) in enumerate(zip(target.ranks, scales, strict=True)):
            a = jnp.zeros((*lead, d_in, 0))
            b = jnp.zeros((*lead, 0, d_out))
            residual = kernel[i]
            if rank:
                a, b, residual = pissa_init(kernel[i], rank, float(scale))
            layers.append((*pad_rank(a, b, target.rank), residual))
        a, b, residual = (jnp.stack(factors) for factors in zip(*layers, strict=True))
        adapters |= {f"{path}/a": a, f"{path}/b": b}
        leaves[f"{path}/kernel"] = jax.device_put(residual, kernel.sharding)
        if spec.dora:
            norms = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
            adapters[f"{path}/magnitude"] = norms  # [layers, ..., d_out]
    return unflatten(leaves), unflatten(adapters)


def _randomized_svd(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``u [..., d_in, rank], s [..., rank], vt [..., rank, d_out]``, with QR at every half
    step.

    Source: Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    *lead, d_in, d_out = w.shape
    # Oversampling: the subspace is wider than the result.
    width = min(rank + max(8, rank // 2), d_in, d_out)
    draws = jax.random.normal(jax.random.key(0), (*lead, d_out, width), jnp.float32)
    # Orthonormal bases of the outputs [..., d_in, width] and of the inputs [..., d_out, width].
    q, _ = jnp.linalg.qr(jnp.matmul(w, draws, precision="highest"))
    wt = jnp.swapaxes(w, -1, -2)
    for _ in range(_ITERATIONS):
        p, _ = jnp.linalg.qr(jnp.matmul(wt, q, precision="highest"))
        q, _ = jnp.linalg.qr(jnp.matmul(w, p, precision="highest"))
    projected = jnp.matmul(jnp.swapaxes(q, -1, -2), w, precision="highest")
    u, s, vt = jnp.linalg.svd(projected, full_matrices=False)  # [..., width, d_out]
    u = jnp.matmul(q, u, precision="highest")
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]
