"""The configs of ``--sweep`` options: all combinations of the listed values.

    --sweep optimizer.learning-rate=1e-3,2e-3 --sweep seed=0,1

gives four runs in the folders ``learning-rate-0.001_seed-0`` and so on, below ``--output``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from nalora_jax.common import buckets
from nalora_jax.common.digests import unseal
from nalora_jax.config import RunConfig, check, config_from_dict
from nalora_jax.config.structured import parse_dataclass
from nalora_jax.errors import NaloraError

# In the folder of a sweep: its options, its settings and their digest.
SWEEP_FILE = "sweep.json"
# Settings that all runs of a sweep have in common.
_COMMON = re.compile(
    r"^(output|resume|imports|callbacks|mesh\b.*|debug\b.*"
    r"|data\.workers|compute\.compilation_cache)$"
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
        raise NaloraError(
            "--sweep", expected="each setting once", found=", ".join(twice)
        )
    return axes


def grid(config: RunConfig, axes: Sequence[Axis]) -> list[RunConfig]:
    """Returns a checked config of each combination, with its folder below ``config.output``.

    Raises:
      NaloraError: a value out of range, or two runs of one name.
    """
    parent = config.output.rstrip("/")
    names = [name for name, _ in axes]
    runs = []
    for values in itertools.product(*(values for _, values in axes)):
        settings = dict(zip(names, values, strict=True))
        changed = parse_dataclass(RunConfig, _table(settings), base=config)
        folder = "_".join(_part(name, value) for name, value in settings.items())
        runs.append(check(replace(changed, output=f"{parent}/{folder}")))
    check_names(runs)
    return runs


def check_names(configs: Sequence[RunConfig]) -> None:
    """Raises a NaloraError unless there are runs, all with different folders."""
    if not configs:
        raise NaloraError("sweep", expected="at least one run", found="none")
    outputs = [config.output for config in configs]
    twice = sorted(
        {Path(output).name for output in outputs if outputs.count(output) > 1}
    )
    if twice:
        groups = "settings that differ in their group only need different names"
        raise NaloraError(
            "--sweep",
            expected="runs with different names",
            found=", ".join(twice),
            remedy=f"leave equal values out; {groups}",
        )


def recorded_sweep(folder: str) -> tuple[tuple[str, ...], RunConfig] | None:
    """Returns the ``--sweep`` options and the settings of the sweep in a folder, or None.

    The folder is a path or a URL.

    Raises:
      NaloraError: its file is damaged or differs from its digest, or the bucket cannot be read.
    """
    name = f"{folder.rstrip('/')}/{SWEEP_FILE}"
    path = buckets.local_file(name)
    if path is None:
        return None
    try:
        record = unseal(json.loads(path.read_text(encoding="utf-8")), name)
        return tuple(map(str, record["sweep"])), config_from_dict(record["run"], name)
    except NaloraError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        RecursionError,
    ) as error:
        raise NaloraError(
            name,
            expected="the options of a sweep",
            found=error,
            remedy="start the sweep again in another --output",
        ) from None


def _axis(text: str) -> Axis:
    """Returns the setting and the values of one ``--sweep`` option; raises as `axes_of`."""
    name, equals, listed = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not equals or not listed.strip():
        raise NaloraError(
            f"--sweep {text}", expected="SETTING=VALUE,VALUE,...", found="no values"
        )
    if _COMMON.match(name) or is_dataclass(getattr(RunConfig(), name, None)):
        raise NaloraError(
            "--sweep",
            expected="a setting that may differ between runs",
            found=name,
            remedy="give it once, outside of --sweep",
        )
    # A mechanism's settings have commas too: soft:power=2,high=3 is one value.
    words = [word.strip() for word in re.split(r",(?!\s*\w+=)", listed)]
    if "" in words:
        raise NaloraError(
            f"--sweep {text}",
            expected="a value",
            found="nothing after a comma",
            remedy="remove the comma; a list without entries is none",
        )
    return name, tuple(_value(name, word, f"--sweep {text}: ") for word in words)


def _value(name: str, word: str, where: str) -> Any:
    """Returns the value of a word, of the narrowest type that the setting takes.

    Raises:
      NaloraError: the setting takes none of its readings; ``where`` starts its message.
    """
    is_list = isinstance(_setting(RunConfig(), name), tuple)
    *others, last = _readings(word, listed=is_list)
    for reading in others:
        with contextlib.suppress(NaloraError):
            return _setting(parse_dataclass(RunConfig, _table({name: reading})), name)
    return _setting(parse_dataclass(RunConfig, _table({name: last}), where), name)


def _readings(word: str, *, listed: bool) -> list[Any]:
    """Returns the values that a word may mean, of the narrowest type first.

    With ``listed`` they are lists, whose texts are joined by ``+`` and whose numbers by ``/``.
    """
    if listed:
        words = re.split(r"\+(?=[A-Za-z(^])", word)  # not the + of 1e+3
        numbers = [_number(entry) for entry in word.split("/")]
        if word == "none":
            return [[], numbers, words]
        # the words again, last, since the error is about the last reading
        return [words, numbers, words]
    flags = {"true": True, "yes": True, "false": False, "no": False}
    return [_number(word), flags.get(word.lower(), word), word]


def _number(word: str) -> int | float | str:
    """Returns a word as an integer, else as a float, else unchanged."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def _table(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted name as nested tables."""
    table: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = table
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return table


def _setting(config: Any, name: str) -> Any:
    """Returns a setting by its dotted name; None if there is none of that name."""
    return functools.reduce(
        lambda group, part: getattr(group, part, None), name.split("."), config
    )


def _part(name: str, value: Any) -> str:
    """Returns a setting's part of a folder's name, e.g. ``learning-rate-0.001``."""
    label = str(value)
    if isinstance(value, tuple):
        label = "+".join(_label(entry) for entry in value) or "none"
    elif isinstance(value, float):
        label = f"{value:g}"
    setting = name.rpartition(".")[2].replace("_", "-")
    accepted = re.sub(r"[^A-Za-z0-9.+-]+", "-", label)
    return f"{setting}-{accepted}"


def _label(entry: Any) -> str:
    """Returns an entry of a list as text; a group of settings becomes its values that are set."""
    if not is_dataclass(entry):
        return str(entry)
    values = vars(entry).values()
    return "-".join(str(value) for value in values if value is not None)
