"""The report's table of needle retrieval, from a run's ``needle.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_jax.errors import NaloraError

FILE = "needle.json"


def read_needle(folder: Path) -> list[dict[str, Any]]:
    """Returns the tables before and after training, for the page; empty without results.

    Each has ``title``, ``heads`` and ``rows`` of texts.

    Raises:
      NaloraError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        grids = json.loads(path.read_text(encoding="utf-8"))
        return [_table(name, grids[name]) for name in ("before", "after")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "delete it, or run nalora eval --needle again"
        raise NaloraError(
            str(path), expected="results of nalora eval --needle", found=error, remedy=remedy
        ) from error


def _table(name: str, grid: Mapping[str, Any]) -> dict[str, Any]:
    interval = f"95% interval {grid['low']:.3f} to {grid['high']:.3f}, {grid['n']} questions"
    return {
        "title": f"{name.capitalize()}: {grid['accuracy']:.3f} ({interval})",
        "heads": [*(f"depth {depth}%" for depth in grid["depths"]), "all"],
        "rows": [
            (f"{row['length']:,} tokens", [f"{cell:.2f}" for cell in (*row["cells"], row["accuracy"])])
            for row in grid["rows"]
        ],
    }
