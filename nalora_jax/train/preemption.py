"""Being asked to stop: Ctrl-C, and the SIGTERM by which schedulers announce that a machine will be taken away.

While steps run, the first signal only asks: the loop finishes its step and saves. Before and after, there is nothing to
save, and it stops at once, as a second Ctrl-C always does. In a run of several processes JAX receives SIGTERM, and all
processes agree on the step after which they stop (`jax.experimental.multihost_utils.reached_preemption_sync_point`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType

import jax
from jax.experimental import multihost_utils

from nalora_jax.errors import Interrupted


class StopSignals:
    """Whether the run was asked to stop; `nalora_jax.train.preemption.stop_signals` makes it."""

    def __init__(self) -> None:
        self._polled = False
        self._received: Signals | None = None

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within this block a signal waits until `asked` is called."""
        self._polled = True
        try:
            yield
        finally:
            self._polled = False

    @property
    def signal(self) -> Signals:
        """The signal that stopped the run."""
        return self._received or Signals.SIGTERM

    def asked(self, step: int) -> bool:
        """Whether the run has to stop after ``step``; all processes get the same answer.

        To be called after every step, by all processes.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        again = self._received is not None
        self._received = Signals(number)
        if again or not self._polled:
            raise Interrupted(self._received)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Receive SIGTERM and SIGINT while the block runs, where a program may: in the main thread of one process."""
    signals = StopSignals()
    before = {}
    # JAX's own handler of SIGTERM must stay where there are several processes; a single Ctrl-C would split them.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signals.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
