"""What is typed, judged before the parser sees it: unknown flags, numbers that are none, one-line errors; and help."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from textwrap import fill
from typing import Any, Union, get_args, get_origin, get_type_hints

from nalora_jax.config.documented import field_comments
from nalora_jax.errors import NaloraError

# PEFT's names of what `--lora.rules` gives to each pattern.
_OF_RULES = ("rank", "r", "lora_rank", "lora_r", "alpha", "lora_alpha")
_RULES = "--lora.rules PATTERN:RANK[:ALPHA], e.g. --lora.rules ffn:16:32"

_NUMBERS: dict[type, tuple[Callable[[str], Any], str]] = {int: (int, "a whole number"), float: (float, "a number")}


@dataclass(frozen=True)
class Flag:
    """A flag of a verb."""

    name: str  # with its dashes
    type: Any  # of its value, None left out
    field: Field[Any]
    owner: type  # the dataclass that holds the field

    @property
    def numbers(self) -> tuple[type, int] | None:
        """Which numbers it takes, and how many; None if it takes something else."""
        kinds = get_args(self.type) if get_origin(self.type) is tuple else (self.type,)
        return (kinds[0], len(kinds)) if set(kinds) <= {int, float} and len(set(kinds)) == 1 else None

    @property
    def text(self) -> str:
        """The comment above its field, which help shows."""
        return field_comments(self.owner)[self.field.name]

    @property
    def default(self) -> Any:
        """What holds where it is not given."""
        made = self.field.default_factory
        return made() if made is not MISSING else self.field.default


def flags(kind: type, prefix: str = "") -> Iterator[Flag]:
    """Every flag that stands for a field of a (nested) dataclass; positional arguments are not flags."""
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        declared = hints[one.name]
        extras = getattr(declared, "__metadata__", ())
        bare = get_args(declared)[0] if extras else declared
        if any("Positional" in str(extra) for extra in extras):
            continue
        given = next((extra.name for extra in extras if getattr(extra, "name", None) is not None), one.name)
        if isinstance(bare, type) and is_dataclass(bare):
            yield from flags(bare, f"{prefix}{given}." if given else prefix)
        else:
            yield Flag(f"--{prefix}{given}".replace("_", "-"), _without_none(bare), one, kind)


def _without_none(hint: Any) -> Any:
    inner = [one for one in get_args(hint) if one is not types.NoneType]
    return inner[0] if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1 else hint


def check(verb: str, kind: type, argv: Sequence[str]) -> None:
    """Refuses flags that the verb does not have, and numbers that are none.

    Raises:
      NaloraError: names the flag as it was typed, and the one that was meant if there is one like it.
    """
    known = {flag.name: flag for flag in flags(kind)}
    switches = {name for name, flag in known.items() if flag.type is bool or bool in get_args(flag.type)}
    off = {re.sub(r"^(--(?:.*\.)?)", r"\1no-", name) for name in switches}
    for index, word in enumerate(argv):
        if not word.startswith("--") or word == "--":
            continue
        name, assigned, value = word.partition("=")
        name = name.replace("_", "-")
        if name in known:
            values = [value] if assigned else _until_flag(argv[index + 1 :])
            _check_numbers(known[name], values)
            if known[name].type is bool and values and not assigned and not _has_positional(kind):
                raise NaloraError(name, expected="no value: it is a switch", found=repr(values[0][:40]))
        elif name not in off:
            raise unknown(name, [*known, *off], f"a flag of nalora {verb}", f"see nalora {verb} --help-all")


def _has_positional(kind: type) -> bool:
    """Whether a verb takes arguments that may follow a switch."""
    hints = get_type_hints(kind, include_extras=True)
    return any("Positional" in str(extra) for hint in hints.values() for extra in getattr(hint, "__metadata__", ()))


def _until_flag(words: Sequence[str]) -> list[str]:
    """Words up to the next flag; a negative number is none."""
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[:end])


def _check_numbers(flag: Flag, values: Sequence[str]) -> None:
    if flag.numbers is None:
        return
    kind, count = flag.numbers
    convert, noun = _NUMBERS[kind]
    expected = noun if count == 1 else f"{count} numbers"
    if len(values) < count:
        raise NaloraError(flag.name, expected=expected, found="none" if count == 1 else f"{len(values)} values")
    for value in values[:count]:
        try:
            convert(value)
        except ValueError:
            raise NaloraError(flag.name, expected=expected, found=repr(value[:40])) from None


def unknown(name: str, known: Iterable[str], expected: str, otherwise: str) -> NaloraError:
    """The error about a name that is none of ``known``, with the one that was probably meant."""
    meant = did_you_mean(name, known)
    return NaloraError(
        name, expected=expected, found="none of that name", remedy=f"did you mean {meant}?" if meant else otherwise
    )


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that is like ``name``.

    First one that ``name`` begins, the shortest (``--step``: ``--steps``); then one whose last part is like it
    (``--batch-size``: ``--train.batch-size``); then the most similar as a whole.
    """
    last = name.lstrip("-").rpartition(".")[2]
    if last.replace("-", "_") in _OF_RULES and {"--lora.rules", "rules"} & {*known}:
        return _RULES if "--lora.rules" in known else 'rules: ["PATTERN:RANK[:ALPHA]"], e.g. rules: ["ffn:16:32"]'
    names = sorted(known, key=lambda one: (len(one), one))
    begun = [one for one in names if one.startswith(name)]
    if begun:
        return begun[0]
    parts: dict[str, str] = {}
    for one in names:
        parts.setdefault(one.lstrip("-").rpartition(".")[2], one)
    whole = difflib.get_close_matches(name, names, 1, 0.8)
    part = difflib.get_close_matches(last, parts, 1, 0.8)
    near = whole or [parts[one] for one in part] or difflib.get_close_matches(name, names, 1, 0.6)
    return near[0] if near else None


@contextlib.contextmanager
def one_line_errors(verb: str) -> Iterator[None]:
    """Turns what tyro prints about wrong arguments, boxes of many lines, into a NaloraError."""
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise _as_error(verb, said.getvalue()) from None
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _as_error(verb: str, box: str) -> NaloraError:
    """The error that a box of tyro's means: what stands between its title and the next rule; it may have no lines."""
    plain = (line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines())
    lines = [line for line in plain if line][1:]
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}]
    start = 1 if rules[:1] == [0] else 0
    end = next((i for i in rules if i >= start and i > 0), len(lines))
    lines = lines[start:end]
    text, where, remedy = " ".join(lines), f"nalora {verb}", f"see nalora {verb} --help"
    if match := re.match(r"Error parsing (\S+?): expected (.*), found (.*)", text):
        return NaloraError(match[1], expected=match[2], found=match[3])
    if match := re.match(r"Error parsing (\S+?): Could not find valid parse for arguments: \[(.*)\]", text):
        remedy = f"see nalora {verb} --help-all"
        return NaloraError(match[1], expected="values of its type", found=match[2], remedy=remedy)
    if match := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", text):
        return NaloraError(match[2], expected=f"one of {match[3].replace(chr(39), '')}", found=match[1])
    if match := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+)", text):
        return NaloraError(match[1], expected="a value" if match[2] == "1" else f"{match[2]} values", found="none")
    if match := re.match(r"Missing from .*?: (\S+)", text):
        return NaloraError(where, expected=match[1], found="nothing", remedy=remedy)
    if match := re.match(r"Unrecognized options: (.*)", text):
        return NaloraError(where, expected="flags and their values", found=repr(match[1]), remedy=remedy)
    return NaloraError(where, expected="arguments that fit", found=text, remedy=remedy)


def check_text(argv: Sequence[str]) -> None:
    """Refuses arguments that are not text: bytes that are no UTF-8, which nothing behind the flags can write.

    Raises:
      NaloraError: names the flag that it is the value of.
    """
    for index, word in enumerate(argv):
        try:
            word.encode()
        except UnicodeEncodeError:
            name, assigned, _ = word.partition("=")
            own = name if assigned and name.startswith("--") else ""
            before = own or (argv[index - 1] if index and argv[index - 1].startswith("--") else "argument")
            found = repr(word.encode(errors="surrogateescape"))
            raise NaloraError(before, expected="text in UTF-8", found=found[:80]) from None


# ---------------------------------------------------------------- help


def width() -> int:
    """Returns the columns that help may fill: the terminal's, 100 at most."""
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def _entry(name: str, text: str, *, indent: int) -> str:
    """Returns a name and, from column ``indent`` on, its text in as many lines as it takes."""
    return fill(text, width(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)


def overview(verbs: Mapping[str, type]) -> str:
    """What ``nalora --help`` says: a line for every verb."""
    lines = ["usage: nalora VERB [ARGUMENTS]", "", "Nonlinearity-aware LoRA for gated-FFN Transformers.", ""]
    lines += [_entry(name, first_line(kind), indent=12) for name, kind in verbs.items()]
    lines += [
        "",
        "  nalora VERB --help   the flags of a verb (--help-all: all of them)",
        "  nalora --version     the version",
        _entry("--log-format json", "with any verb: notes, steps and errors as one JSON object a line", indent=23),
        _entry("--import FILE ...", "with any verb: execute Python files that register rules of your own", indent=23),
    ]
    return "\n".join(lines)


def short_help(verb: str, kind: type, shown: Sequence[str], written: Callable[[Any], str]) -> str:
    """The flags that most people need, and a line about each group of the others.

    Args:
      verb: its name.
      kind: its arguments.
      shown: names of the flags to show.
      written: a default as it would be typed; empty for nothing.
    """
    every = list(flags(kind))
    lines = [f"usage: nalora {verb} [FLAGS]", "", fill(first_line(kind), width()), ""]
    for flag in (flag for flag in every if flag.name in shown):
        default = written(flag.default)
        note = f" (default: {default})" if default else ""
        lines += [
            f"  {flag.name}",
            fill(f"{flag.text}{note}", width(), initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    lines += ["", f"All {len(every)} flags: nalora {verb} --help-all"]
    groups: dict[type, list[Flag]] = {}
    for flag in every:
        if "." in flag.name:
            groups.setdefault(flag.owner, []).append(flag)
    for owner, members in groups.items():
        name = f"{members[0].name.partition('.')[0]}.*"
        lines.append(_entry(name, f"{first_line(owner)} ({len(members)})", indent=17))
    return "\n".join(lines)


def first_line(kind: type) -> str:
    """The first line of a class's docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]
