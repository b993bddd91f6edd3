"""The configs of ``--sweep`` options: all combinations of the listed values.

    --sweep optimizer.learning-rate=1e-3,2e-3 --sweep seed=0,1

gives four runs in the folders ``learning-rate-0.001_seed-0`` and so on, below ``--output``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nalora_jax.common import buckets
from nalora_jax.common.digests import unseal
from nalora_jax.config import RunConfig, check
from nalora_jax.config.recorded import recorded_config
from nalora_jax.config.types import has_type, type_name
from nalora_jax.errors import NaloraError

FILE = "sweep.json"  # in the folder of a sweep: its options, its settings and their digest
# Settings that all runs of a sweep have in common.
_COMMON = re.compile(
    r"^(output|resume|imports|callbacks|mesh\b.*|debug\b.*|data\.workers|compute\.compilation_cache)$"
)

Axis = tuple[str, tuple[Any, ...]]  # a setting by dotted name, and its values


def axes_of(texts: Sequence[str]) -> list[Axis]:
    """Returns the settings and values of ``--sweep`` options.

    Example:
      >>> axes_of(["optimizer.learning-rate=1e-3,2e-3", "seed=0,1"])
      [('optimizer.learning_rate', (0.001, 0.002)), ('seed', (0, 1))]

    Raises:
      NaloraError: an unknown setting, one that cannot vary, no values, or values of another type.
    """
    axes = [_axis(text) for text in texts]
    names = [name for name, _ in axes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise NaloraError("--sweep", expected="each setting once", found=", ".join(twice))
    return axes


def grid(config: RunConfig, axes: Sequence[Axis]) -> list[RunConfig]:
    """Returns a checked config of each combination, with its folder below ``config.output``.

    Raises:
      NaloraError: a value out of range, or two runs of one name.
    """
    runs = []
    for values in itertools.product(*(values for _, values in axes)):
        pairs = [(name, value) for (name, _), value in zip(axes, values, strict=True)]
        changed = config
        for name, value in pairs:
            changed = _with(changed, name.split("."), value)
        folder = f"{config.output.rstrip('/')}/{'_'.join(_part(name, value) for name, value in pairs)}"
        runs.append(check(replace(changed, output=folder)))
    check_names(runs)
    return runs


def check_names(configs: Sequence[RunConfig]) -> None:
    """Raises a NaloraError unless there are runs, all with different folders."""
    if not configs:
        raise NaloraError("sweep", expected="at least one run", found="none")
    outputs = [config.output for config in configs]
    twice = sorted({Path(output).name for output in outputs if outputs.count(output) > 1})
    if twice:
        remedy = "leave equal values out; settings that differ in their group only need different names"
        raise NaloraError(
            "--sweep", expected="runs with different names", found=", ".join(twice), remedy=remedy
        )


def recorded_sweep(folder: str) -> tuple[tuple[str, ...], RunConfig] | None:
    """Returns the ``--sweep`` options and settings of a folder, a path or a URL; None without a sweep.

    Raises:
      NaloraError: its file is damaged or differs from its digest, or the bucket cannot be read.
    """
    name = f"{folder.rstrip('/')}/{FILE}"
    path = buckets.local_file(name)
    if path is None:
        return None
    try:
        record = unseal(json.loads(path.read_text(encoding="utf-8")), name)
        return tuple(map(str, record["sweep"])), recorded_config(record["run"], name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        if isinstance(error, NaloraError):
            raise
        remedy = "start the sweep again in another --output"
        raise NaloraError(name, expected="the options of a sweep", found=error, remedy=remedy) from None


def _axis(text: str) -> Axis:
    name, equals, listed = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    hint = _hint(name)
    if not equals or not listed.strip():
        raise NaloraError(f"--sweep {text}", expected="SETTING=VALUE,VALUE,...", found="no values")
    # A mechanism's settings have commas too: soft:power=2,high=3 is one value.
    words = [word.strip() for word in re.split(r",(?!\s*\w+=)", listed)]
    return name, tuple(_typed(text, word, hint) for word in words)


def _hint(name: str) -> Any:
    """Returns the type of a setting by dotted name."""
    kind: Any = RunConfig
    for name_part in name.split("."):
        hints = {}
        if is_dataclass(kind):
            hints = get_type_hints(kind)
        if name_part not in hints:
            names = ", ".join(hints).replace("_", "-") or "none"
            raise NaloraError(
                f"--sweep {name}", expected=f"a setting of a run ({names})", found=repr(name_part)
            )
        kind = hints[name_part]
    if is_dataclass(kind) or _COMMON.match(name):
        remedy = "give it once, outside of --sweep"
        raise NaloraError(
            "--sweep", expected="a setting that may differ between runs", found=name, remedy=remedy
        )
    return kind


def _typed(text: str, word: str, hint: Any) -> Any:
    """Returns a value of the setting's type; rules are joined by ``+``, and ``none`` is no rule."""
    is_list = get_origin(hint) is tuple and get_args(hint)[1:] == (...,)
    if is_list and word == "none":
        return ()
    if not word:
        remedy = "for no entry write none" if is_list else "remove the comma"
        raise NaloraError(
            f"--sweep {text}", expected="a value", found="nothing after a comma", remedy=remedy
        )
    if "LoRARule" in str(hint):
        from nalora_jax.cli.config_files import parse_rule

        try:
            return tuple(map(parse_rule, word.split("+")))
        except ValueError as error:
            raise NaloraError(
                f"--sweep {text}", expected="rules PATTERN:RANK[:ALPHA]", found=error
            ) from None
    for value in _readings(word):
        if has_type(value, hint):
            return value
    raise NaloraError(f"--sweep {text}", expected=f"values of type {type_name(hint)}", found=repr(word))


def _readings(word: str) -> list[Any]:
    """Returns the values that a word may mean, from the narrowest type."""
    readings: list[Any] = []
    for convert in (int, float):
        try:
            readings.append(convert(word))
        except ValueError:
            continue
    flags = {"true": True, "yes": True, "false": False, "no": False}
    if word.lower() in flags:
        readings.append(flags[word.lower()])
    if re.fullmatch(r"[\d.e+-]+(/[\d.e+-]+)+", word):
        readings.append(tuple(float(entry) for entry in word.split("/")))
    return [*readings, word, tuple(re.split(r"\+(?=[A-Za-z])", word))]


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """Returns ``config`` with the setting at ``path`` replaced."""
    name, *inner = path
    if inner:
        value = _with(getattr(config, name), inner, value)
    return replace(config, **{name: value})


def _part(name: str, value: Any) -> str:
    """Returns a setting's part of a folder's name, e.g. ``learning-rate-0.001``."""
    label = str(value)
    if isinstance(value, tuple):
        label = "+".join(map(_rule_name, value)) or "none"
    elif isinstance(value, float):
        label = f"{value:g}"
    return f"{name.rpartition('.')[2].replace('_', '-')}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', label)}"


def _rule_name(rule: Any) -> str:
    named: Mapping[str, Any] = getattr(rule, "__dict__", {})
    if named:
        return "-".join(str(number) for number in named.values() if number is not None)
    return str(rule)
