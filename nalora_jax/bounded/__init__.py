"""Strangers' programs, run where they can do no harm: in a process of its own, with a deadline and little memory.

A chat template is a program, and so is a regular expression: a file from the net may hold one that loops for ever or
asks for all memory, and neither jinja2's sandbox nor Python's ``re`` knows a limit. One helper process, started at the
first use and kept, runs them (`worker.py`); one that takes too long or too much ends with that process, and the
next use starts another. A call costs a tenth of a millisecond more than it would here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nalora_jax.bounded.worker import MEMORY

SECONDS = 6.0  # for one call; what a file's own templates and expressions need is a thousandth of it
# For all texts of one template together, of the processor's time: whoever waits for a call waits for every record's.
_TOTAL_SECONDS, _TEXT_SECONDS = 10.0, 0.05  # and for each text; real templates need a hundredth of it
_MAX_TEXT = 4_000_000  # characters of a rendered text: a million tokens
_SHORT_TEXT, _LONGER = 65_536, 32  # what every text may have, and how often the characters that it is made of
_START_SECONDS = 60.0  # for the helper process to begin, on the busiest machine
_MAX_ANSWER = 256 << 20  # bytes
# Expressions that match in time proportional to the text: names, dots, escapes and anchors, nothing repeated, and at
# most one group of alternatives; also behind "everything up to a dot".
_PLAIN = r"(?:[\w./|\-]|\\[.\-_])*"
_HARMLESS = re.compile(rf"(\(\.\*\\\.\)\?\()?\^?{_PLAIN}(?:\((?:\?:)?{_PLAIN}\){_PLAIN})?\$?(?(1)\)\$)", re.ASCII)
_FEW = 1_000_000  # pairs of an expression and a name that are matched here: at most a second


class BoundedError(Exception):
    """What went wrong, in words: the program's own error, or the limit that it exceeded."""


def render(template: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """A chat template's texts, as transformers would render them.

    Args:
      template: jinja2 source.
      variables: what the template sees, once for each text: values that JSON has, numpy's numbers and arrays among
        them. One call for several texts saves most of the calls' cost.

    Raises:
      BoundedError: the template does not compile, fails, or exceeds a limit: of the call, of a text's length, or of
        the time that all its texts took together; or a variable is no plain value.
    """
    try:
        plain = [json.dumps(one, default=_plain) for one in variables]
    except (TypeError, ValueError, RecursionError) as error:
        raise BoundedError(f"values that JSON cannot hold ({error})") from error
    return _HELPER.render(template, plain)


def matches(
    patterns: Sequence[str], names: Sequence[str], *, how: Literal["match", "fullmatch", "search"] = "match"
) -> list[list[str | None]]:
    """For every pattern and name, the match's group ``idx`` ("" without such a group), or None without a match.

    Args:
      patterns: regular expressions of Python's ``re``.
      names: texts, short and ours.
      how: the function of ``re``.

    Raises:
      BoundedError: an expression does not compile, or exceeds a limit; the text begins with the expression.
    """
    few = len(patterns) * len(names) <= _FEW
    here = [few and _HARMLESS.fullmatch(pattern) is not None for pattern in patterns]
    foreign = [pattern for pattern, harmless in zip(patterns, here, strict=True) if not harmless]
    answers = iter(_HELPER.matches(foreign, names, how) if foreign else ())
    return [
        _matched(pattern, names, how) if harmless else next(answers)
        for pattern, harmless in zip(patterns, here, strict=True)
    ]


def split(expressions: Sequence[str], text: str) -> None:
    """Splits a text by each of a tokenizer's regular expressions; one that does not compile is passed over.

    Args:
      expressions: of the tokenizers library, which are Oniguruma's.
      text: a sample.

    Raises:
      BoundedError: that exceeds a limit.
    """
    _HELPER.split(expressions, text)


def _matched(pattern: str, names: Sequence[str], how: str) -> list[str | None]:
    match = getattr(re.compile(pattern), how)
    return [None if match(name) is None else "" for name in names]


def _plain(value: Any) -> Any:
    """A value of numpy or a bytes string as JSON has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


class _Helper:
    """The helper process: one request at a time, one line of JSON each way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started it: a fork must not talk to its parent's helper
        self._template: str | None = None  # that the helper has compiled
        self._spent: dict[str, tuple[int, float]] = {}  # texts of each template, and the seconds that they took

    def render(self, template: str, variables: Sequence[str]) -> list[str]:
        """The rendered texts; ``variables`` are JSON already."""
        limits = [min(_MAX_TEXT, max(_SHORT_TEXT, _LONGER * len(one))) for one in variables]
        with self._lock:
            self._ensure_running()
            source = "null" if template == self._template else json.dumps(template)
            self._template = None  # until it is known to have compiled
            listed = ", ".join(variables)
            answer = self._ask(f'{{"render": [{listed}], "limits": {limits}, "template": {source}}}')
            self._template = template
            self.charge(template, len(variables), answer["seconds"])
            texts: list[str] = answer["texts"]
            return texts

    def charge(self, template: str, texts: int, seconds: float) -> None:
        """Notes what texts of a template took; a `BoundedError` where all of them took too long together."""
        before, spent = self._spent.get(template, (0, 0.0))
        count, total = self._spent[template] = before + texts, spent + seconds
        if total > _TOTAL_SECONDS + _TEXT_SECONDS * count:
            raise BoundedError(f"{total:.1f} seconds for {count:,} texts of one template")

    def matches(self, patterns: Sequence[str], names: Sequence[str], how: str) -> Any:
        """As `matches`, of any pattern."""
        with self._lock:
            self._ensure_running()
            return self._ask(json.dumps({"patterns": patterns, "names": names, "how": how}))

    def split(self, expressions: Sequence[str], text: str) -> None:
        """As `split`."""
        with self._lock:
            self._ensure_running()
            self._ask(json.dumps({"expressions": expressions, "text": text}))

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process, self._template = self._process, None, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        process.returncode = process.returncode or 0  # a parent's process is the parent's to wait for
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ensure_running(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.stop()
        worker = Path(__file__).with_name("worker.py")
        # Its own module search path, so that it finds the same jinja2; -P keeps this package's folder out of it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-W", "ignore", str(worker), str(SECONDS)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise BoundedError(f"no helper process ({error})") from error
        self._owner = os.getpid()
        self._read(_START_SECONDS)

    def _ask(self, request: str) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            answer = self._read(SECONDS + 1)
        except OSError as error:
            self.stop()
            raise BoundedError(f"the end of its helper process ({error})") from error
        except BaseException:  # an interrupt: its answer must not be taken for the next one's
            self.stop()
            raise
        if "error" in answer:
            raise BoundedError(answer["error"])
        return answer["answer"]

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the process; the process ends where none comes in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, deadline, parts, size = self._process.stdout.fileno(), time.monotonic() + seconds, [], 0
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, 1 << 20) if ready else b""
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n"):
                value: dict[str, Any] = json.loads(b"".join(parts))
                return value
            if not part or size > _MAX_ANSWER:
                late = time.monotonic() >= deadline - 1.5
                self.stop()
                if size > _MAX_ANSWER:
                    raise BoundedError(f"a text of more than {_MAX_ANSWER >> 20} MB")
                limits = (
                    f"more than {SECONDS:g} seconds" if late else f"a crash, or more than {MEMORY >> 20} MB of memory"
                )
                raise BoundedError(limits)


_HELPER = _Helper()
atexit.register(_HELPER.stop)
