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
import reprlib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nalora_jax.common.imports import execute_file
from nalora_jax.config import LoRARule, RunConfig
from nalora_jax.config.structured import first_wrong, parse_dataclass, type_name
from nalora_jax.errors import NaloraError, describe_error

_ENDINGS = (".yaml", ".yml", ".json")


def load_config(path: str | Path) -> RunConfig:
    """Returns the settings in a YAML or JSON file, or the result of a Python file's ``config()``.

    Raises:
      NaloraError: the file is missing, has another format, has no ``config``, fails, or returns
        another type.
    """
    path = Path(path)
    if path.suffix in _ENDINGS:
        return settings_of(read_values(path), path)
    if not path.is_file():
        found = "no such file"
        if path.is_dir():
            found = "a folder"
        raise _bad_config(path, "a Python file", found)
    function = getattr(
        execute_file(path, "nalora_config", f"--config {path}"), "config", None
    )
    if not callable(function):
        raise _bad_config(
            path, "a function config() that returns a RunConfig", "none of that name"
        )
    try:
        config = function()
    except (NaloraError, KeyboardInterrupt):
        raise
    except BaseException as error:  # includes errors that the file raises
        raise _bad_config(
            path, "config() to return a RunConfig", describe_error(error)
        ) from error
    if not isinstance(config, RunConfig):
        raise _bad_config(path, "config() to return a RunConfig", type(config).__name__)
    if (wrong := first_wrong(config)) is not None:
        found = reprlib.repr(wrong.value)[:80]
        raise _bad_config(path, f"{wrong.field} of type {type_name(wrong.hint)}", found)
    return config


def read_values(path: Path) -> Any:
    """Returns the content of a YAML or JSON file.

    Raises:
      NaloraError: the file cannot be read or parsed.
    """
    where = f"--config {path}"
    if path.suffix == ".json":
        kind, parse = ("JSON", json.loads)
    else:
        kind, parse = ("YAML", yaml.safe_load)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NaloraError(
            where, expected="a readable file", found=error.strerror or error
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise NaloraError(
            where, expected=f"a {kind} file", found=" ".join(str(error).split())
        ) from error


def settings_of(values: Any, path: Path) -> RunConfig:
    """Converts nested values to the run's settings; ``path`` names the file in messages.

    Raises:
      NaloraError: an unknown field, or a value of the wrong type.
    """
    if values is None:  # an empty file
        values = {}
    config = parse_dataclass(RunConfig, values, f"--config {path}: ")
    if config.imports:
        raise NaloraError(
            f"--config {path}",
            expected="no imports, which execute files",
            found="some",
            remedy=f"give --import {' '.join(config.imports)}",
        )
    return config


def format_yaml(config: RunConfig, *, changed_only: bool = False) -> str:
    """Returns settings as a YAML file that `load_config` reads as equal settings.

    Args:
      config: the settings; without ``imports``, which only the command line executes.
      changed_only: leave out settings with their default values.
    """
    default = None
    if changed_only:
        default = RunConfig()
    values = plain_settings(replace(config, imports=()), default)
    if not values:
        return "{}\n"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def plain_settings(value: Any, default: Any = None) -> Any:
    """Returns settings as nested dicts, lists and texts, with adapter rules as on the command line.

    Settings that are equal in ``default`` are left out, unless it is None.
    """
    if isinstance(value, LoRARule):
        return value.text
    if is_dataclass(value):
        plain = {}
        for entry in fields(value):
            value_of = getattr(value, entry.name)
            usual = getattr(default, entry.name, None)
            if default is None or value_of != usual:
                if not is_dataclass(value_of):
                    usual = None
                plain[entry.name] = plain_settings(value_of, usual)
        return plain
    if not isinstance(value, tuple):
        return value
    return [plain_settings(entry) for entry in value]


def _bad_config(path: Path, expected: str, actual: str) -> NaloraError:
    """Returns the error about the file of ``--config``."""
    return NaloraError(
        f"--config {path}",
        expected=expected,
        found=actual,
        remedy="see the files in configs/ for examples",
    )
