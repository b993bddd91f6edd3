"""Paths in a protocol, which are relative to its folder; names of models and data sets stay as they
are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nalora_jax.common import buckets
from nalora_jax.common.files import expand_user
from nalora_jax.config import RunConfig
from nalora_jax.data.data_files import DATA_FILE_EXTENSIONS
from nalora_jax.data.source import components
from nalora_jax.errors import NaloraError


def locate_settings(config: RunConfig, folder: Path) -> RunConfig:
    """Returns settings whose model, data set and splits are found from the current folder.

    Args:
      config: of a run, as its protocol names them.
      folder: of the study.

    Raises:
      NaloraError: a path exists relative to the current folder only.
    """
    data = replace(config.data, dataset=locate_dataset(config.data.dataset, folder))
    train = resolve_place(data.train_split, folder)
    held_out = resolve_place(data.eval_split, folder)
    data = replace(data, train_split=train, eval_split=held_out)
    parts = [config.model]
    if config.vision.trains_encoders:  # an image and a text encoder
        parts = config.model.split("+")
    model = "+".join(resolve_place(part, folder, is_model=True) for part in parts)
    return replace(config, model=model, data=data)


def locate_dataset(dataset: str, folder: Path) -> str:
    """Returns the text of a data set or a mixture with `resolve_place` applied to each part."""
    several = components(dataset)  # (name, weight) of each part
    if len(several) == 1 and several[0][1] == 1:  # no mixture
        return resolve_place(dataset, folder)
    return ",".join(
        f"{resolve_place(name, folder)}*{weight:g}" for name, weight in several
    )


def resolve_place(text: str, folder: Path, *, is_model: bool = False) -> str:
    """Returns a path relative to ``folder`` as seen from the current folder.

    Other names, such as a hub id, are returned unchanged.

    A text is a path if the file exists in ``folder``, or a folder whose name has a slash, or if it
    ends like a data file. A model may be a folder of any name.

    Raises:
      NaloraError: the path exists relative to the current folder only.
    """
    path = expand_user(text)
    if not text or buckets.is_url(text) or path.is_absolute():
        return text
    inside = folder / path
    is_folder = inside.is_dir() and (is_model or "/" in text)
    if inside.is_file() or is_folder:
        return str(inside)
    is_path = path.suffix.lower() in DATA_FILE_EXTENSIONS
    if (is_path or "/" in text) and path.exists():
        raise NaloraError(
            f"{folder}: {text}",
            expected="a path relative to the study's folder",
            found=f"{text} relative to the current folder only",
            remedy="change the path in the protocol, or move the file",
        )
    if is_path:
        return str(inside)
    return text
