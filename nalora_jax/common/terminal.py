"""Keeps a process alive when its terminal, pipe or ssh connection ends first.

A dropped connection sends SIGHUP and makes every later write to standard output or error fail:
with EIO on a terminal, EPIPE on a pipe. A service manager may also start a process with these
streams closed (``>&-``).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Errors of a write to a stream whose other end is closed for good.
_NAMES = ("EPIPE", "EBADF", "EIO", "ENXIO", "ECONNRESET", "ENOTCONN", "ESHUTDOWN")
_GONE = {getattr(errno, name) for name in _NAMES}


def open_closed_streams() -> None:
    """Opens the null device for each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next file or socket gets the number, and a message to standard error is written
    into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free number: this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        # Python's mark of a stream that was closed when it started
        if getattr(sys, name) is None:
            mode = "w"
            if name == "stdin":
                mode = "r"
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def silence(stream: TextIO) -> None:
    """Redirects a stream's descriptor to the null device, for C++ and for buffered text."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, stream.fileno())
        os.close(null)


class LastingStream:
    """A text stream whose writes cannot fail.

    Once the other end is gone, they go to the null device.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes ``text``, or drops it."""
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each of ``lines``, or drops it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the text that is still in a buffer, or drops it."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *args: Any) -> None:
        """Calls ``action``, and drops its text if the stream cannot take it."""
        try:
            action(*args)
        except OSError as error:
            # For other reasons, for example a full disk, later writes may work again.
            if error.errno in _GONE:
                silence(self._stream)
        except ValueError:  # a stream that was closed in Python
            if not self._stream.closed:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def replace_streams(*names: str) -> Iterator[None]:
    """Replaces streams of `sys` ("stdout", "stderr") by `LastingStream` for the block."""
    before = {name: getattr(sys, name) for name in names}
    within = {name: _make_lasting(stream) for name, stream in before.items()}
    for name, stream in within.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in within.items():
            if stream is not None:
                # Here a failure is no error; at the process's end it would set the exit status.
                stream.flush()
            # A program may have replaced it meanwhile.
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def _make_lasting(stream: Any) -> Any:
    """Returns a stream of `sys` as a `LastingStream`; None if there is no stream."""
    if isinstance(stream, LastingStream | None):
        return stream
    return LastingStream(stream)


@contextmanager
def outlive_terminal() -> Iterator[None]:
    """Ignores SIGHUP for the block, as ``nohup`` does, and lets standard streams be closed.

    A handler that a program has set for SIGHUP stays.
    """
    # Only the main thread can set handlers, and Windows has no SIGHUP.
    usable = (
        hasattr(signal, "SIGHUP")
        and threading.current_thread() is threading.main_thread()
    )
    ignores = usable and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    if ignores:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with replace_streams("stdout", "stderr"):
            yield
    finally:
        if ignores:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
