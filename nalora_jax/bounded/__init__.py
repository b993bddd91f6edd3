"""Runs untrusted programs, chat templates and regular expressions, in a helper process with limits.

A downloaded template may loop forever or allocate all memory, and a regular expression may
backtrack forever; jinja2's sandbox and Python's ``re`` have no limits. A helper process
(`worker.py`), started at the first use, runs both with a deadline and little memory. A program that
exceeds a limit ends the process, and the next call starts another one. A call takes 0.1 ms longer
than in this process.
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

SECONDS = 6.0  # for a call; templates and expressions of real models need a thousandth of it
# Limit of the processor time of all texts of a template, since a data set renders every record:
# fixed, and per text. Templates of real models need a hundredth of it.
_TOTAL_SECONDS, _TEXT_SECONDS = 10.0, 0.05
_MAX_TEXT = 4_000_000  # characters of a rendered text: a million tokens
_SHORT_TEXT, _LONGER = 65_536, 32  # limit of short texts, and limit per character of variables
_START_SECONDS = 60.0  # for the helper process to start on a busy machine
_MAX_ANSWER = 256 << 20  # bytes
# Expressions that match in time proportional to the text: names, dots, escapes and anchors without
# repetition, and at most one group of alternatives; also after ".*\\.".
_PLAIN = r"(?:[\w./|\-]|\\[.\-_])*"
_HARMLESS = re.compile(
    rf"(\(\.\*\\\.\)\?\()?\^?{_PLAIN}(?:\((?:\?:)?{_PLAIN}\){_PLAIN})?\$?(?(1)\)\$)", re.ASCII
)
_FEW = 1_000_000  # pairs of an expression and a name that are matched in this process: at most a second


class BoundedError(Exception):
    """A program's error, or the limit that it exceeded."""


def render(template: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Renders a chat template as transformers does.

    Args:
      template: jinja2 source.
      variables: variables of the template for each text: JSON values, and NumPy's numbers and
        arrays. One call for several texts saves most of the overhead.

    Raises:
      BoundedError: the template does not compile, fails, or exceeds a limit (time of the call,
        length of a text, time of all its texts); or a variable is not a JSON value.
    """
    try:
        plain = [json.dumps(variable, default=_plain) for variable in variables]
    except (TypeError, ValueError, RecursionError) as error:
        raise BoundedError(f"values that JSON cannot hold ({error})") from error
    return _HELPER.render(template, plain)


def matches(
    patterns: Sequence[str],
    names: Sequence[str],
    *,
    how: Literal["match", "fullmatch", "search"] = "match",
) -> list[list[str | None]]:
    """Returns, for every pattern and name, the match's group ``idx`` ("" without such a group), or None.

    Args:
      patterns: regular expressions of Python's ``re``.
      names: short texts of this library.
      how: the function of ``re``.

    Raises:
      BoundedError: an expression does not compile, or exceeds a limit; the message starts with the expression.
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
    """Splits a text by each of a tokenizer's regular expressions, and skips those that do not compile.

    Args:
      expressions: of the tokenizers library, which are Oniguruma's.
      text: a sample.

    Raises:
      BoundedError: the split exceeds a limit.
    """
    _HELPER.split(expressions, text)


def _matched(pattern: str, names: Sequence[str], how: str) -> list[str | None]:
    match = getattr(re.compile(pattern), how)
    return [None if match(name) is None else "" for name in names]


def _plain(value: Any) -> Any:
    """Returns a NumPy value or bytes as a JSON value."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


class _Helper:
    """The helper process: one request at a time, one line of JSON in each direction."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of its parent process: a fork must not use its parent's helper
        self._template: str | None = None  # compiled in the helper
        self._spent: dict[str, tuple[int, float]] = {}  # number of texts and seconds, by template

    def render(self, template: str, variables: Sequence[str]) -> list[str]:
        """Returns the rendered texts; ``variables`` are JSON texts."""
        limits = [min(_MAX_TEXT, max(_SHORT_TEXT, _LONGER * len(variable))) for variable in variables]
        with self._lock:
            self._ensure_running()
            source = "null"
            if template != self._template:
                source = json.dumps(template)
            self._template = None  # until it has compiled
            listed = ", ".join(variables)
            answer = self._ask(f'{{"render": [{listed}], "limits": {limits}, "template": {source}}}')
            self._template = template
            self.charge(template, len(variables), answer["seconds"])
            texts: list[str] = answer["texts"]
            return texts

    def charge(self, template: str, texts: int, seconds: float) -> None:
        """Adds up the time of a template's texts; raises a `BoundedError` above the limit."""
        before, spent = self._spent.get(template, (0, 0.0))
        count, total = self._spent[template] = before + texts, spent + seconds
        if total > _TOTAL_SECONDS + _TEXT_SECONDS * count:
            raise BoundedError(f"{total:.1f} seconds for {count:,} texts of one template")

    def matches(self, patterns: Sequence[str], names: Sequence[str], how: str) -> Any:
        """Matches any patterns; see `bounded.matches`."""
        with self._lock:
            self._ensure_running()
            return self._ask(json.dumps({"patterns": patterns, "names": names, "how": how}))

    def split(self, expressions: Sequence[str], text: str) -> None:
        """Splits a text; see `bounded.split`."""
        with self._lock:
            self._ensure_running()
            self._ask(json.dumps({"expressions": expressions, "text": text}))

    def stop(self) -> None:
        """Ends the process, if there is one."""
        process, self._process, self._template = self._process, None, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        process.returncode = process.returncode or 0  # only its parent can wait for a process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ensure_running(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.stop()
        worker = Path(__file__).with_name("worker.py")
        # The module search path of this process, so that it finds the same jinja2; -P
        # leaves this folder out.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-W", "ignore", str(worker), str(SECONDS)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
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
        except BaseException:  # an interrupt: the next request must not read this answer
            self.stop()
            raise
        if "error" in answer:
            raise BoundedError(answer["error"])
        return answer["answer"]

    def _read(self, seconds: float) -> dict[str, Any]:
        """Returns the next line of the process, or ends the process if none comes in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        parts, size = [], 0
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe, 1 << 20) if ready else b""
            parts.append(piece)
            size += len(piece)
            if piece.endswith(b"\n"):
                value: dict[str, Any] = json.loads(b"".join(parts))
                return value
            if not piece or size > _MAX_ANSWER:
                reason = f"a crash, or more than {MEMORY >> 20} MB of memory"
                if time.monotonic() >= deadline - 1.5:
                    reason = f"more than {SECONDS:g} seconds"
                if size > _MAX_ANSWER:
                    reason = f"a text of more than {_MAX_ANSWER >> 20} MB"
                self.stop()
                raise BoundedError(reason)


_HELPER = _Helper()
atexit.register(_HELPER.stop)
