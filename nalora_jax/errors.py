"""The error types of the library's public interface."""

from __future__ import annotations

import re
from signal import Signals

# Limit of a message in bytes; it may quote a file of any size.
MAX_MESSAGE = 2000
# Characters that act on a terminal instead of being shown: controls (ESC, BEL, NUL), line
# separators, and marks that change the direction of the text after them. Newlines and tabs stay.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


class NaloraError(ValueError):
    """Reports bad input in one sentence that a user can act on.

    Args:
      where: the file, flag or field that is wrong, e.g. ``"adapter_config.json: r"``.
      expected: a description of the accepted values.
      found: the value in its place.
      remedy: advice.

    Example:
      >>> expected = "a number in [0, 1)"
      >>> raise NaloraError("--lora.dropout", expected=expected, found=1, remedy="use e.g. 0.5")
      NaloraError: --lora.dropout: expected a number in [0, 1), found 1; use e.g. 0.5

    A message has at most 2 kB: longer parts lose their middle. Control characters are escaped. The
    command line prints it without a traceback and exits with status 2.
    """

    def __init__(
        self, where: str, *, expected: object, found: object, remedy: str = ""
    ) -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        place, expectation, actual, advice = _bounded(
            [_text(text) for text in (where, expected, found, remedy)]
        )
        message = f"{place}: expected {expectation}, found {actual}"
        super().__init__("; ".join(filter(None, (message, advice))))


class ListedError(NaloraError):
    """Reports several errors, one a line; the command line keeps the lines."""


class TrainingDivergedError(NaloraError):
    """The loss, an adapter or a moment became NaN or infinite; the checkpoints of earlier steps are
    kept."""


class LostPeerError(NaloraError):
    """Another process of a multi-host run ended; the command line exits with `status`, which
    schedulers restart."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Interrupted(KeyboardInterrupt):
    """The user (Ctrl-C) or the system (SIGTERM) stopped the run.

    Args:
      signal: SIGINT or SIGTERM.
      saved: step of the checkpoint that the signal caused; None if no checkpoint was written.
      resume: advice on resuming, for the message.

    Attributes:
      status: the process's exit status, 128 + the signal's number by convention (130, 143), after
        which schedulers restart a process.
    """

    def __init__(
        self, signal: Signals, saved: int | None = None, resume: str = ""
    ) -> None:
        self.signal = signal
        self.saved = saved
        self.resume = resume
        self.status = 128 + int(signal)
        parts = [f"interrupted by {signal.name}"]
        if saved is not None:
            parts.append(f"saved step {saved}")
        super().__init__("; ".join(filter(None, (*parts, resume))))


def shorten(text: str, limit: int) -> str:
    """Returns ``text`` with at most ``limit`` characters; a longer text loses its middle.

    Example:
      >>> shorten("abcdefghijklmnop", 11)
      'abc ... nop'
    """
    if len(text) <= limit:
        return text
    room = max(0, limit - len(" ... "))
    return f"{text[: room - room // 2]} ... {text[len(text) - room // 2 :]}"


def visible(text: str) -> str:
    """Returns ``text`` with an escape for each character that a terminal acts on and for each lone
    surrogate.

    Example:
      >>> visible("\x1b[31mred")
      '\\x1b[31mred'
    """
    escaped = _UNSAFE.sub(
        lambda match: match[0].encode("unicode_escape").decode(), text
    )
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")


def abbreviate(value: object) -> str:
    """Returns the beginning of a value's representation, for messages; "nothing" for None."""
    if value is None:
        return "nothing"
    return repr(value)[:80]


def describe_error(error: BaseException) -> str:
    """Returns type and message of an error of the user's code, whose message may fail to print."""
    return f"{type(error).__name__}: {_text(error)}"


def bounded_text(text: object) -> str:
    """Returns ``text`` with at most `MAX_MESSAGE` bytes, safe to print; a longer text loses its
    middle."""
    (line,) = _bounded([_text(text)])
    return line


def _text(value: object) -> str:
    """Returns ``value`` as text that is safe to print."""
    try:
        text = str(value)
    except (
        Exception
    ) as error:  # e.g. an integer of 5,000 digits, or an error of the user's code
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return visible(shorten(text, MAX_MESSAGE))


def _bounded(parts: list[str]) -> list[str]:
    """Shortens the longest of ``parts`` until the message has at most `MAX_MESSAGE` bytes."""
    room = MAX_MESSAGE - len(": expected , found ; ")
    while sum(len(text.encode()) for text in parts) > room:
        longest = max(range(len(parts)), key=lambda i: len(parts[i].encode()))
        parts[longest] = shorten(parts[longest], len(parts[longest]) * 3 // 4)
    return parts
