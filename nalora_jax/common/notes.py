"""Log messages and progress reports on standard error, as text or as JSON.

With ``NALORA_LOG_FORMAT=json`` in the environment (``--log-format json`` sets it) every line is
one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nalora_jax.common.redaction import redact
from nalora_jax.errors import bounded_text

LOG_FORMAT = "NALORA_LOG_FORMAT"
EVERY = 10.0  # seconds between log lines about the same work if no listener shows its progress

log = logging.getLogger(__name__)

# Receives the description of the work, the amount done, and the total (None: unknown).
Listener = Callable[[str, int, int | None], None]
_listeners: list[Listener] = []


def writes_json() -> bool:
    """Returns True if lines are JSON objects."""
    return os.environ.get(LOG_FORMAT) == "json"


class _Bounded(logging.Formatter):
    """Limits messages, which quote files, to 2 kB like errors, and removes secrets.

    Tracebacks are not cut.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return bounded_text(redact(super().formatMessage(record)))


class StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, which a progress bar may have replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Bounded())

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line for a record."""
        line = self.format(record)
        if writes_json():
            line = json.dumps(
                {"time": record.created, "level": record.levelname, "message": line}
            )
        print(line, file=sys.stderr)


def log_to_stderr() -> None:
    """Prints the library's log to standard error, unless the program has configured a handler."""
    logger = logging.getLogger("nalora_jax")
    if not logger.handlers:
        logger.addHandler(StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


@contextmanager
def pass_progress_to(listener: Listener) -> Iterator[None]:
    """Passes the progress of `count_progress` to ``listener`` instead of the log."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def count_progress(
    what: str, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Reports the progress of some work; yields a function that adds to the amount done.

    Example:
      >>> with count_progress("tokenizing", len(texts)) as done:
      ...     for text in texts:
      ...         encode(text)
      ...         done(1)
    """
    last_shown = time.monotonic()
    count = 0

    def add(more: int) -> None:
        """Adds to the amount done, and shows it: to a listener, or now and then in the log."""
        nonlocal count, last_shown
        count += more
        if _listeners:
            _listeners[-1](what, count, total)
        elif time.monotonic() - last_shown >= EVERY:
            last_shown = time.monotonic()
            log.info("%s", progress_text(what, count, total))

    if _listeners:
        _listeners[-1](what, 0, total)
    yield add


def progress_text(what: str, count: int, total: int | None) -> str:
    """Formats progress: ``tokenizing 120/400``, or the known part of it."""
    if total is not None:
        return f"{what} {count:,}/{total:,}"
    if count:
        return f"{what} {count:,}"
    return f"{what} ..."
