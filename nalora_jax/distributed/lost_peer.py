"""What a process of a multi-host run writes to standard error, without the C++ trace at the end of a lost peer.

A program of its own that imports nothing but the standard library: it reads the other's standard error as its input and
passes it on as it comes. From the line on in which JAX's coordination service gives up, nothing is passed on; once the
other process has ended, one line says why.
"""

from __future__ import annotations

import contextlib
import os
import re

# Log lines of C++: level, date, time, thread, then file and line.
_CPP = re.compile(rb"[EFIW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.-]+):\d+\]")
_SERVICE = (b"coordination", b"distributed_runtime", b"client.h", b"client.cc", b"service.cc")
ERROR = b"error: "  # how a line begins that says why a process ends
END = b"\0end\n"  # the last line of a process that ends in good order
LINE = (
    b"error: the other processes: expected all of them to go on, found that one is gone (no heartbeat or no "
    b"connection); its own log says why; start all of them again with --resume\n"
)


def main(source: int = 0, target: int = 2) -> None:
    """Copy ``source`` to ``target``, two file descriptors, until it ends."""
    lost, told, begun, head = False, False, b"", b""  # head: how a line began whose first part was passed on
    while piece := os.read(source, 1 << 16):
        *lines, begun = (begun + piece).split(b"\n")
        for line in lines:
            lost = lost or fatal(line)
            if line.endswith(END.rstrip()):
                _pass_on(target, line.removesuffix(END.rstrip()))
                return
            if not lost:
                _pass_on(target, line + b"\n")
                told = told or (head + line).startswith(ERROR)
            head = b""
        if not lost and begun and begun[:1] not in b"EFIW\0":  # a prompt or a progress bar: do not wait for its end
            _pass_on(target, begun)
            head, begun = (head + begun)[: len(ERROR)], b""
    if not lost:
        _pass_on(target, begun)
    elif not told and head != ERROR:
        _pass_on(target, LINE)


def _pass_on(target: int, data: bytes) -> None:
    """Writes ``data``, or drops it after a dropped connection: the source must be read to its end."""
    with contextlib.suppress(OSError):
        os.write(target, data)


def fatal(line: bytes) -> bool:
    """Whether JAX's coordination service reports here that the group is broken."""
    match = _CPP.match(line)
    return match is not None and line[:1] in b"EF" and any(name in match[1] for name in _SERVICE)


if __name__ == "__main__":
    main()
