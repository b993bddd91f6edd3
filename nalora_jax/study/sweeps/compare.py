"""The comparison of a sweep's runs: one page, and one line for each run in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.heldout import describe
from nalora_jax.report.compare import render_comparison
from nalora_jax.report.history import read_history
from nalora_jax.train.run import RunResult

log = logging.getLogger(__name__)

_MOST = 7  # settings on a page


def render_page(results: Mapping[str, RunResult]) -> str:
    """Returns the comparison of runs, by their output; with too many settings for one page, of the best runs."""
    ranked = sorted(results.items(), key=lambda named: _score(named[1]), reverse=True)
    for output, result in ranked:
        log.info("%s: %s", Path(output).name, describe(result.after))
    histories = {output: read_history(result.folder) for output, result in results.items()}
    try:
        return render_comparison(list(histories.values()))
    except NaloraError:
        log.info("the comparison shows the best %d of %d runs", _MOST, len(results))
        return render_comparison([histories[output] for output, _ in ranked[:_MOST]])


def _score(result: RunResult) -> float:
    """Returns the metric of the exported adapter, higher for better."""
    after = result.after
    if "accuracy" in after:
        return float(after["accuracy"])
    return -float(after.get("loss", 0.0))
