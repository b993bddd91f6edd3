"""Reads settings: one function for flags, YAML, protocols, sweeps and recorded runs.

A setting is a field of a frozen dataclass. Its annotation holds its range, and the comment above it
its description:

    # Optimizer steps.
    steps: Annotated[int, SIZE] = 100

`parse_dataclass` makes such a dataclass from plain data, `check_ranges` checks the numbers, and
`field_comments` reads the comments.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial, reduce
from numbers import Integral, Real
from pathlib import PurePath
from types import UnionType
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from nalora_jax.errors import NaloraError

T = TypeVar("T")


# ---------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: an interval, ``"(0, 1]"``, and perhaps one more."""

    noun: str  # "a share", "a number", "a whole number"
    interval: str
    also: int | None = None

    def holds(self, value: Any) -> bool:
        """Returns True if ``value`` is in the range; nan and infinities never are."""
        kind: Any = Real
        if self.noun == "a whole number":
            kind = Integral
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        # "(0, 1]": brackets are at both ends, a square one includes its edge.
        low, high = (float(edge) for edge in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        return bool((above and below) or value == self.also)

    def __str__(self) -> str:
        """Returns the range as text for an error message, e.g. ``"0 or a number in [1, 8)"``."""
        text = f"{self.noun} in {self.interval}"
        if self.also is None:
            return text
        return f"{self.also} or {text}"


_INDEX = 2**31 - 1  # the largest int32, JAX's integer type
COUNT = Range("a whole number", f"[0, {_INDEX}]")
SIZE = Range("a whole number", f"[1, {_INDEX}]")
SEED = Range("a whole number", f"[0, {2**32 - 1}]")
TOKEN_COUNT = Range("a whole number", f"[1, {2**24}]")
LENGTH = Range("a whole number", f"[0, {2**24}]")  # 0: the library chooses
INTERVAL = Range("a whole number", f"[0, {_INDEX}]", also=-1)  # -1: the library chooses
ROW_COUNT = Range("a whole number", "[1, 1000000]")
AXIS = Range("a whole number", "[0, 1000000]", also=-1)
BELOW_ONE = Range("a number", "[0, 1)")
SHARE_RANGE = Range("a share", "[0, 1]")
POSITIVE_SHARE = Range("a share", "(0, 1]")
RANK = Range("a whole number", "[0, 65536]")
MAX_RANK = Range("a whole number", "[1, 65536]")
AMOUNT = Range("a number", "[0, 1e6]")
POSITIVE = Range("a number", "(0, 1e6]")

ACCEPTS_AUTO = "auto"  # marks a field that this text sets to 0: the library chooses


def ranges(kind: type) -> Mapping[str, Range]:
    """Returns the range of every number of a dataclass and of its groups, by dotted name.

    A group whose annotation has a flag's name (``arg(name="")``) is left out: `config.check` knows
    which of a run's settings a subcommand may leave open.
    """
    named: dict[str, Range] = {}
    for name, hint in _hints(kind).items():
        if is_dataclass(hint):
            inner_ranges = ranges(hint)  # type: ignore[arg-type]
            for inner, allowed in inner_ranges.items():
                named[f"{name}.{inner}"] = allowed
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Range):
                named[name] = extra
    return named


def check_ranges(values: object, where: str = "--") -> None:
    """Raises an error for the first number of a dataclass that is out of its range; None is not
    set.

    Args:
      values: the dataclass.
      where: prefix of a field's name in messages; ``--`` for flags, which have dashes in their
        names.

    Raises:
      NaloraError: names the flag or field, the range and the value.
    """
    for name, allowed in ranges(type(values)).items():
        value: Any = reduce(getattr, name.split("."), values)
        if value is not None and not allowed.holds(value):
            if where == "--":
                name = name.replace("_", "-")
            raise NaloraError(where + name, expected=allowed, found=value)


# ---------------------------------------------------------------- types


class WrongType(NamedTuple):
    """A field whose value has the wrong type."""

    field: str  # with dots, as on the command line
    hint: Any  # its declared type
    value: Any


def _hints(kind: type) -> Mapping[str, Any]:
    """Returns the annotation of each field, with its range."""
    return get_type_hints(kind, include_extras=True)


def first_wrong(
    config: Any, prefix: str = "", *, lenient: bool = False
) -> WrongType | None:
    """Returns the first field of the nested dataclasses whose value is not of its declared type.

    Args:
      config: the outermost dataclass.
      prefix: of the fields' names.
      lenient: accept lists for tuples, paths for texts, and NumPy's numbers.
    """
    hints = get_type_hints(type(config))
    for entry in fields(config):
        name = f"{prefix}{entry.name}"
        value = getattr(config, entry.name)
        hint = hints[entry.name]
        if not has_type(value, hint) and not (
            lenient and has_type(_plain(value), hint)
        ):
            return WrongType(name, hint, value)
        # The value itself and the items of a tuple, by prefix of their fields' names.
        parts = {f"{name}.": value}
        if isinstance(value, tuple):
            parts |= {f"{name}[{index}].": item for index, item in enumerate(value)}
        for place, item in parts.items():
            if not is_dataclass(item):
                continue
            if (wrong := first_wrong(item, place, lenient=lenient)) is not None:
                return wrong
    return None


def _plain(value: Any) -> Any:
    """Returns a value as its setting would hold it: lists as tuples, paths as texts, NumPy scalars
    as Python numbers."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, PurePath):
        return str(value)
    # A NumPy or JAX scalar.
    if getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def has_type(value: Any, hint: Any) -> bool:
    """Returns True if ``value`` and all its items are of the type that ``hint`` declares."""
    try:
        check_type(
            value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS
        )
    except TypeCheckError:
        return False
    return True


def type_name(hint: Any) -> str:
    """Returns the name of a type for messages."""
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "")


def flatten_settings(
    settings: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields dotted name and value of every setting in nested dicts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------- reading

INTERNAL = {"internal": True}  # metadata of fields that `parse_dataclass` does not read


def parse_dataclass(
    kind: type[T],
    table: Any,
    where: str = "",
    *,
    base: T | None = None,
    ignore_unknown: bool = False,
) -> T:
    """Returns a dataclass with the settings of a table, as YAML, JSON and TOML files hold them.

    Lists become tuples, whole numbers of a float's field floats, tables dataclasses. A float may be
    a text (YAML reads ``1e-3`` as one), and a dataclass with a method ``from_text`` too.

    Args:
      kind: the dataclass. Fields that are not in the table have their default.
      table: nested mappings.
      where: prefix of a field's name in messages, as ``"--config run.yaml: "``.
      base: an instance whose values the missing fields have, in place of the defaults.
      ignore_unknown: skip names that are no field, as files of other versions have them.

    Example:
      >>> parse_dataclass(RunConfig, {"steps": 5, "lora": {"rules": ["gate:2"]}}).lora.rules
      (LoRARule(pattern='gate', rank=2, alpha=None),)

    Raises:
      NaloraError: an unknown name, a value of another type, or no value for a field without
        default; it names the place.
    """
    if not isinstance(table, Mapping):
        place = where.rstrip(" .:") or "settings"
        raise NaloraError(place, expected="settings by name", found=_shown(table))
    entries = {
        entry.name: entry
        for entry in fields(kind)  # type: ignore[arg-type]
        if entry.init and entry.metadata != INTERNAL
    }
    hints = _hints(kind)
    values = {}
    for name, value in table.items():
        place = f"{where}{name}"
        if name in entries:
            inner = getattr(base, name, None)
            values[name] = _read(hints[name], value, place, inner, ignore_unknown)
        elif not ignore_unknown:
            raise unknown(place, str(name), entries, f"a field of {kind.__name__}")
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    for name, entry in entries.items():
        if (
            name not in values
            and entry.default is MISSING
            and entry.default_factory is MISSING
        ):
            raise NaloraError(f"{where}{name}", expected="a value", found="none")
    return kind(**values)


def _read(hint: Any, value: Any, place: str, base: Any, ignore_unknown: bool) -> Any:
    """Returns a value of a table with the type of its field.

    Args:
      hint: the field's annotation, perhaps with a range or `ACCEPTS_AUTO`.
      value: the value of the table.
      place: its name in messages.
      base: the field's value in the instance whose values missing fields have; None without one.
      ignore_unknown: see `parse_dataclass`.

    Raises:
      NaloraError: the value has another type.
    """
    extras = getattr(hint, "__metadata__", ())
    kind = hint
    if extras:
        kind = get_args(hint)[0]
    origin = get_origin(kind)
    inner = get_args(kind)
    if is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, str) and hasattr(kind, "from_text"):
            try:
                return kind.from_text(value)
            except NaloraError as error:
                raise NaloraError(
                    place, expected=error.expected, found=error.found
                ) from None
        return parse_dataclass(
            kind,  # type: ignore[arg-type]
            value,
            f"{place}.",
            base=base,
            ignore_unknown=ignore_unknown,
        )
    # The field's zero means the automatic choice.
    if ACCEPTS_AUTO in extras and value == ACCEPTS_AUTO:
        return kind(0)
    read = partial(_read, base=None, ignore_unknown=ignore_unknown)
    if origin is tuple and isinstance(value, list | tuple):
        hints = inner
        if inner[1:] == (...,):
            hints = (inner[0],) * len(value)
        if len(hints) == len(value):
            # Each item is read by its own type.
            pairs = enumerate(zip(hints, value, strict=True))
            return tuple(
                read(item_hint, item, f"{place}[{index}]")
                for index, (item_hint, item) in pairs
            )
    if origin is dict and is_dataclass(inner[1]) and isinstance(value, Mapping):
        return {
            name: read(inner[1], item, f"{place}.{name}")
            for name, item in value.items()
        }
    # The alternatives of a union; a float among them takes whole numbers and texts.
    kinds = (kind,)
    if origin in (Union, UnionType):
        kinds = inner
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    # typeguard takes True for 1, and whole numbers of any size for floats.
    if isinstance(value, bool):
        mistaken = bool not in kinds
    else:
        mistaken = type(value) is int and float in kinds
    if mistaken or not has_type(value, kind):
        raise NaloraError(place, expected=_expected(kind), found=_shown(value))
    return value


def _expected(hint: Any) -> str:
    """Returns the description of a type for messages."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[1:] == (...,):
            return "a list"
        return f"a list of {len(items)} values"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
    }
    return names.get(hint, f"a value of type {type_name(hint)}")


def _shown(value: Any) -> str:
    """Returns the start of a value for a message.

    YAML's aliases can define a value that would fill the memory when written in full.
    """
    return reprlib.repr(value)[:80]


def unknown(
    where: str,
    name: str,
    names: Iterable[str],
    expected: str,
    otherwise: str | None = None,
) -> NaloraError:
    """Returns the error for a name that is not in ``names``, with a similar name as suggestion."""
    meant = did_you_mean(name, names)
    if meant:
        remedy = f"did you mean {meant}?"
    else:
        remedy = otherwise or f"there are {', '.join(names)}"
    return NaloraError(
        where, expected=expected, found="none of that name", remedy=remedy
    )


# PEFT's names of settings that `--lora.rules` sets by pattern.
_OF_RULES = ("rank", "r", "lora_rank", "lora_r", "alpha", "lora_alpha")
_RULES = "--lora.rules PATTERN:RANK[:ALPHA], e.g. --lora.rules ffn:16:32"
# What a group's name alone most likely means.
_OF_GROUPS = {
    "--data": "--data.dataset",
    "--lora": "--lora.rules",
    "--optimizer": "--optimizer.name",
}


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that is similar to ``name``.

    It prefers the shortest candidate that starts with ``name`` (``--step``: ``--steps``), then a
    candidate whose last part is similar (``--batch-size``: ``--train.batch-size``), then the most
    similar.
    """
    # Name of the setting without its group.
    last = name.lstrip("-").rpartition(".")[2]
    if last.replace("-", "_") in _OF_RULES and {"--lora.rules", "rules"} & {
        *candidates
    }:
        if "--lora.rules" in candidates:
            return _RULES
        return 'rules: ["PATTERN:RANK[:ALPHA]"], e.g. rules: ["ffn:16:32"]'
    names = sorted(candidates, key=lambda candidate: (len(candidate), candidate))
    if _OF_GROUPS.get(name) in names:
        return _OF_GROUPS[name]
    parts = {
        # Of candidates with equal last parts, the shortest stays: it comes last here.
        candidate.lstrip("-").rpartition(".")[2]: candidate
        for candidate in reversed(names)
    }
    for candidate in names:
        if candidate.startswith(name):
            return candidate
    # 0.8: about one wrong letter in five; 0.6, difflib's default, is the last resort.
    if similar := difflib.get_close_matches(name, names, 1, 0.8):
        return similar[0]
    if similar := difflib.get_close_matches(last, parts, 1, 0.8):
        return parts[similar[0]]
    if similar := difflib.get_close_matches(name, names, 1, 0.6):
        return similar[0]
    return None


# ---------------------------------------------------------------- documentation


@cache
def field_comments(kind: type) -> Mapping[str, str]:
    """Returns the comment above each field of a dataclass, by name; empty text if there is none.

    Inherited fields have their comments in the class that declares them.
    """
    # Sources of the class and its bases, without `object`; the first match is the closest.
    lines: list[str] = []
    for owner in kind.__mro__[:-1]:
        lines += inspect.getsource(owner).splitlines()
    # Text before a colon: of a field's line, its name with the indentation of a class.
    names = [line.partition(":")[0] for line in lines]
    comments = {}
    for field in fields(kind):
        name = f"    {field.name}"
        at = 0  # of inherited fields
        if name in names:
            at = names.index(name)
        start = at
        while start and lines[start - 1].startswith("    #"):
            start -= 1
        comments[field.name] = " ".join(
            line.strip().removeprefix("#").strip() for line in lines[start:at]
        )
    return comments
