"""Config files of a run in Python, YAML and JSON, and a run's settings as YAML.

A YAML or JSON file contains settings that differ from the defaults, by their names in
`nalora_jax.config`:

    model: smollm2-135m-instruct
    epochs: 2
    lora:
      rules: ["ffn:16:32", "attn/(q|v)_proj:8"]
    data: {dataset: chat.jsonl, chat: true}

Rules may be written as on the command line. Code in such a file is never executed.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from nalora_jax.cli.usage import did_you_mean
from nalora_jax.common.imports import execute
from nalora_jax.config import LoRARule, RunConfig
from nalora_jax.config.types import first_wrong, type_name
from nalora_jax.errors import NaloraError, described

_AUTO = ("data.max_length", "optimizer.learning_rate")  # 0: the library chooses

RULE = re.compile(r"(?P<pattern>.+?):(?P<rank>\d+)(?::(?P<alpha>[^:]+))?")
ENDINGS = (".yaml", ".yml", ".json")


def load_config(path: str | Path) -> RunConfig:
    """Returns the settings in a YAML or JSON file, or the result of a Python file's ``config()``.

    Raises:
      NaloraError: the file is missing, has another format, has no ``config``, fails, or returns
        another type.
    """
    path = Path(path)
    if path.suffix in ENDINGS:
        return settings_of(read_values(path), path)
    if not path.is_file():
        raise _bad_config(path, "a Python file", "a folder" if path.is_dir() else "no such file")
    function = getattr(execute(path, "nalora_config", f"--config {path}"), "config", None)
    if not callable(function):
        raise _bad_config(path, "a function config() that returns a RunConfig", "none of that name")
    try:
        config = function()
    except (NaloraError, KeyboardInterrupt):
        raise
    except BaseException as error:  # includes errors that the file raises
        raise _bad_config(path, "config() to return a RunConfig", described(error)) from error
    if not isinstance(config, RunConfig):
        raise _bad_config(path, "config() to return a RunConfig", type(config).__name__)
    _check_types(config, path)
    return config


def read_values(path: Path) -> Any:
    """Returns the content of a YAML or JSON file.

    Raises:
      NaloraError: the file cannot be read or parsed.
    """
    where = f"--config {path}"
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NaloraError(where, expected="a readable file", found=error.strerror or error) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise NaloraError(where, expected=f"a {kind} file", found=" ".join(str(error).split())) from error


def settings_of(values: Any, path: Path) -> RunConfig:
    """Converts nested values to the run's settings; ``path`` names the file in messages.

    Raises:
      NaloraError: an unknown field, or a value of the wrong type.
    """
    config: RunConfig = _made(RunConfig, {} if values is None else values, f"--config {path}", "")
    _check_types(config, path)
    if config.imports:
        remedy = f"give --import {' '.join(config.imports)}"
        raise NaloraError(
            f"--config {path}", expected="no imports, which execute files", found="some", remedy=remedy
        )
    return config


def _made(kind: Any, values: Any, where: str, prefix: str) -> Any:
    """Returns a dataclass with the fields in ``values``."""
    if not isinstance(values, Mapping):
        raise NaloraError(
            where, expected=f"settings by name in {prefix or 'the file'}", found=_shown(values)
        )
    hints, names = get_type_hints(kind), {entry.name for entry in fields(kind)}
    arguments = {}
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else str(name)
        if name not in names:
            near = did_you_mean(str(name), names)
            remedy = "nalora train --help-all lists all"
            if near:
                remedy = f"did you mean {near}?"
            raise NaloraError(where, expected="settings of a run", found=full, remedy=remedy)
        arguments[name] = _value(hints[name], value, where, full)
    return kind(**arguments)


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    """Converts ``value`` to the field type ``hint`` if YAML or JSON do not distinguish it.

    Examples are tuples, which are lists there, and dataclasses.
    """
    if is_dataclass(hint):
        if hint is LoRARule:
            return _rule(value, where, name)
        return _made(hint, value, where, name)
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise NaloraError(where, expected=f"a list in {name}", found=_shown(value))
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise NaloraError(where, expected=f"{len(kinds)} values in {name}", found=len(value))
        return tuple(_value(kind, item, where, name) for kind, item in zip(kinds, value, strict=True))
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in inner if kind is not type(None) and get_origin(kind) is not Literal]
        if value is None or isinstance(value, str):
            return value
        return _value(kinds[0], value, where, name)
    if name in _AUTO and value == "auto":
        return hint(0)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a text
        except (ValueError, OverflowError):
            raise NaloraError(where, expected=f"a number in {name}", found=_shown(value)) from None
    return value


def _rule(value: Any, where: str, name: str) -> Any:
    if isinstance(value, Mapping):
        return _made(LoRARule, value, where, name)
    try:
        return parse_rule(value if isinstance(value, str) else _shown(value))
    except ValueError as error:
        raise NaloraError(where, expected=f"rules PATTERN:RANK[:ALPHA] in {name}", found=error) from None


def as_yaml(config: RunConfig, *, changed_only: bool = False) -> str:
    """Returns settings as a YAML file that `load_config` reads as equal settings.

    Args:
      config: the settings; without ``imports``, which only the command line executes.
      changed_only: leave out settings with their default values.
    """
    values = _plain(replace(config, imports=()), RunConfig() if changed_only else None)
    if not values:
        return "{}\n"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """Returns all settings as nested dicts, lists and texts; rules as on the command line."""
    settings: dict[str, Any] = _plain(config, None)
    return settings


def _plain(value: Any, default: Any) -> Any:
    if isinstance(value, LoRARule):
        return format_rule(value)
    if is_dataclass(value):
        plain = {}
        for entry in fields(value):
            value_of = getattr(value, entry.name)
            if default is None or value_of != getattr(default, entry.name):
                inner = None
                if default is not None and is_dataclass(value_of):
                    inner = getattr(default, entry.name)
                plain[entry.name] = _plain(value_of, inner)
        return plain
    if not isinstance(value, tuple):
        return value
    return [_plain(entry, None) for entry in value]


def parse_rule(text: str) -> LoRARule:
    """Parses an adapter rule as typed on the command line.

    Example:
      >>> parse_rule("ffn/gate_proj:16")
      LoRARule(pattern='ffn/gate_proj', rank=16, alpha=None)
      >>> parse_rule("attn:8:32")
      LoRARule(pattern='attn', rank=8, alpha=32.0)

    Raises:
      ValueError: not of the form PATTERN:RANK[:ALPHA]; tyro turns this into its message.
    """
    match = RULE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        alpha = match["alpha"]
        return LoRARule(match["pattern"], int(match["rank"]), None if alpha is None else float(alpha))
    except ValueError:
        raise ValueError(
            f"expected PATTERN:RANK[:ALPHA], e.g. 'ffn/gate_proj:16', found {text!r}"
        ) from None


def format_rule(rule: LoRARule) -> str:
    """Returns the text that `parse_rule` reads as ``rule``."""
    text = f"{rule.pattern}:{rule.rank}"
    if rule.alpha is not None:
        text += f":{rule.alpha:.9g}"
    return text


def _check_types(config: Any, path: Path) -> None:
    """Raises unless every field has its declared type."""
    if (wrong := first_wrong(config)) is not None:
        raise _bad_config(path, f"{wrong.field} of type {type_name(wrong.hint)}", _shown(wrong.value))


def _shown(value: Any) -> str:
    """Returns the start of a value for a message.

    YAML's aliases can define a value that would fill the memory when written in full.
    """
    return reprlib.repr(value)[:80]


def _bad_config(path: Path, expected: str, actual: str) -> NaloraError:
    remedy = "see the files in configs/ for examples"
    return NaloraError(f"--config {path}", expected=expected, found=actual, remedy=remedy)
