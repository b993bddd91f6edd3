"""Shared by subcommands: checks of output paths, data settings and the mesh."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from etils import epy

from nalora_jax.common import buckets, uploads
from nalora_jax.common.folders import refuse_claimed
from nalora_jax.config import DataConfig, MeshConfig, config_from_dict
from nalora_jax.errors import Interrupted, NaloraError

with epy.lazy_imports():  # on first use: help needs no JAX
    import jax

    from nalora_jax.loading import located
    from nalora_jax.mesh import distributed
    from nalora_jax.train import preemption


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh | None:
    """Returns the mesh over as many devices as its axes need (-1: all); None for one device."""
    return distributed.multi_device_mesh(distributed.smallest_mesh(config))


def is_dual(model: str | Path, adapter: str | Path | None = None) -> bool:
    """Returns True if the model or adapter is from a run that trained a dual encoder."""
    run = config_from_dict(located.locate(model, adapter).run)
    return run.vision.trains_encoders


def name_model(base: str, adapter: Path | None) -> str:
    """Returns the names of a base and its adapter in one line."""
    if adapter is None:
        return base
    return f"{base} + {adapter}"


def add_label(title: str, label: str) -> str:
    """Returns ``title``, followed by a label if there is one."""
    if label:
        return f"{title}, {label}"
    return title


def data_settings(run: Mapping[str, Any], changes: dict[str, Any]) -> DataConfig:
    """Returns the data settings of the adapter's run, else defaults, with the user's changes."""
    changed = {name: value for name, value in changes.items() if value is not None}
    return replace(config_from_dict(run).data, **changed)


def name_output(path: Path) -> str:
    """Returns an --output as the user wrote it; `Path` drops a slash of a URL."""
    return buckets.bucket_url(path) or str(path)


@contextlib.contextmanager
def remove_if_stopped() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C end the block as errors do, so that unfinished outputs are removed.

    Raises:
      Interrupted: a signal arrived.
    """
    try:
        with preemption.stop_signals():
            yield
    except Interrupted as stopped:
        raise Interrupted(
            stopped.signal, resume="no unfinished output was left"
        ) from None


def refuse_existing(folder: Path) -> None:
    """Refuses a non-empty --output folder before a model is loaded.

    Raises:
      NaloraError: the folder has content, a file has its name, or another process writes to it.
    """
    if (where := buckets.bucket_url(folder)) is not None:
        uploads.require_free(where)
        return
    check_new_path("--output", folder)
    refuse_claimed(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NaloraError(
            "--output",
            expected="a new or empty folder",
            found=f"{folder}",
            remedy="choose another --output; nothing was changed",
        )


def check_new_path(flag: str, path: Path) -> None:
    """Refuses a path that cannot be created: its name is too long, or it is below a file.

    Raises:
      NaloraError: names the flag.
    """
    existing = (folder for folder in path.absolute().parents if folder.exists())
    above = next(existing, None)  # the nearest folder that exists
    if above is not None and not above.is_dir():
        raise NaloraError(
            flag, expected="a path in a folder", found=f"{path}, and {above} is a file"
        )
    if above is not None and not path.exists() and not os.access(above, os.W_OK):
        raise NaloraError(
            flag,
            expected="a folder that can be written",
            found=f"{above}, which cannot",
        )


def check_new_file(flag: str, path: Path | None) -> None:
    """Refuses a file that exists or cannot be created; None: the file was not requested.

    Raises:
      NaloraError: names the flag.
    """
    if path is None:
        return
    check_new_path(flag, path)
    if path.exists():
        raise NaloraError(
            flag,
            expected="a new file",
            found=f"{path}, which exists",
            remedy="choose another name",
        )


@contextlib.contextmanager
def name_flags_of(dataset: str) -> Iterator[None]:
    """Replaces the names of a run's data settings in errors by the subcommand's flags.

    ``dataset`` is the flag of the data set.
    """
    names = {
        "--data.dataset": dataset,
        "--data.eval-split": "--split",
        "--data.eval-limit": "--limit",
    }
    try:
        yield
    except NaloraError as error:
        if error.where not in names:
            raise
        flag = names[error.where]
        raise NaloraError(
            flag, expected=error.expected, found=error.found, remedy=error.remedy
        ) from error
