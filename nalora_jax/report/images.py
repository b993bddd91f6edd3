"""Report sections of image runs: pictures, confusion matrices, layers by tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nalora_jax.report.history import History

_PICTURE = "data:image/png;base64,"


def picture(sample: Mapping[str, Any]) -> str:
    """Returns a sample's picture as a data URL, or "" for any other text from the log."""
    image = sample.get("image")
    if isinstance(image, str) and image.startswith(_PICTURE):
        return image
    return ""


def confusions(history: History) -> list[tuple[str, dict[str, Any]]]:
    """Returns the confusion matrices before and after training.

    Example: ``("before", {"classes": [...], "rows": ...})``.
    """
    rows = []
    for label, record in (("before", history.initial), ("after", history.final)):
        values = record.get("eval", {})
        names, matrix = values.get("classes"), values.get("confusion")
        if names and matrix:
            rows.append((label, {"classes": names, "rows": list(zip(names, matrix, strict=False))}))
    return rows


def layer_labels(history: History, count: int) -> list[str]:
    """Returns the row names of per-layer tables: numbers, with the tower's name for two towers."""
    towers: Mapping[str, int] = next(
        (record["towers"] for record in reversed(history.steps) if record.get("towers")), {}
    )
    labels = [f"{name} {i}" for name, rows in towers.items() for i in range(int(rows))]
    if len(labels) == count:
        return labels
    return [str(i) for i in range(count)]
