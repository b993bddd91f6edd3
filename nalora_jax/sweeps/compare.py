"""The comparison of a sweep's runs: one page, and one line for each run in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.heldout import describe
from nalora_jax.report.compare import write_comparison
from nalora_jax.running import RunResult

log = logging.getLogger(__name__)

_MOST = 7  # settings on a page


def write_page(results: Sequence[RunResult], page: Path) -> None:
    """Writes the comparison; with too many settings for one page, of the best runs."""
    ranked = sorted(results, key=_score, reverse=True)
    for result in ranked:
        log.info("%s: %s", result.folder.name, describe(result.after))
    try:
        write_comparison([result.folder for result in results], page)
    except NaloraError:
        log.info("the comparison shows the best %d of %d runs", _MOST, len(results))
        write_comparison([result.folder for result in ranked[:_MOST]], page)


def _score(result: RunResult) -> float:
    """Returns the metric of the exported adapter, higher for better."""
    after = result.after
    if "accuracy" in after:
        return float(after["accuracy"])
    return -float(after.get("loss", 0.0))
