"""Ranges and paths that flags may have, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nalora_jax.common import buckets
from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: an interval, ``"(0, 1]"``, and perhaps one more."""

    noun: str  # "a share", "a number", "a whole number"
    interval: str
    also: int | None = None

    def holds(self, value: Any) -> bool:
        """Returns True if ``value`` is in the range; nan and infinities never are."""
        kind: Any = Integral if self.noun == "a whole number" else Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        low, high = (float(edge) for edge in self.interval[1:-1].split(","))
        above = value > low if self.interval[0] == "(" else value >= low
        below = value < high if self.interval[-1] == ")" else value <= high
        return bool((above and below) or value == self.also)

    def __str__(self) -> str:
        """Returns the range as text for an error message."""
        return f"{'' if self.also is None else f'{self.also} or '}{self.noun} in {self.interval}"


INDEX = 2**31 - 1  # the largest int32, JAX's integer type
COUNT, SIZE = Range("a whole number", f"[0, {INDEX}]"), Range("a whole number", f"[1, {INDEX}]")
SEED, TOKENS = Range("a whole number", f"[0, {2**32 - 1}]"), Range("a whole number", f"[1, {2**24}]")
LENGTH = Range("a whole number", f"[0, {2**24}]")  # 0: the library chooses
INTERVAL = Range("a whole number", f"[0, {INDEX}]", also=-1)  # -1: the library chooses
ROWS, AXIS = Range("a whole number", "[1, 1000000]"), Range("a whole number", "[0, 1000000]", also=-1)
# Settings of the mesh, in every command that has devices.
MESH = {f"mesh.{axis}": AXIS for axis in ("data", "fsdp", "context", "tensor")} | {
    "mesh.run": COUNT,
    "mesh.runs_per_device": COUNT,
}
BELOW_ONE, SHARE = Range("a number", "[0, 1)"), Range("a share", "[0, 1]")
# Ranges of the generation settings, in Python and on the command line.
SAMPLING = {
    "max_new_tokens": TOKENS,
    "temperature": Range("a number", "[0, 1e6]"),
    "top_k": COUNT,
    "top_p": Range("a share", "(0, 1]"),
    "min_p": SHARE,
    "repetition_penalty": Range("a number", "(0, 1e6]"),
}
RANK, ALPHA, GAIN = (
    Range("a whole number", "[0, 65536]"),
    Range("a number", "(0, 1e6]"),
    Range("a number", "[0, 1e6]"),
)


def check_ranges(values: object, ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Raises an error for the first number that is out of its range; None means not given.

    Args:
      values: the dataclass.
      ranges: by the field's dotted name.
      prefix: of the flags' names.

    Raises:
      NaloraError: names the flag, the range and the value.
    """
    for name, allowed in ranges.items():
        value: Any = reduce(getattr, name.split("."), values)
        require(
            f"--{prefix}{name}".replace("_", "-"),
            value is None or allowed.holds(value),
            str(allowed),
            value,
        )


def check_path(flag: str, path: object) -> None:
    """Raises an error for a path that no file system accepts, or a URL of an unknown store.

    Examples: a part of more than 255 bytes, a null character, an empty path, or foo://x.

    Raises:
      NaloraError: names the flag.
    """
    text = str(path)
    shown = repr(text[:80]) + ("..." if len(text) > 80 else "")
    require(flag, is_path(text), "a path whose parts have 1 to 255 bytes", shown)
    where = buckets.url(text)
    if where is not None and not buckets.is_url(where):
        raise buckets.missing_package(flag, where)


def is_path(text: str) -> bool:
    """Returns True if a file system accepts ``text`` as a path."""
    longest = max((len(name.encode(errors="replace")) for name in Path(text).parts), default=0)
    return (
        bool(text.strip())
        and "\0" not in text
        and longest <= 255
        and len(text.encode(errors="replace")) < 4096
    )


def require(flag: str, holds: bool, expected: str, value: object) -> None:
    """Raises a NaloraError about ``flag`` unless ``holds``."""
    if not holds:
        raise NaloraError(flag, expected=expected, found=value)
