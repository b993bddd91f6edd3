"""The callback that writes the report of a run."""

from __future__ import annotations

import logging
from typing import ClassVar

from etils import epy

from nalora_jax.train.callbacks import Callback, Ended, Started

with epy.lazy_imports():
    from nalora_jax.report import html  # a run needs it at its end only

log = logging.getLogger(__name__)


class ReportWriter(Callback):
    """Writes report.html into a run's folder when the run ends."""

    required: ClassVar[bool] = True

    def on_start(self, started: Started) -> None:
        """Remembers the folder."""
        self._folder = started.folder

    def on_end(self, ended: Ended) -> None:
        """Writes the report, unless the run was aborted."""
        if not ended.message:
            log.info("report: %s", html.write_report(self._folder))
