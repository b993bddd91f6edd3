"""Exports and imports PEFT adapter files, and verifies exports by reloading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths
from nalora_jax.models.targets import ROWS, TABLES, AdapterSpec
from nalora_jax.weights.peft_modules import ModuleAdapter, ModuleLayout, compact, same_array
from nalora_jax.weights.peft_read import import_adapter
from nalora_jax.weights.peft_write import export_adapter, layer_adapter

__all__ = ["export_adapter", "import_adapter", "max_logit_difference", "verify_export"]

# Folding a scale into B rounds every entry once, and so does reading it back.
_FOLD_TOLERANCE = 2.0**-21


def verify_export(
    folder: str | Path,
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: ModelConfig,
    *,
    fingerprint: str | None = None,
    layout: ModuleLayout | None = None,
) -> float:
    """Reads an exported adapter back and compares it with the original tree, factor by factor.

    A must be equal bit for bit, and so must B, the scale and the magnitude unless a scale was
    folded into B; then ``scale * B`` must agree to float32's rounding. Padding and ranks without
    effect are ignored.

    Returns:
      The largest relative difference of ``scale * B`` over all layers; 0.0 if no scale was folded.

    Raises:
      NaloraError: the file cannot be read, or differs; the message names the projection and the
        layer.
    """
    loaded, loaded_spec = import_adapter(folder, config, fingerprint=fingerprint, layout=layout)
    ours, theirs = flatten(lora), flatten(loaded)
    worst = 0.0
    if loaded_spec.token_indices != spec.token_indices:
        raise differs(folder, "trainable_token_indices")
    for name in sorted({*spec.saved, *loaded_spec.saved, *dict(spec.token_indices)}):
        for path in (TABLES[name], ROWS[name]):
            trained, read = (np.asarray(leaves.get(path, 0.0), np.float32) for leaves in (ours, theirs))
            if not np.array_equal(trained, read):
                raise differs(folder, name)
    for path in sorted({path for path, _ in (*spec.targets, *loaded_spec.targets)}):
        for layer in range(depths(config)[path]):
            meant = layer_adapter(ours, spec, path, layer)
            reloaded = layer_adapter(theirs, loaded_spec, path, layer)
            worst = max(worst, difference_of(folder, f"{path}, layer {layer}", meant, reloaded))
    return worst


def difference_of(
    folder: str | Path,
    place: str,
    meant: ModuleAdapter | None,
    reloaded: ModuleAdapter | None,
    tolerance: float = _FOLD_TOLERANCE,
) -> float:
    """Returns the relative difference of ``scale * B`` of a projection in one layer.

    Raises:
      NaloraError: it is above the tolerance, or A or the magnitude differ.
    """
    a, b = (_effective(adapter) for adapter in (meant, reloaded))
    if a is None and b is None:
        return 0.0
    if a is None or b is None or a.b.shape != b.b.shape:
        raise differs(folder, place)
    difference = _relative(a, b)
    same = np.array_equal(a.a, b.a) and same_array(a.magnitude, b.magnitude)
    if not same or difference > tolerance:
        raise differs(folder, place)
    return difference


def differs(folder: str | Path, place: str) -> NaloraError:
    """Returns the error for a file that differs from the exported adapter."""
    return NaloraError(
        f"{folder}: {place}",
        expected="the adapter that was exported",
        found="another one on reading it back",
        remedy="do not use these files; please report this as a bug, with the adapter's configuration",
    )


def _effective(adapter: ModuleAdapter | None) -> ModuleAdapter | None:
    """Returns the adapter without ranks that have no effect; None if it has no effect at all."""
    if adapter is None:
        return None
    live = compact(adapter)
    if live.rank or live.magnitude is not None:
        return live
    return None


def _relative(a: ModuleAdapter, b: ModuleAdapter) -> float:
    if a.scale == b.scale and np.array_equal(a.b, b.b):
        return 0.0
    first, second = (adapter.scale * adapter.b.astype(np.float64) for adapter in (a, b))
    return float(
        np.max(
            np.abs(first - second) / np.maximum(np.abs(first), np.finfo(np.float32).tiny),
            initial=0.0,
        )
    )


def max_logit_difference(first: Callable[[Any], Any], second: Callable[[Any], Any], tokens: Any) -> float:
    """Returns the largest difference of two models' logits, relative to the largest logit.

    Args:
      first: tokens -> logits ``[..., vocab]``, e.g. the base with the trained adapter.
      second: the same for the written model: the imported adapter, or the merged weights.
      tokens: input of both models, e.g. int32 ``[batch, seq]``.
    """
    a, b = (np.asarray(model(tokens), np.float64) for model in (first, second))
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), np.finfo(np.float32).tiny))
