"""The flags of a subcommand: unknown flags, errors in one line, and help."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from textwrap import fill
from typing import Any, Union, get_args, get_origin, get_type_hints

from nalora_jax.config import LoRARule
from nalora_jax.config.structured import field_comments, unknown
from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class Flag:
    """Flag of a subcommand."""

    name: str  # including its dashes
    type: Any  # of its value, without None
    field: Field[Any]
    owner: type  # the dataclass that has the field
    default: Any

    @property
    def text(self) -> str:
        """Returns the comment above its field, which help shows."""
        return field_comments(self.owner)[self.field.name]


def flags(kind: type, prefix: str = "", values: Any = None) -> Iterator[Flag]:
    """Yields every flag of a field of a (nested) dataclass; positional arguments are not flags.

    Defaults are those of ``values``, an instance of ``kind``; without it those of the fields.
    """
    hints = get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        declared = hints[entry.name]
        extras = getattr(declared, "__metadata__", ())  # of Annotated[type, *extras]
        bare = declared
        if extras:
            bare = get_args(declared)[0]
        if any("Positional" in str(extra) for extra in extras):
            continue
        # An extra may name the flag; "" leaves the name of a group out of its flags.
        names = [getattr(extra, "name", None) for extra in extras]
        explicit = next((name for name in names if name is not None), entry.name)
        default = entry.default
        if values is not None:
            default = getattr(values, entry.name)
        elif entry.default_factory is not MISSING:
            default = entry.default_factory()
        if isinstance(bare, type) and is_dataclass(bare):
            inner = prefix
            if explicit:
                inner = f"{prefix}{explicit}."
            yield from flags(bare, inner, default)
        else:
            name = f"--{prefix}{explicit}".replace("_", "-")
            yield Flag(name, _without_none(bare), entry, kind, default)


def _without_none(hint: Any) -> Any:
    """Returns the type T of ``T | None``; other types unchanged."""
    inner = [member for member in get_args(hint) if member is not types.NoneType]
    if get_origin(hint) in (Union, types.UnionType) and len(inner) == 1:
        return inner[0]
    return hint


def check_flags(subcommand: str, kind: type, argv: Sequence[str]) -> None:
    """Refuses words of ``argv`` that are no flags of the subcommand, whose arguments are ``kind``.

    Raises:
      NaloraError: names the flag as it was typed, and a similar flag if there is one.
    """
    by_name = {flag.name: flag for flag in flags(kind)}
    switches = {
        name
        for name, flag in by_name.items()
        if flag.type is bool or bool in get_args(flag.type)
    }
    # --lora.no-dora switches --lora.dora off
    off = {re.sub(r"^(--(?:.*\.)?)", r"\1no-", name) for name in switches}
    known = [*by_name, *off]
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in ("--", *known):
            expected = f"a flag of nalora {subcommand}"
            remedy = f"see nalora {subcommand} --help-all"
            raise unknown(name, name, known, expected, remedy)


@contextlib.contextmanager
def one_line_errors(subcommand: str) -> Iterator[None]:
    """Turns tyro's output about wrong arguments, boxes of many lines, into a NaloraError."""
    said = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # so that no line of a box is broken
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise _as_error(subcommand, said.getvalue()) from None
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _as_error(subcommand: str, box: str) -> NaloraError:
    """Returns the error that a box of tyro describes.

    The first paragraph of the box names the flag and the bad value.
    """
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", box)
    plain = (line.strip("│╭╮╰╯ ") for line in without_colours.splitlines())
    lines = [line for line in plain if line][1:]  # after the title
    # The first paragraph is between two horizontal rules, of which the first may be missing.
    rules = [index for index, line in enumerate(lines) if set(line) <= {"─", "-"}]
    start = int(rules[:1] == [0])
    end = next((index for index in rules if index > 0), len(lines))
    text = " ".join(lines[start:end])
    where = f"nalora {subcommand}"
    remedy = f"see nalora {subcommand} --help-all"
    if match := re.match(
        r"Error parsing (\S+?): (?:.*: )?expected (.*), found (.*)", text
    ):
        return NaloraError(match[1], expected=match[2], found=match[3])
    if match := re.match(r"Error parsing (\S+?): (.*)", text):
        form = next(
            (line for line in lines if line.startswith(f"{match[1]} ")),
            "a value of its type",
        )
        found = match[2]
        if value := re.search(r"'.*'", found):
            found = value[0]
        expected = form.removeprefix(f"{match[1]} ")
        return NaloraError(match[1], expected=expected, found=found)
    if match := re.match(
        r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", text
    ):
        return NaloraError(
            match[2], expected=f"one of {match[3].replace(chr(39), '')}", found=match[1]
        )
    if match := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+)", text):
        return NaloraError(match[1], expected="a value", found="none")
    if match := re.match(r"Missing from .*?: (\S+)", text):
        return NaloraError(where, expected=match[1], found="nothing", remedy=remedy)
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
            # the flag of --flag=value, or else the word before the value
            near = [*re.findall(r"^(--[^=]*)=", word), *argv[max(index - 1, 0) : index]]
            flag = next((name for name in near if name.startswith("--")), "argument")
            shown = repr(word.encode(errors="surrogateescape"))
            raise NaloraError(
                flag, expected="text in UTF-8", found=shown[:80]
            ) from None


# ---------------------------------------------------------------- help


def width() -> int:
    """Returns the columns of help: the terminal's, at most 100."""
    return max(40, min(100, shutil.get_terminal_size((100, 24)).columns))


def _entry(name: str, text: str, *, indent: int) -> str:
    """Returns a name and its wrapped text, which starts at column ``indent``."""
    return fill(
        text,
        width(),
        initial_indent=f"  {name}".ljust(indent),
        subsequent_indent=" " * indent,
    )


def overview(subcommands: Mapping[str, type]) -> str:
    """Returns the output of ``nalora --help``: one line per subcommand."""
    lines = ["usage: nalora SUBCOMMAND [FLAGS]", ""]
    lines += ["Nonlinearity-aware LoRA for gated-FFN Transformers.", ""]
    for name, kind in subcommands.items():
        lines.append(_entry(name, summary(kind), indent=12))
    lines.append("")
    also = "with any subcommand:"
    common = {
        "SUBCOMMAND --help": "its flags (--help-all: all of them)",
        "--version": "the version",
        "--log-format json": f"{also} notes, steps and errors as one JSON object a line",
        "--import FILE ...": f"{also} execute Python files that register rules of your own",
    }
    for name, text in common.items():
        lines.append(_entry(name, text, indent=23))
    return "\n".join(lines)


def short_help(subcommand: str, kind: type, common: Mapping[str, str]) -> str:
    """Returns the most used flags, and one line about each group of other flags.

    Args:
      subcommand: its name.
      kind: its arguments.
      common: names of the flags to show, separated by blanks, by heading.
    """
    every = list(flags(kind))
    by_name = {flag.name: flag for flag in every}
    lines = [f"usage: nalora {subcommand} [FLAGS]", "", fill(summary(kind), width())]
    for heading, names in common.items():
        lines += ["", f"{heading}:"]
        for flag in map(by_name.__getitem__, names.split()):
            text = flag.text
            if default := _type_out(flag.default):
                text += f" (default: {default})"
            lines += [f"  {flag.name}", _entry("", text, indent=6)]
    lines += ["", f"All {len(every)} flags: nalora {subcommand} --help-all"]
    groups: dict[type, list[Flag]] = {}
    for flag in every:
        if "." in flag.name:
            groups.setdefault(flag.owner, []).append(flag)
    shown = set(" ".join(common.values()).split())
    others = [flag.name for flag in every if "." not in flag.name]
    others = [name for name in others if name not in shown]
    if others:
        lines.append(_entry("others", ", ".join(others), indent=17))
    for owner, members in groups.items():
        name = f"{members[0].name.partition('.')[0]}.*"
        text = f"{summary(owner)} ({len(members)} flags)"
        if len(members) == 1:
            name = members[0].name
            text = members[0].text
        lines.append(_entry(name, text, indent=max(17, len(name) + 4)))
    return "\n".join(lines)


def _type_out(value: Any) -> str:
    """Returns a default as a user would type it; "" for None and for disabled features."""
    if isinstance(value, tuple):
        return " ".join(map(_type_out, value))
    if isinstance(value, LoRARule):
        return value.text
    if value is None or value is False:
        return ""
    return str(value)


def summary(kind: type) -> str:
    """Returns the first paragraph of a class's docstring, on one line."""
    paragraph = (kind.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())
