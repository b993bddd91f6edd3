"""Finds the base, the adapter and the run that a name refers to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nalora_jax.common import buckets
from nalora_jax.common.digests import unseal
from nalora_jax.common.folders import can_exist
from nalora_jax.config import config_from_dict
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import ADAPTER, MODEL
from nalora_jax.evaluate.run_log import METRICS_FILE as METRICS
from nalora_jax.weights.hub import alias_of
from nalora_jax.weights.peft_config import CONFIG_NAME, recorded_fact

T = TypeVar("T")


@dataclass(frozen=True)
class Located:
    """The locations of a model's parts, before any of them is read."""

    base: str  # a name for `weights.load_model`
    adapter: Path | None = None  # folder in PEFT's format
    # config of the adapter's run, if any
    run: Mapping[str, Any] = field(default_factory=dict)


def locate(model: str | Path, adapter: str | Path | None = None) -> Located:
    """Finds the base, the adapter and the run that ``model`` and ``adapter`` refer to.

    Args:
      model: an alias, hub id, folder or .gguf file; or the folder of a run or of a PEFT adapter,
        which means the adapter together with the base that it names. Folders may be in a bucket.
      adapter: folder of a run or of a PEFT adapter; allowed only if ``model`` is a base.

    Raises:
      NaloraError: a folder given as an adapter has none, there are two adapters, or an adapter
        names no base.
    """
    adapter_of_model = find_adapter(Path(model))
    if adapter_of_model is None:
        tuned = Path(model) / MODEL
        if can_exist(tuned) and (tuned / "config.json").is_file():
            return _with_adapter(str(tuned), adapter, run_config(Path(model)))
        if can_exist(Path(model)) and (Path(model) / METRICS).is_file():
            remedy = "finish the run (--resume), or name the base model"
            raise NaloraError(
                str(model),
                expected="a run that exported its adapter",
                found="none yet",
                remedy=remedy,
            )
        return _with_adapter(str(model), adapter, {})
    if adapter is not None:
        raise NaloraError(
            "--adapter",
            expected="a base model to put it on",
            found=f"{model}, which holds an adapter itself",
            remedy="give the base model's name, or leave --adapter out",
        )
    run = run_config(adapter_of_model.parent)
    # The name of the exact weights, if it was recorded.
    base = _recorded(_header(adapter_of_model.parent), "base", "name", str)
    return Located(
        base or run.get("model") or base_of(adapter_of_model), adapter_of_model, run
    )


def _with_adapter(
    model: str, adapter: str | Path | None, run: Mapping[str, Any]
) -> Located:
    """Returns a base with the adapter that is given beside it, or with ``run``, its own."""
    if adapter is None:
        return Located(model, run=run)
    # The folder of a run is the parent of its adapter.
    folder = adapter_folder(Path(adapter))
    return Located(model, folder, run_config(folder.parent))


def holds_adapter(folder: str | Path) -> bool:
    """Returns True if ``folder`` belongs to a run with an adapter or is a PEFT adapter."""
    return find_adapter(Path(folder)) is not None


def adapter_folder(path: Path) -> Path:
    """Returns the PEFT folder of ``path``, which is a run's folder or an adapter's.

    Raises:
      NaloraError: the folder has no adapter.
    """
    located = find_adapter(path)
    if located is None:
        if can_exist(path) and path.is_dir():
            actual = "neither"
        else:
            actual = "no such folder"
        expected = f"a folder with {CONFIG_NAME}, or a run's folder"
        raise NaloraError(str(path), expected=expected, found=actual)
    return located


def base_of(adapter: Path) -> str:
    """Returns the base model that an adapter's config names; of a copy, the copy that was trained
    on.

    Raises:
      NaloraError: the config cannot be read, or names none.
    """
    path = adapter / CONFIG_NAME
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        remedy = "give the base model itself, and the adapter with --adapter"
        raise NaloraError(
            f"{path}: base_model_name_or_path",
            expected="a model",
            found=repr(name),
            remedy=remedy,
        )
    # PEFT's config names the original; the fact, the copy (e.g. a GGUF file) that was trained on.
    copy = recorded_fact(adapter, "base")
    alias = alias_of(copy)
    return copy if alias and alias.hub_id == name else name


def run_config(folder: Path) -> dict[str, Any]:
    """Returns the config of the run in ``folder``, from its log's first line; {} without a run.

    Raises:
      NaloraError: the line is not a run's config, for example because it was edited.
    """
    settings = _header(folder).get("run", {})
    if not isinstance(settings, dict):
        return {}
    config_from_dict(settings, f"{folder / METRICS}: line 1: run")
    return settings


def _recorded(
    header: Mapping[str, Any], group: str, name: str, kind: type[T]
) -> T | None:
    """Returns ``header[group][name]`` if it is a ``kind``."""
    fields = header.get(group)
    if isinstance(fields, dict) and isinstance(value := fields.get(name), kind):
        return value
    return None


def _header(folder: Path) -> dict[str, Any]:
    """Returns the first line of a run's log, or {} if there is none.

    Raises:
      NaloraError: the line differs from its digest.
    """
    try:
        with (folder / METRICS).open(encoding="utf-8") as lines:
            header = json.loads(lines.readline())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(header, dict):
        return {}
    return unseal(header, f"{folder / METRICS}: line 1")


def was_trained_in_turns(adapter: Path) -> bool | None:
    """Returns True if a chat template wrote the adapter's training texts; None if unknown.

    Args:
      adapter: folder in PEFT's format.
    """
    header = _header(adapter.parent)
    settings = _recorded(header, "run", "data", dict)
    if settings is not None and settings.get("chat") is True:
        return True
    return _recorded(header, "data", "in_turns", bool)


def find_adapter(path: Path) -> Path | None:
    """Returns the folder of an adapter, or of a run's adapter, copied if it is in a bucket."""
    url = buckets.bucket_url(path)
    if url is not None:
        if url.endswith(".gguf"):
            return None
        return _copied_adapter(url)
    # A hub id or a long text may be no valid path.
    if not can_exist(path / ADAPTER / CONFIG_NAME):
        return None
    for folder in (path, path / ADAPTER):
        if (folder / CONFIG_NAME).is_file():
            return folder
    return None


def _copied_adapter(url: str) -> Path | None:
    """Returns the cached copy of an adapter in a bucket; None if the bucket's folder has none."""
    names = buckets.names(url)
    if CONFIG_NAME in names:
        return buckets.local_folder(names, url)
    if not buckets.exists(f"{url}/{ADAPTER}/{CONFIG_NAME}"):
        return None
    of_adapter = [f"{ADAPTER}/{name}" for name in buckets.names(f"{url}/{ADAPTER}")]
    # The run's log has its settings, which are read with the adapter.
    of_run = [name for name in names if name == METRICS]
    return buckets.local_folder([*of_adapter, *of_run], url) / ADAPTER
