"""Converts the result of AdaLoRA to plain LoRA, with a separate rank for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.models.targets import AdapterSpec, TargetSpec, scale_divisor


def remaining_ranks(lora: Mapping[str, Any], spec: AdapterSpec) -> tuple[dict[str, Any], AdapterSpec]:
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
    leaves, targets = flatten(lora), []
    for path, target in spec.targets:
        a, b, singular = (np.asarray(leaves.pop(f"{path}/{name}")) for name in ("a", "b", "singular"))
        nonzero = singular != 0
        ranks = tuple(int(layer.sum(-1).max()) for layer in nonzero)
        if not max(ranks):
            continue
        # Remaining ranks first, then zeros.
        first = np.argsort(~nonzero, axis=-1, kind="stable")[..., : max(ranks)]
        leaves[f"{path}/a"] = np.take_along_axis(a * singular[..., None, :], first[..., None, :], axis=-1)
        rows = np.take_along_axis(b * nonzero[..., None], first[..., None], axis=-2)
        leaves[f"{path}/b"] = rows
        shares = [rank / max(before, 1) for rank, before in zip(ranks, target.ranks, strict=True)]
        falls = [scale_divisor(share, rslora=spec.rslora) for share in shares]
        alphas = tuple(alpha * fall or 1.0 for alpha, fall in zip(target.alphas, falls, strict=True))
        targets.append((path, TargetSpec(ranks, alphas)))
    plain = AdapterSpec(
        tuple(targets),
        rslora=spec.rslora,
        dropout=spec.dropout,
        saved=spec.saved,
        token_indices=spec.token_indices,
    )
    return unflatten(leaves), plain
