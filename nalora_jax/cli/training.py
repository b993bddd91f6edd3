"""Fine-tuning as ``nalora train`` and `nalora_jax.run` start it: with automatic layouts and a
report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nalora_jax.config import RunConfig
from nalora_jax.data.given import Data, RecordFormat
from nalora_jax.data.source import Source
from nalora_jax.report.writer import ReportWriter
from nalora_jax.train.callbacks import Callback
from nalora_jax.train.cards import CardWriter
from nalora_jax.train.run import RunResult, fine_tune


def run(
    config: RunConfig,
    *,
    data: Data | None = None,
    format: RecordFormat | None = None,
    callbacks: Sequence[Callback] = (),
    source: Mapping[str, Source] | None = None,
) -> RunResult:
    """Fine-tunes a model: settings -> data -> layout -> evaluate -> train -> evaluate -> export ->
    report.

    All processes of a multi-host run call it; the first one logs and writes.

    Args:
      config: the run's settings.
      data: records, or records by split, which replace ``config.data.dataset``; see
        `data.given.resolve_sources`.
      format: converts each record to an example, or to None to leave it out.
      callbacks: callbacks for log steps, evaluations and checkpoints, in addition to the
        config's.
      source: sources by split (``{"train": ..., "validation": ...}``), which replace
        ``config.data.dataset``.

    Raises:
      NaloraError: bad settings, files or data; files of an earlier run are not changed.
      TrainingDivergedError: the loss or the state is no longer finite; the last good checkpoint is
        kept.
      Interrupted: Ctrl-C or SIGTERM; the last completed step, if any, is saved.
    """
    around = [CardWriter(), ReportWriter(), *callbacks]
    return fine_tune(config, around, data=data, format=format, source=source)
