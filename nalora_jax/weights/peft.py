"""PEFT adapter files: export, import, and the proof that what was written is what was meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig, depths
from nalora_jax.models.targets import ROWS, TABLES, AdapterSpec
from nalora_jax.trees import flatten
from nalora_jax.weights.peft_modules import ModuleAdapter, ModuleLayout, compact
from nalora_jax.weights.peft_read import import_adapter
from nalora_jax.weights.peft_write import export_adapter, layer_adapter

__all__ = ["export_adapter", "import_adapter", "max_logit_difference", "verify_export"]

# Folding a scale into B rounds every entry once, and reading it back once more.
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
    """Reads an exported adapter back and compares it with the tree that it came from, factor by factor.

    A must be equal bit for bit, and so must B, the scale and the magnitude unless a scale was folded into B; then
    ``scale * B`` must agree to float32's rounding. Padding and ranks without effect do not count.

    Returns:
      The largest relative difference of ``scale * B`` over all layers; 0.0 where nothing was folded.

    Raises:
      NaloraError: the file cannot be read, or differs; the message names the projection and the layer.
    """
    loaded, loaded_spec = import_adapter(folder, config, fingerprint=fingerprint, layout=layout)
    ours, theirs = flatten(lora), flatten(loaded)
    worst = 0.0
    if loaded_spec.token_indices != spec.token_indices:
        raise _differs(folder, "trainable_token_indices")
    for name in sorted({*spec.saved, *loaded_spec.saved, *dict(spec.token_indices)}):
        for path in (TABLES[name], ROWS[name]):
            trained, read = (np.asarray(leaves.get(path, 0.0), np.float32) for leaves in (ours, theirs))
            if not np.array_equal(trained, read):
                raise _differs(folder, name)
    for path in sorted({path for path, _ in (*spec.targets, *loaded_spec.targets)}):
        for layer in range(depths(config)[path]):
            meant = layer_adapter(ours, spec, path, layer)
            found = layer_adapter(theirs, loaded_spec, path, layer)
            worst = max(worst, _difference(folder, f"{path}, layer {layer}", meant, found))
    return worst


def _difference(folder: str | Path, place: str, meant: ModuleAdapter | None, found: ModuleAdapter | None) -> float:
    """Relative difference of ``scale * B``; raises above the tolerance, or where A or the magnitude differ at all."""
    a, b = (_effective(adapter) for adapter in (meant, found))
    if a is None or b is None:
        same, difference = a is None and b is None, 0.0
    else:
        same = a.b.shape == b.b.shape and np.array_equal(a.a, b.a) and _same(a.magnitude, b.magnitude)
        difference = _relative(a, b) if same else 1.0
    if not same or difference > _FOLD_TOLERANCE:
        raise _differs(folder, place)
    return difference


def _differs(folder: str | Path, place: str) -> NaloraError:
    return NaloraError(
        f"{folder}: {place}",
        expected="the adapter that was exported",
        found="another one on reading it back",
        remedy="do not use these files; please report this as a bug, with the adapter's configuration",
    )


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _effective(adapter: ModuleAdapter | None) -> ModuleAdapter | None:
    """The adapter's ranks that act; None where none does and there is no magnitude either."""
    if adapter is None:
        return None
    live = compact(adapter)
    return live if live.rank or live.magnitude is not None else None


def _relative(a: ModuleAdapter, b: ModuleAdapter) -> float:
    if a.scale == b.scale and np.array_equal(a.b, b.b):
        return 0.0
    first, second = (adapter.scale * adapter.b.astype(np.float64) for adapter in (a, b))
    return float(np.max(np.abs(first - second) / np.maximum(np.abs(first), np.finfo(np.float32).tiny), initial=0.0))


def max_logit_difference(first: Callable[[Any], Any], second: Callable[[Any], Any], tokens: Any) -> float:
    """Largest absolute difference of two models' logits, in units of the largest absolute logit.

    Args:
      first: tokens -> logits ``[..., vocab]``, e.g. the base with the trained adapter.
      second: the same for what was written: the imported adapter, or the merged weights.
      tokens: what both are given, e.g. int32 ``[batch, seq]``.
    """
    a, b = (np.asarray(model(tokens), np.float64) for model in (first, second))
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), np.finfo(np.float32).tiny))
