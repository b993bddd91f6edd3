"""Checks of the command line before it is parsed, one-line errors, and help.

The checks find unknown flags and invalid numbers.
"""

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

# PEFT's names of settings that `--lora.rules` sets by pattern.
_OF_RULES = ("rank", "r", "lora_rank", "lora_r", "alpha", "lora_alpha")
_RULES = "--lora.rules PATTERN:RANK[:ALPHA], e.g. --lora.rules ffn:16:32"

# What a group's name alone most likely means.
_OF_GROUPS = {"--data": "--data.dataset", "--lora": "--lora.rules", "--optimizer": "--optimizer.name"}

_NUMBERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
}


@dataclass(frozen=True)
class Flag:
    """Flag of a subcommand."""

    name: str  # including its dashes
    type: Any  # of its value, without None
    field: Field[Any]
    owner: type  # the dataclass that has the field

    @property
    def numbers(self) -> tuple[type, int] | None:
        """Returns type and count of the numbers that it takes; None if it takes other values."""
        kinds = get_args(self.type) or (self.type,)
        if set(kinds) <= {int, float} and len(set(kinds)) == 1:
            return (kinds[0], len(kinds))
        return None

    @property
    def text(self) -> str:
        """Returns the comment above its field, which help shows."""
        return field_comments(self.owner)[self.field.name]

    @property
    def default(self) -> Any:
        """Returns its default value."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.field.default


def flags(kind: type, prefix: str = "") -> Iterator[Flag]:
    """Yields every flag of a field of a (nested) dataclass; positional arguments are not flags."""
    hints = get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        declared = hints[entry.name]
        extras = getattr(declared, "__metadata__", ())
        bare = get_args(declared)[0] if extras else declared
        if any("Positional" in str(extra) for extra in extras):
            continue
        explicit = next(
            (extra.name for extra in extras if getattr(extra, "name", None) is not None), entry.name
        )
        if isinstance(bare, type) and is_dataclass(bare):
            yield from flags(bare, f"{prefix}{explicit}." if explicit else prefix)
        else:
            yield Flag(f"--{prefix}{explicit}".replace("_", "-"), _without_none(bare), entry, kind)


def _without_none(hint: Any) -> Any:
    inner = [member for member in get_args(hint) if member is not types.NoneType]
    if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1:
        return inner[0]
    return hint


def check(verb: str, kind: type, argv: Sequence[str]) -> None:
    """Refuses unknown flags of the subcommand, and invalid numbers.

    Raises:
      NaloraError: names the flag as it was typed, and a similar flag if there is one.
    """
    by_name = {flag.name: flag for flag in flags(kind)}
    switches = {name for name, flag in by_name.items() if flag.type is bool or bool in get_args(flag.type)}
    off = {re.sub(r"^(--(?:.*\.)?)", r"\1no-", name) for name in switches}
    for index, word in enumerate(argv):
        if not word.startswith("--") or word == "--":
            continue
        name, assigned, value = word.partition("=")
        name = name.replace("_", "-")
        if name in by_name:
            values = [value] if assigned else until_flag(argv[index + 1 :])
            _check_numbers(by_name[name], values)
            if by_name[name].type is bool and values and not assigned and not _has_positional(kind):
                raise NaloraError(name, expected="no value: it is a switch", found=repr(values[0][:40]))
        elif name not in off:
            raise unknown(
                name, [*by_name, *off], f"a flag of nalora {verb}", f"see nalora {verb} --help-all"
            )


def _has_positional(kind: type) -> bool:
    """Returns True if a subcommand takes positional arguments, which may follow a switch."""
    hints = get_type_hints(kind, include_extras=True)
    return any(
        "Positional" in str(extra) for hint in hints.values() for extra in getattr(hint, "__metadata__", ())
    )


def until_flag(words: Sequence[str]) -> list[str]:
    """Returns the words up to the next flag; a negative number is not a flag."""
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[:end])


def _check_numbers(flag: Flag, values: Sequence[str]) -> None:
    if flag.numbers is None:
        return
    kind, count = flag.numbers
    convert, noun = _NUMBERS[kind]
    expected, found = noun, "none"
    if count > 1:
        expected, found = f"{count} numbers", f"{len(values)} values"
    if len(values) < count:
        raise NaloraError(flag.name, expected=expected, found=found)
    for value in values[:count]:
        try:
            convert(value)
        except ValueError:
            raise NaloraError(flag.name, expected=expected, found=repr(value[:40])) from None


def unknown(name: str, names: Iterable[str], expected: str, otherwise: str) -> NaloraError:
    """Returns the error for a name that is not in ``known``, with a similar name as suggestion."""
    meant = did_you_mean(name, names)
    return NaloraError(
        name,
        expected=expected,
        found="none of that name",
        remedy=f"did you mean {meant}?" if meant else otherwise,
    )


def did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the member of ``known`` that is similar to ``name``.

    It prefers the shortest member that starts with ``name`` (``--step``: ``--steps``), then a
    member whose last part is similar (``--batch-size``: ``--train.batch-size``), then the most
    similar.
    """
    last = name.lstrip("-").rpartition(".")[2]
    if last.replace("-", "_") in _OF_RULES and {"--lora.rules", "rules"} & {*candidates}:
        if "--lora.rules" in candidates:
            return _RULES
        return 'rules: ["PATTERN:RANK[:ALPHA]"], e.g. rules: ["ffn:16:32"]'
    names = sorted(candidates, key=lambda candidate: (len(candidate), candidate))
    if _OF_GROUPS.get(name) in names:
        return _OF_GROUPS[name]
    begun = [candidate for candidate in names if candidate.startswith(name)]
    if begun:
        return begun[0]
    parts: dict[str, str] = {}
    for candidate in names:
        parts.setdefault(candidate.lstrip("-").rpartition(".")[2], candidate)
    close = difflib.get_close_matches(name, names, 1, 0.8)
    close_parts = difflib.get_close_matches(last, parts, 1, 0.8)
    similar = difflib.get_close_matches(name, names, 1, 0.6)
    return next(iter(close or [parts[part] for part in close_parts] or similar), None)


@contextlib.contextmanager
def one_line_errors(verb: str) -> Iterator[None]:
    """Turns tyro's output about wrong arguments, boxes of many lines, into a NaloraError."""
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
    """Returns the error in a box of tyro: the text between its title and the next rule, or ""."""
    plain = (line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines())
    lines = [line for line in plain if line][1:]
    rules = [i for i, line in enumerate(lines) if set(line) <= {"─", "-"}]
    start = int(rules[:1] == [0])
    end = next((i for i in rules if i > 0), len(lines))
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
        return NaloraError(
            match[1], expected="a value" if match[2] == "1" else f"{match[2]} values", found="none"
        )
    if match := re.match(r"Missing from .*?: (\S+)", text):
        return NaloraError(where, expected=match[1], found="nothing", remedy=remedy)
    if match := re.match(r"Unrecognized options: (.*)", text):
        return NaloraError(where, expected="flags and their values", found=repr(match[1]), remedy=remedy)
    return NaloraError(where, expected="arguments that fit", found=text, remedy=remedy)


def check_text(argv: Sequence[str]) -> None:
    """Refuses arguments that are not valid UTF-8, which later code cannot write.

    Raises:
      NaloraError: names the flag of the value.
    """
    for index, word in enumerate(argv):
        try:
            word.encode()
        except UnicodeEncodeError:
            near = [*re.findall(r"^(--[^=]*)=", word), *argv[max(index - 1, 0) : index]]
            flag = next((name for name in near if name.startswith("--")), "argument")
            shown = repr(word.encode(errors="surrogateescape"))
            raise NaloraError(flag, expected="text in UTF-8", found=shown[:80]) from None


# ---------------------------------------------------------------- help


def width() -> int:
    """Returns the columns of help: the terminal's, at most 100."""
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def _entry(name: str, text: str, *, indent: int) -> str:
    """Returns a name and its wrapped text, which starts at column ``indent``."""
    return fill(text, width(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)


def overview(verbs: Mapping[str, type]) -> str:
    """Returns the output of ``nalora --help``: one line per subcommand."""
    lines = [
        "usage: nalora VERB [ARGUMENTS]",
        "",
        "Nonlinearity-aware LoRA for gated-FFN Transformers.",
        "",
    ]
    lines += [_entry(name, first_line(kind), indent=12) for name, kind in verbs.items()]
    lines += [
        "",
        "  nalora VERB --help   the flags of a verb (--help-all: all of them)",
        "  nalora --version     the version",
        _entry(
            "--log-format json",
            "with any verb: notes, steps and errors as one JSON object a line",
            indent=23,
        ),
        _entry(
            "--import FILE ...",
            "with any verb: execute Python files that register rules of your own",
            indent=23,
        ),
    ]
    return "\n".join(lines)


def short_help(
    verb: str, kind: type, common: Mapping[str, Sequence[str]], written: Callable[[Any], str]
) -> str:
    """Returns the most used flags, and one line about each group of other flags.

    Args:
      verb: name of the subcommand.
      kind: its arguments.
      common: names of the flags to show, by heading.
      written: formats a default as it would be typed, or "".
    """
    every = list(flags(kind))
    by_name = {flag.name: flag for flag in every}
    lines = [f"usage: nalora {verb} [FLAGS]", "", fill(first_line(kind), width())]
    for heading, names in common.items():
        lines += ["", f"{heading}:"]
        for flag in (by_name[name] for name in names):
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
        name, text = f"{members[0].name.partition('.')[0]}.*", f"{first_line(owner)} ({len(members)} flags)"
        if len(members) == 1:
            name, text = members[0].name, members[0].text
        lines.append(_entry(name, text, indent=max(17, len(name) + 4)))
    return "\n".join(lines)


def first_line(kind: type) -> str:
    """Returns the first line of a class's docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]
