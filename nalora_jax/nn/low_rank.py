"""Low-rank adapters: their shapes by ordered rules, and their arithmetic; the layer that carries one is `LoRADense`.

An adapter of a frozen kernel ``W [d_in, d_out]`` is ``A [d_in, r]`` and ``B [r, d_out]``; the layer computes
``x W + s (x A) B`` with ``s = alpha / r`` (``alpha / sqrt(r)`` with rsLoRA). B starts at zero, so that a fresh adapter
is the identity. Adapters live in the collection ``lora``, apart from ``params``::

    params: {"gate_proj": {"kernel": [d_in, d_out]}}
    lora:   {"gate_proj": {"a": [d_in, r], "b": [r, d_out]}}           # DoRA adds "magnitude": [d_out]

Source: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.config import LoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.nn.matmul import beside_masked, dot
from nalora_jax.trees import match_rules


@dataclass(frozen=True)
class TargetSpec:
    """Ranks and alphas of one kind of projection, one entry per layer; rank 0 leaves a layer unadapted."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The stored rank: smaller ones are zero-padded to it (their padding has no gradient, so it stays zero)."""
        return max(self.ranks)


@dataclass(frozen=True)
class AdapterSpec:
    """Every adapter of a model, by the stacked path of what it adapts ("layers/ffn/gate_proj")."""

    targets: tuple[tuple[str, TargetSpec], ...] = ()
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0

    def target(self, path: str) -> TargetSpec | None:
        """The spec of ``path``, or None if nothing there is adapted."""
        return dict(self.targets).get(path)

    def scales(self, path: str) -> np.ndarray:
        """``s`` of every layer at ``path``: float32 ``[layers]``, 0 where a layer is unadapted."""
        spec = self.target(path)
        if spec is None:
            raise KeyError(path)
        return np.array(
            [
                adapter_scale(alpha, rank, rslora=self.rslora)
                for alpha, rank in zip(spec.alphas, spec.ranks, strict=True)
            ],
            np.float32,
        )


def adapter_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA; 0 for rank 0."""
    if rank == 0:
        return 0.0
    return alpha / (math.sqrt(rank) if rslora else rank)


def resolve(config: LoRAConfig, shapes: Mapping[str, tuple[int, ...]], n_layers: int) -> AdapterSpec:
    """The adapters that the rules of ``config`` give a model.

    Args:
      config: ordered rules and the variant.
      shapes: kernel shape ``(..., d_in, d_out)`` of every projection that can be adapted, by stacked path, e.g.
        ``{"layers/ffn/gate_proj": (576, 1536)}``. Rules are searched in ``layers/<i>/ffn/gate_proj``.
      n_layers: length of the stack.

    Raises:
      NaloraError: a rule matches nothing, a rank is negative or larger than the projection, an alpha is not positive.
    """
    names = {_layer_path(path, i): (path, i) for path in shapes for i in range(n_layers)}
    matched = match_rules([(rule.pattern, rule) for rule in config.rules], names, where="--lora.rules")
    specs: dict[str, tuple[list[int], list[float]]] = {}
    for name, rule in matched.items():
        path, layer = names[name]
        limit = min(shapes[path][-2:])
        if not 0 <= rule.rank <= limit:
            raise NaloraError(
                f"--lora.rules {rule.pattern!r}: rank",
                expected=f"0 to {limit} (the smaller side of {path} {shapes[path]})",
                found=rule.rank,
            )
        alpha = 2.0 * rule.rank if rule.alpha is None else rule.alpha
        if rule.rank and not (math.isfinite(alpha) and alpha > 0):
            raise NaloraError(f"--lora.rules {rule.pattern!r}: alpha", expected="a number above 0", found=rule.alpha)
        ranks, alphas = specs.setdefault(path, ([0] * n_layers, [1.0] * n_layers))
        ranks[layer], alphas[layer] = rule.rank, float(alpha or 1.0)
    targets = tuple((path, TargetSpec(tuple(r), tuple(a))) for path, (r, a) in sorted(specs.items()) if max(r) > 0)
    if not targets:
        raise NaloraError(
            "--lora.rules",
            expected="at least one adapter",
            found="rank 0 everywhere",
            remedy="give a rule a rank of 1 or more",
        )
    return AdapterSpec(targets, rslora=config.rslora, dora=config.dora, dropout=config.dropout)


def _layer_path(path: str, layer: int) -> str:
    """``layers/ffn/gate_proj`` of layer 3 -> ``layers/3/ffn/gate_proj``."""
    head, _, tail = path.partition("/")
    return f"{head}/{layer}/{tail}"


# ---------------------------------------------------------------- arithmetic


def residual(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    mask: jax.Array | None = None,
    *,
    operand: str = "float32",
) -> jax.Array:
    """The adapter's output ``s (x A) B``, and, given a mask, the gated gradient of A.

    The mask never changes the value. With ``g`` the cotangent of ``(x A) B``, it makes the backward pass return
    ``dA = x^T (g (B * mask)^T)``, so that A is shaped by the output channels that the mask keeps; dB and dx stay exact
    (masking dB would starve the preconditioner's moments, masking dx would bias the layers below).

    Args:
      x: ``[..., d_in]``.
      a: ``[d_in, r]`` float32.
      b: ``[r, d_out]`` float32.
      scale: scalar ``s``.
      mask: ``[d_out]`` weights of the output channels, or None for the plain gradient.
      operand: dtype that operands are rounded to; sums are float32.

    Returns:
      ``[..., d_out]`` float32.
    """
    chex.assert_rank([a, b], 2)
    chex.assert_equal(a.shape[1], b.shape[0])
    if mask is not None:
        chex.assert_shape(mask, (b.shape[1],))
    flat = x.reshape(-1, x.shape[-1])
    y = _residual(flat, a, b, jnp.asarray(scale, jnp.float32), mask, operand)
    return y.reshape(*x.shape[:-1], b.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _residual(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, mask: jax.Array | None, operand: str
) -> jax.Array:
    return _residual_fwd(x, a, b, scale, mask, operand)[0]


def _residual_fwd(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, mask: jax.Array | None, operand: str
) -> tuple[jax.Array, tuple[Any, ...]]:
    # The scale sits on the rank-wide factor: no pass over [tokens, d_out] for it, here or in the backward pass.
    hidden = scale * dot(x, a, operand)
    return dot(hidden, b, operand), (x, a, b, scale, mask, hidden)


def _residual_bwd(operand: str, residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    x, a, b, scale, mask, hidden = residuals
    rank = a.shape[1]
    back = scale * dot(g, beside_masked(b, mask), operand, dims=(1, 1))  # [tokens, r] or [tokens, 2 r]
    dx = dot(back[:, :rank], a, operand, dims=(1, 1)).astype(x.dtype)
    da = dot(x, back[:, -rank:], operand, dims=(0, 0))
    db = dot(hidden, g, operand, dims=(0, 0))
    return dx, da, db, jnp.zeros_like(scale), None if mask is None else jnp.zeros_like(mask)


_residual.defvjp(_residual_fwd, _residual_bwd)


def batched_residual(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float, ids: jax.Array, *, operand: str = "float32"
) -> jax.Array:
    """Each example through its own adapter of a stack, in one program.

    Args:
      x: ``[batch, seq, d_in]``.
      a: ``[n, d_in, r]``.
      b: ``[n, r, d_out]``.
      scale: scalar, common to the stack.
      ids: int ``[batch]``, the adapter of each example; -1 means none.

    Returns:
      ``[batch, seq, d_out]`` float32.
    """
    chex.assert_rank([x, a, b], 3)
    chex.assert_shape(ids, (x.shape[0],))
    chosen = jnp.maximum(ids, 0)
    on = jnp.where(ids >= 0, jnp.asarray(scale, jnp.float32), 0.0)
    # [batch, seq, r]
    hidden = jnp.einsum(
        "bsd,bdr->bsr", x.astype(operand), a[chosen].astype(operand), preferred_element_type=jnp.float32
    )
    hidden = (hidden * on[:, None, None]).astype(operand)
    return jnp.einsum("bsr,bro->bso", hidden, b[chosen].astype(operand), preferred_element_type=jnp.float32)


def column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Norm of every output channel of ``W + s A B``: float32 ``[d_out]`` (DoRA's direction).

    Computed without forming the sum: ``|w|^2 + 2 s w.(A b) + s^2 |A b|^2``, rank-wide products only.
    """
    w = kernel.astype(jnp.float32)
    s = jnp.asarray(scale, jnp.float32)
    cross = jnp.sum(dot(a, w, "float32", dims=(0, 0)) * b, axis=0)
    gram = jnp.sum(dot(dot(a, a, "float32", dims=(0, 0)), b, "float32") * b, axis=0)
    return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=0) + 2 * s * cross + s * s * gram, 0.0))


def combine(base: jax.Array, delta: jax.Array | None) -> jax.Array:
    """Base and residual added; the base itself where there is no adapter."""
    return base if delta is None else base + delta


def moved_from(delta: jax.Array, start: jax.Array) -> jax.Array:
    """``delta - start``, and 0 where that is no more than the rounding of the two."""
    moved = delta - start
    return jnp.where(jnp.abs(moved) <= 4 * jnp.finfo(delta.dtype).eps * jnp.abs(start), 0, moved)


def init_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A of a fresh adapter, ``[..., d_in, r]``: uniform in +-1/sqrt(d_in), as PEFT's Kaiming-uniform(sqrt 5) gives."""
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
