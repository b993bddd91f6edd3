"""PiSSA: adapters initialized with a kernel's principal components (arXiv 2404.02948).

The kernel is split as ``W = W_res + s A0 B0``; training changes A and B on the frozen residual
``W_res``. `nalora_jax.weights.nonzero_start` converts the result to plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.models.adapters import merged_kernel, pad_rank
from nalora_jax.models.targets import AdapterSpec


def pissa_init(
    kernel: jax.Array,
    rank: int,
    scale: float,
    *,
    iterations: int | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits a kernel into its principal factors and the residual.

    Args:
      kernel: ``[d_in, d_out]``, or ``[..., d_in, d_out]``: each matrix is split separately.
      rank: number of components, at most ``min(d_in, d_out)``.
      scale: the adapter's ``s``; ``s A B`` is the best rank-``rank`` approximation of the kernel.
      iterations: None for the exact decomposition; otherwise the number of subspace iterations of
        a randomized one, which costs ``O(d_in d_out rank)`` instead of ``O(d_in d_out min(d_in,
        d_out))`` (PEFT's ``pissa_niter_<iterations>``).
      key: source of the random subspace, with ``iterations``; ``jax.random.key(0)`` if None.

    Returns:
      ``(a [..., d_in, rank], b [..., rank, d_out], residual)``: factors in float32, the residual
      in the kernel's dtype, rounded once (in bfloat16 that rounding is the only difference between
      residual + adapter and the kernel).
    """
    w = kernel.astype(jnp.float32)
    if iterations is None:
        u, s, vt = (factor[..., :rank] for factor in _svd(w))
    else:
        u, s, vt = _randomized_svd(w, rank, iterations, jax.random.key(0) if key is None else key)
    root = jnp.sqrt(s / scale)
    a, b = u * root[..., None, :], jnp.swapaxes(vt * root[..., None, :], -1, -2)
    return a, b, merged_kernel(w, a, b, -scale).astype(kernel.dtype)


def pissa_split(
    params: Mapping[str, Any], spec: AdapterSpec, *, iterations: int = 4
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Moves every adapted kernel's principal components from the weights to the adapters.

    Args:
      params: base weights, layers stacked; they are not changed.
      spec: of the adapters; the number of components of each layer is its rank.
      iterations: of the randomized decomposition (deterministic: the same weights give the same
        split).

    Returns:
      ``(params, lora)``; together they compute the same as the original ``params``, up to the
      rounding of the residual's dtype.
    """
    leaves: dict[str, Any] = flatten(params)
    adapters: dict[str, Any] = {}
    for path, target in spec.targets:
        kernel, scales = leaves[f"{path}/kernel"], spec.scales(path)
        parts = [
            _padded_init(kernel[layer], rank, target.rank, float(scale), iterations)
            for layer, (rank, scale) in enumerate(zip(target.ranks, scales, strict=True))
        ]
        a, b, residual = (jnp.stack(factors) for factors in zip(*parts, strict=True))
        adapters |= {f"{path}/a": a, f"{path}/b": b}
        leaves[f"{path}/kernel"] = jax.device_put(residual, kernel.sharding)
        if spec.dora:
            adapters[f"{path}/magnitude"] = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
    return unflatten(leaves), unflatten(adapters)


_init = jax.jit(pissa_init, static_argnums=(1,), static_argnames=("iterations",))


def _padded_init(
    kernel: jax.Array, rank: int, stored: int, scale: float, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs `pissa_init` on one layer and zero-pads its factors to the stack's rank."""
    if rank == 0:
        lead = kernel.shape[:-2]
        zeros = (
            jnp.zeros((*lead, kernel.shape[-2], stored)),
            jnp.zeros((*lead, stored, kernel.shape[-1])),
        )
        return (*zeros, kernel)
    a, b, residual = _init(kernel, rank, scale, iterations=iterations)
    return *pad_rank(a, b, stored), residual


def _svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``u [..., d_in, k], s [..., k], v [..., d_out, k]`` of k singular values."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return u, s, jnp.swapaxes(vt, -1, -2)


def _randomized_svd(
    w: jax.Array, rank: int, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Implements a randomized SVD with QR at every half step.

    Source: Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    # Oversampling: the subspace is wider than the result.
    width = min(rank + max(8, rank // 2), *w.shape[-2:])
    q = jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width), jnp.float32)
    q = jnp.linalg.qr(jnp.matmul(w, q, precision="highest"))[0]
    wt = jnp.swapaxes(w, -1, -2)
    for _ in range(iterations):
        p = jnp.linalg.qr(jnp.matmul(wt, q, precision="highest"))[0]
        q = jnp.linalg.qr(jnp.matmul(w, p, precision="highest"))[0]
    u, s, v = _svd(jnp.matmul(jnp.swapaxes(q, -1, -2), w, precision="highest"))
    u = jnp.matmul(q, u, precision="highest")
    return u[..., :rank], s[..., :rank], v[..., :rank]
