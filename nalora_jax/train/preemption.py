"""Stop requests: Ctrl-C, and SIGTERM, which schedulers send before they reclaim a machine.

During training steps, the first signal is a request: the loop finishes its step and saves. Before
and after the steps there is no state to save, and a signal stops the process at once.

Further signals do not cut the save short: systemd signals every process of a session, and a
supervisor forwards its own, so one request may arrive twice. Only a second Ctrl-C on the terminal,
or a signal 30 seconds after the first, stops the process at once. In a run of several processes JAX
receives SIGTERM, and all processes agree on the step after which they stop
(`jax.experimental.multihost_utils.reached_preemption_sync_point`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType

import jax
from jax.experimental import multihost_utils

from nalora_jax.errors import Interrupted

# Seconds after the first signal in which another one is taken for the same request.
_PATIENCE = 30.0


class StopSignals:
    """Stop requests that a run received, from `stop_signals`."""

    def __init__(self) -> None:
        self._polled = False
        self._received: Signals | None = None
        self._since = 0.0  # time of the first signal

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Defers signals within this block until `asked` is called."""
        self._polled = True
        try:
            yield
        finally:
            self._polled = False

    @property
    def signal(self) -> Signals:
        """Returns the signal that stopped the run."""
        return self._received or Signals.SIGTERM

    def asked(self, step: int) -> bool:
        """Returns True if the run has to stop after ``step``; all processes return the same value.

        All processes must call it after every step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: raises `Interrupted` outside of the steps; during them, `asked` returns
        True.

        A second signal raises at once if it is a Ctrl-C that follows a Ctrl-C, or comes after 30 s.
        """
        if self._received is None:
            self._received, self._since = Signals(number), time.monotonic()
            if not self._polled:
                raise Interrupted(self._received)
            return
        # Other repetitions may be the same request, forwarded by a supervisor.
        second_ctrl_c = number == self._received == signal.SIGINT and is_in_foreground()
        if second_ctrl_c or time.monotonic() - self._since >= _PATIENCE:
            raise Interrupted(Signals(number))


def is_in_foreground() -> bool:
    """Returns True if a Ctrl-C on the terminal reaches this process; False without a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handles SIGTERM and SIGINT within the block, in the main thread of a single-process run."""
    signals = StopSignals()
    before = {}
    # Several processes need JAX's handler of SIGTERM, and a Ctrl-C that reaches one process would
    # stop only that one.
    if (
        jax.process_count() == 1
        and threading.current_thread() is threading.main_thread()
    ):
        before = {
            number: signal.signal(number, signals.receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
