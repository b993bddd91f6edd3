"""Filter of a multi-host process's standard error that removes the C++ trace after a lost peer.

It runs as a separate program that imports only the standard library. It reads the other program's
standard error as its input and copies it as it arrives. Starting at the line in which JAX's
coordination service gives up, it copies no more; once the other program has ended, it prints one
line with the reason.
"""

from __future__ import annotations

import contextlib
import os
import re

# Log lines of C++: level, date, time, thread, then file and line.
_CPP = re.compile(rb"[EFIW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.-]+):\d+\]")
_SERVICE = (b"coordination", b"distributed_runtime", b"client.h", b"client.cc", b"service.cc")
ERROR = b"error: "  # start of a line with the reason for a process's end
END = b"\0end\n"  # last line of a process that ends normally
LINE = (
    b"error: the other processes: expected all of them to go on, found that one is gone (no heartbeat or no "
    b"connection); its own log says why; start all of them again with --resume\n"
)


def main(source: int = 0, target: int = 2) -> None:
    """Copies ``source`` to ``target``, two file descriptors, until the source ends."""
    lost, reported, begun, head = False, False, b"", b""  # head: start of a line that is partly copied
    while piece := os.read(source, 1 << 16):
        *lines, begun = (begun + piece).split(b"\n")
        for line in lines:
            lost = lost or fatal(line)
            if line.endswith(END.rstrip()):
                _pass_on(target, line.removesuffix(END.rstrip()))
                return
            if not lost:
                _pass_on(target, line + b"\n")
                reported = reported or (head + line).startswith(ERROR)
            head = b""
        # A line without its end may be a prompt or a progress bar, which must appear at once.
        if not lost and begun and begun[:1] not in b"EFIW\0":
            _pass_on(target, begun)
            head, begun = (head + begun)[: len(ERROR)], b""
    if not lost:
        _pass_on(target, begun)
    elif not reported and head != ERROR:
        _pass_on(target, LINE)


def _pass_on(target: int, data: bytes) -> None:
    """Writes ``data``, or drops it if the target is closed: the source must be read to its end."""
    with contextlib.suppress(OSError):
        os.write(target, data)


def fatal(line: bytes) -> bool:
    """Returns True if the line is JAX's coordination service reporting that the group is broken."""
    match = _CPP.match(line)
    return match is not None and line[:1] in b"EF" and any(name in match[1] for name in _SERVICE)


if __name__ == "__main__":
    main()
