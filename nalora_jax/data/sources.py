"""Opens records by index from files, TFDS, the hub, this library's tasks, and mixtures of them.

A record is a plain dict: text as ``str``, numbers as ``int`` or ``float``, sequences as lists.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from nalora_jax.common.downloads import cache_dir
from nalora_jax.common.registry import Registry
from nalora_jax.config import DataConfig
from nalora_jax.data import tasks
from nalora_jax.data.file_source import FileSource
from nalora_jax.data.files import is_path
from nalora_jax.data.hub_source import open_hub
from nalora_jax.data.mixture import MixedSource, Part, components
from nalora_jax.data.selected import draw_held_out
from nalora_jax.data.source import Source, require_some
from nalora_jax.data.tfds_source import (
    TfdsSource,
    folder_source,
    is_tfds_folder,
    needle_source,
    open_tfds,
    task_source,
)
from nalora_jax.errors import NaloraError

_COMPARED = 16  # records of each source in a comparison
AUTO = "auto"  # evaluation split "auto"; see `open_pair`

# Opens ``NAME:ARGUMENT`` of a data set's name: (argument, split) -> source.
Opener = Callable[[str, str], Source]
_OPENERS: Registry[Opener] = Registry("data source", "nalora_jax.sources")


def register_source(name: str) -> Callable[[Opener], Opener]:
    """Returns a decorator that makes a function ``(argument, split) -> Source`` selectable.

    ``--data.dataset NAME`` or ``NAME:ARGUMENT`` calls it once for every split that a run reads.
    """
    return _OPENERS.decorator(name)


def open_source(
    config: DataConfig,
    split: str,
    *,
    cache: Path | None = None,
    source: Mapping[str, Source] | None = None,
) -> Source:
    """Returns the records of ``split`` of ``config.dataset``; a mixture's sets are concatenated.

    Args:
      config: its ``dataset`` is a task of this library ("socialiqa", "socialiqa_mc", ...),
        ``"tfds:<name>"`` with any name that TFDS accepts, ``"hf:<org>/<name>"`` of the hub, the
        path or URL (``gs://``, ``s3://``) of a file, a folder or a pattern, or ``NAME`` or
        ``NAME:ARGUMENT`` of a registered source (`register_source`); or several of these with
        weights (`nalora_jax.data.mixture`).
      split: a TFDS split expression; for files also the path of another file.
      cache: folder in which the library's tasks are prepared; `downloads.cache_dir` by default.
      source: sources by split, in place of the data set in ``config``.

    Raises:
      NaloraError: no such data set, split or file, or it is empty.
    """
    if source is not None:
        if split not in source:
            raise NaloraError(
                "source", expected=f"a split {split!r}", found=", ".join(sorted(source)) or "none"
            )
        require_some(source[split])
        return source[split]
    several = components(config.dataset)
    if len(several) > 1 and not is_path(split):
        opened = [open_source(replace(config, dataset=name), split, cache=cache) for name, _ in several]
        return MixedSource([Part(source_of_set) for source_of_set in opened])
    return _open_one(replace(config, dataset=several[0][0]), split, cache)


def _open_one(config: DataConfig, split: str, cache: Path | None) -> Source:
    """Opens one data set."""
    name = config.dataset
    scheme, _, argument = name.partition(":")
    if scheme in _OPENERS:
        opened = _OPENERS.get(scheme)(argument, split)
    elif scheme == "hf":
        opened = open_hub(argument, split)
    elif scheme == "tfds":
        opened = TfdsSource(name, split, lambda: open_tfds(argument, split, config.data_dir))
    elif name in tasks.NAMES:
        return task_source(name, split, cache or cache_dir())
    elif scheme == "needle":
        return needle_source(argument, split, cache or cache_dir())
    elif is_path(split):
        return FileSource(split)
    elif is_tfds_folder(name):
        opened = folder_source(name, split)
    elif is_path(name):
        return FileSource(name, split)
    else:
        raise NaloraError(
            "--data.dataset",
            expected='a task of this library, "tfds:<name>", "hf:<org>/<name>" or the path of a file or folder',
            found=repr(name),
            remedy=_meant(name) + "the tasks are " + ", ".join((*tasks.NAMES, "needle:WORDS")),
        )
    require_some(opened)
    return opened


def open_pair(
    config: DataConfig, *, cache: Path | None = None, source: Mapping[str, Source] | None = None
) -> tuple[Source, Source]:
    """Returns the training records and the held-out records.

    If ``config.eval_split`` is "auto", the held-out records are the data set's split "validation"
    or, without one, a fixed draw from ``config.train_split`` (`nalora_jax.data.selected`). Each
    data set of a mixture is divided separately; weights apply only to training.

    Args: as of `open_source`.

    Raises:
      NaloraError: as of `open_source`; or the two share records.
    """
    if config.eval_split != AUTO:
        train = open_train(config, cache=cache, source=source)
        held = open_source(config, config.eval_split, cache=cache, source=source)
        if config.train_split != config.eval_split:  # equal splits measure the training fit
            for trained, other in itertools.product(train.parts, held.parts):
                check_disjoint(trained, other)
        return train, held
    several = _components(config, source)
    pairs = [_divided(replace(config, dataset=name), cache, source) for name, _ in several]
    if several[0][1] == len(several) == 1:
        return pairs[0]
    parts = [Part(train, weight) for (train, _), (_, weight) in zip(pairs, several, strict=True)]
    return MixedSource(parts), MixedSource([Part(held) for _, held in pairs])


def _components(config: DataConfig, source: Mapping[str, Source] | None) -> list[tuple[str, float]]:
    """Returns names and weights of the data sets; sources in place of ``config.dataset`` are one."""
    if source is not None:
        return [(config.dataset, 1.0)]
    return components(config.dataset)


def open_train(
    config: DataConfig, *, cache: Path | None = None, source: Mapping[str, Source] | None = None
) -> Source:
    """Returns the training records of `open_pair`, without opening a separate evaluation split."""
    if config.eval_split == AUTO:
        return open_pair(config, cache=cache, source=source)[0]
    several = _components(config, source)
    sources = [
        open_source(replace(config, dataset=name), config.train_split, cache=cache, source=source)
        for name, _ in several
    ]
    if several[0][1] == len(several) == 1:
        return sources[0]
    return MixedSource([Part(opened, weight) for opened, (_, weight) in zip(sources, several, strict=True)])


def open_held_out(
    config: DataConfig,
    split: str,
    *,
    cache: Path | None = None,
    source: Mapping[str, Source] | None = None,
) -> Source:
    """Returns the records of an evaluation split, which may be "auto"."""
    if split != AUTO:
        return open_source(config, split, cache=cache, source=source)
    return open_pair(replace(config, eval_split=AUTO), cache=cache, source=source)[1]


def split_to_measure(config: DataConfig) -> str:
    """Returns the split to evaluate of data not trained on: "validation", else all of "train"."""
    ones = [
        _open_one(replace(config, dataset=name), "train", None) for name, _ in components(config.dataset)
    ]
    if all("validation" in split.siblings for split in ones):
        return "validation"
    return "train"


def _divided(
    config: DataConfig, cache: Path | None, source: Mapping[str, Source] | None
) -> tuple[Source, Source]:
    """Divides one data set into training and held-out records if no evaluation split is set."""
    train = open_source(config, config.train_split, cache=cache, source=source)
    validation = _own_validation(config, train, cache, source)
    if validation is None:
        return draw_held_out(train)
    return (train, validation)


def _own_validation(
    config: DataConfig, train: Source, cache: Path | None, source: Mapping[str, Source] | None
) -> Source | None:
    """Returns the split "validation" if it exists and differs from the training split."""
    name = "validation"
    if source is not None:
        return source.get(name)
    if config.dataset.partition(":")[0] not in _OPENERS:
        if name in train.siblings:
            return open_source(config, name, cache=cache)
        return None
    try:  # a registered source may refuse a split, or return the same records for all
        validation = open_source(config, name, cache=cache)
        check_disjoint(train, validation)
    except NaloraError:
        return None
    return validation


def check_disjoint(train: Source, held_out: Source) -> None:
    """Refuses an evaluation split that shares records with the training split.

    Raises:
      NaloraError: the two expressions overlap.
    """
    if train.dataset != held_out.dataset:
        return
    for split, start, stop in train.spans:
        for other, first, last in held_out.spans:
            shared = min(stop, last) - max(start, first)
            if split == other and shared > 0:
                raise NaloraError(
                    "--data.eval-split",
                    expected=f"records that {train.name} does not train on",
                    found=f"{held_out.name}, which shares {shared} with it",
                    remedy='hold some out, e.g. --data.train-split "train[:-5%]" --data.eval-split "train[-5%:]"',
                )


def have_same_records(train: Source, held_out: Source) -> bool:
    """Returns True if both sources have as many records, and equal records at 16 positions."""
    if len(train) != len(held_out):
        return False
    places = np.unique(np.linspace(0, len(train) - 1, _COMPARED).round().astype(int)).tolist()
    return repr(train.read(places)) == repr(held_out.read(places))


def _meant(name: str) -> str:
    """Returns the start of a remedy that suggests the task with a similar name."""
    near = difflib.get_close_matches(name, tasks.NAMES, 1)
    return f"did you mean {near[0]}? " if near else ""
