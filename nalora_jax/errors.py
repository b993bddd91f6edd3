"""The one error type of the library's boundary."""

from __future__ import annotations


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

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, where: str, *, expected: object, found: object, remedy: str = "") -> None:
        self.where, self.expected, self.found, self.remedy = where, expected, found, remedy
        message = f"{where}: expected {expected}, found {found}"
        super().__init__(f"{message}; {remedy}" if remedy else message)


class TrainingDivergedError(NaloraError):
    """The loss became NaN or infinite; the checkpoints of earlier steps are kept."""
