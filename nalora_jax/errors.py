"""The one error type of the library's boundary."""

from __future__ import annotations

from signal import Signals

# Bytes of a message: files quote what strangers wrote, however long.
MAX_MESSAGE = 2000


class NaloraError(ValueError):
    """Bad input, said in one sentence that a user can act on.

    Args:
      where: the file, flag or field that is wrong, e.g. ``"adapter_config.json: r"``.
      expected: what would have been accepted.
      found: what was there instead.
      remedy: what to do about it.

    Example:
      >>> raise NaloraError("--mask.keep", expected="a share in (0, 1]", found=0, remedy="use e.g. 0.5")
      NaloraError: --mask.keep: expected a share in (0, 1], found 0; use e.g. 0.5

    A message has at most 2 kB, whatever it quotes: of a longer part the middle is left out. The command line prints it
    without a traceback and exits with status 2.
    """

    def __init__(self, where: str, *, expected: object, found: object, remedy: str = "") -> None:
        self.where, self.expected, self.found, self.remedy = where, expected, found, remedy
        place, wanted, seen, advice = _bounded([_text(part) for part in (where, expected, found, remedy)])
        message = f"{place}: expected {wanted}, found {seen}"
        super().__init__(f"{message}; {advice}" if advice else message)


class TrainingDivergedError(NaloraError):
    """The loss, an adapter or a moment became NaN or infinite; the checkpoints of earlier steps are kept."""


class LostPeerError(NaloraError):
    """Another process of a multi-host run is gone; the command line exits with `status`, for schedulers to restart."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Interrupted(KeyboardInterrupt):
    """The user (Ctrl-C) or the system (SIGTERM) stopped the run.

    Args:
      signal: which of the two.
      saved: step of the checkpoint that was written because of it; None where there was nothing to save.
      resume: how to go on, for the message.

    Attributes:
      status: the process's exit status, 128 + the signal's number by convention (130, 143): schedulers start a process
        again that ends so.
    """

    def __init__(self, signal: Signals, saved: int | None = None, resume: str = "") -> None:
        self.signal, self.saved, self.status = signal, saved, 128 + int(signal)
        what = f"interrupted by {signal.name}"
        what += "" if saved is None else f"; saved step {saved}"
        super().__init__(f"{what}; {resume}" if resume else what)


def shorten(text: str, limit: int) -> str:
    """``text`` of at most ``limit`` characters: the middle of a longer one is left out.

    Example:
      >>> shorten("abcdefghijklmnop", 11)
      'abc ... nop'
    """
    if len(text) <= limit:
        return text
    kept = max(0, limit - len(" ... "))
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


def bounded_text(text: object) -> str:
    """``text`` in at most `MAX_MESSAGE` bytes, as every output can take it; the middle of a longer one is left out."""
    (line,) = _bounded([_text(text)])
    return line


def _text(part: object) -> str:
    """``part`` as text that every output can take: half characters (lone surrogates) are escaped."""
    try:
        text = str(part)
    except (ValueError, RecursionError, MemoryError) as error:  # Python writes no number of many thousand digits
        text = f"a {type(part).__name__} that cannot be shown ({error})"
    return shorten(text, MAX_MESSAGE).encode("utf-8", "backslashreplace").decode("utf-8")


def _bounded(parts: list[str]) -> list[str]:
    """``parts`` of at most `MAX_MESSAGE` bytes together with what joins them; the longest ones give way."""
    room = MAX_MESSAGE - len(": expected , found ; ")
    while sum(len(part.encode()) for part in parts) > room:
        longest = max(range(len(parts)), key=lambda i: len(parts[i].encode()))
        parts[longest] = shorten(parts[longest], len(parts[longest]) * 3 // 4)
    return parts
