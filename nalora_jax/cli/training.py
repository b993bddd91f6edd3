"""Fine-tuning as ``nalora train`` and `nalora_jax.run` start it: with automatic layouts and a
report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etils import epy

from nalora_jax import kinds
from nalora_jax.assembly import start
from nalora_jax.config import RunConfig
from nalora_jax.data.given import Data, Format
from nalora_jax.data.source import Source
from nalora_jax.evaluate.generate.generator import answering
from nalora_jax.planner.choice import accepted
from nalora_jax.train import cards
from nalora_jax.train.callbacks import Callback
from nalora_jax.train.run import RunResult, fine_tune

with epy.lazy_imports():
    from nalora_jax.report import html  # a run needs it at its end only


def run(
    config: RunConfig,
    *,
    data: Data | None = None,
    format: Format | None = None,
    callbacks: Sequence[Callback] = (),
    source: Mapping[str, Source] | None = None,
) -> RunResult:
    """Fine-tunes a model: settings -> data -> layout -> evaluate -> train -> evaluate -> export ->
    report.

    All processes of a multi-host run call it; the first one logs and writes.

    Args:
      config: the run's settings.
      data: records, or records by split, which replace ``config.data.dataset``; see
        `data.given.given_sources`.
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
    return fine_tune(
        config,
        kinds.run_kind(config),
        start,
        answering=answering,
        choose_layout=accepted,
        write_card=cards.write_run_card,
        write_report=lambda folder: html.write_report(folder),
        data=data,
        format=format,
        callbacks=callbacks,
        source=source,
    )
