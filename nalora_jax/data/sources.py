"""Opens records by index from files, TFDS, the hub, this library's tasks, and mixtures of them.

A record is a plain dict: text as ``str``, numbers as ``int`` or ``float``, sequences as lists.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.buckets import is_url
from nalora_jax.common.files import expand_user
from nalora_jax.common.registry import Registry
from nalora_jax.config import DataConfig
from nalora_jax.data import tasks
from nalora_jax.data.data_files import RecordFile, is_path, open_rows, splits_of
from nalora_jax.data.packing import permutation
from nalora_jax.data.source import (
    JoinedSource,
    MixedSource,
    Record,
    SelectedSource,
    Source,
    components,
    foreign_errors,
    require_some,
)
from nalora_jax.data.tfds_source import (
    TfdsSource,
    absolute_of,
    folder_source,
    is_tfds_folder,
    open_tfds,
    splits_in,
    task_source,
)
from nalora_jax.errors import NaloraError

_COMPARED = 16  # records of each source in a comparison
AUTO_SPLIT = "auto"  # evaluation split "auto"; see `open_pair`

# Opens ``NAME:ARGUMENT`` of a data set's name: (argument, split) -> source.
Opener = Callable[[str, str], Source]
_OPENERS: Registry[Opener] = Registry(
    "data source",
    "nalora_jax.sources",
    modules={"reasoning_gym": "nalora_jax.data.reasoning_gym_tasks"},
)


def register_source(name: str) -> Callable[[Opener], Opener]:
    """Returns a decorator that makes a function ``(argument, split) -> Source`` selectable.

    ``--data.dataset NAME`` or ``NAME:ARGUMENT`` calls it once for every split that a run reads.
    """
    return _OPENERS.decorator(name)


def open_source(
    config: DataConfig,
    split: str,
    *,
    source: Mapping[str, Source] | None = None,
    weighted: bool = False,
) -> Source:
    """Returns the records of ``split`` of ``config.dataset``; a mixture's sets are concatenated.

    Args:
      config: its ``dataset`` is a task of this library ("socialiqa", "socialiqa_mc", ...),
        ``"tfds:<name>"`` with any name that TFDS accepts, ``"hf:<org>/<name>"`` of the hub, the
        path or URL (``gs://``, ``s3://``) of a file, a folder or a pattern, or ``NAME`` or
        ``NAME:ARGUMENT`` of a registered source (`register_source`); or several of these with
        weights (`nalora_jax.data.source`).
      split: a TFDS split expression; for files also the path of another file.
      source: sources by split, in place of the data set in ``config``.
      weighted: apply the weights of a mixture, as for training.

    Raises:
      NaloraError: no such data set, split or file, or it is empty.
    """
    if source is not None:
        if split not in source:
            found = ", ".join(sorted(source)) or "none"
            raise NaloraError("source", expected=f"a split {split!r}", found=found)
        require_some(source[split])
        return source[split]
    several = components(config.dataset)
    if is_path(split):  # the same file for all
        several = several[:1]
    opened = [_open_one(replace(config, dataset=name), split) for name, _ in several]
    return _mixed(opened, [weight if weighted else 1.0 for _, weight in several])


def _open_one(config: DataConfig, split: str) -> Source:
    """Opens ``split`` of the single data set ``config.dataset``, as of `open_source`."""
    name = config.dataset
    scheme, _, argument = name.partition(":")
    if scheme in _OPENERS:
        opened = _OPENERS.get(scheme)(argument, split)
    elif scheme == "hf":
        opened = open_hub(argument, split)
    elif scheme == "tfds":
        opened = TfdsSource(
            name, split, lambda: open_tfds(argument, split, config.data_dir)
        )
    elif name in tasks.NAMES or scheme == "needle":
        return task_source(name, split)
    elif is_path(split):
        return FileSource(split)
    elif is_tfds_folder(name):
        opened = folder_source(name, split)
    elif is_path(name):
        return FileSource(name, split)
    else:
        near = difflib.get_close_matches(name, tasks.NAMES, 1)
        expected = (
            'a task of this library, "tfds:<name>", "hf:<org>/<name>" '
            "or the path of a file or folder"
        )
        remedy = f"the tasks are {', '.join((*tasks.NAMES, 'needle:WORDS'))}"
        if near:
            remedy = f"did you mean {near[0]}? {remedy}"
        raise NaloraError(
            "--data.dataset", expected=expected, found=repr(name), remedy=remedy
        )
    require_some(opened)
    return opened


def open_pair(
    config: DataConfig, *, source: Mapping[str, Source] | None = None
) -> tuple[Source, Source]:
    """Returns the training records and the held-out records.

    If ``config.eval_split`` is "auto", the held-out records are the data set's split "validation"
    or, without one, a fixed draw from ``config.train_split`` (`draw_held_out`). Each
    data set of a mixture is divided separately; weights apply only to training.

    Arguments are those of `open_source`.

    Raises:
      NaloraError: as of `open_source`; or the two share records.
    """
    if config.eval_split != AUTO_SPLIT:
        train = open_training(config, source=source)
        held = open_source(config, config.eval_split, source=source)
        # equal splits measure the training fit
        if config.train_split != config.eval_split:
            for part, other in itertools.product(train.parts, held.parts):
                check_disjoint(part, other)
        return train, held
    if source is not None:
        several = [(config.dataset, 1.0)]
    else:
        several = components(config.dataset)
    trained = []
    held_out = []
    for name, _ in several:
        train, held = _divided(replace(config, dataset=name), source)
        trained.append(train)
        held_out.append(held)
    mixture = _mixed(trained, [weight for _, weight in several])
    return mixture, _mixed(held_out, [1.0] * len(held_out))


def open_training(
    config: DataConfig, *, source: Mapping[str, Source] | None = None
) -> Source:
    """Returns the training records of `open_pair`; an evaluation split that is named is not
    opened."""
    if config.eval_split == AUTO_SPLIT:
        return open_pair(config, source=source)[0]
    return open_source(config, config.train_split, source=source, weighted=True)


def _mixed(sources: Sequence[Source], weights: list[float]) -> Source:
    """Returns the mixture of sources, or the source itself if it is one with weight 1."""
    if weights == [1.0]:
        return sources[0]
    return MixedSource(sources, weights)


def open_held_out(
    config: DataConfig, split: str, *, source: Mapping[str, Source] | None = None
) -> Source:
    """Returns the records of an evaluation split, which may be "auto"."""
    if split != AUTO_SPLIT:
        return open_source(config, split, source=source)
    return open_pair(replace(config, eval_split=AUTO_SPLIT), source=source)[1]


def split_to_measure(config: DataConfig) -> str:
    """Returns the split to evaluate of data not trained on: "validation", else all of "train"."""
    train = open_source(config, "train")
    if all("validation" in part.siblings for part in train.parts):
        return "validation"
    return "train"


def _divided(
    config: DataConfig, source: Mapping[str, Source] | None
) -> tuple[Source, Source]:
    """Returns training and held-out records of one data set: its split "validation", or without one
    a draw from the training records."""
    train = open_source(config, config.train_split, source=source)
    name = "validation"
    if source is not None:
        if name in source:
            return train, source[name]
        return draw_held_out(train)
    if config.dataset.partition(":")[0] not in _OPENERS:
        if name in train.siblings:
            return (train, open_source(config, name))
        return draw_held_out(train)
    try:  # a registered source may refuse a split, or return the same records for all
        validation = open_source(config, name)
        check_disjoint(train, validation)
    except NaloraError:
        return draw_held_out(train)
    return train, validation


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
                    remedy='hold some out, e.g. --data.train-split "train[:-5%]" '
                    '--data.eval-split "train[-5%:]"',
                )


def have_same_records(train: Source, held_out: Source) -> bool:
    """Returns True if both sources have as many records, and equal records at 16 positions."""
    if len(train) != len(held_out):
        return False
    spread = np.linspace(0, len(train) - 1, _COMPARED)
    places = np.unique(spread.round().astype(int)).tolist()
    return repr(train.read(places)) == repr(held_out.read(places))


class HubSource(Source):
    """One split expression of a data set that `datasets` has loaded.

    Args:
      name: for messages.
      split: a split expression in the syntax that TFDS and `datasets` share.
      data: a `datasets.Dataset`.
      siblings: splits of the data set.
    """

    def __init__(
        self, name: str, split: str, data: Any, siblings: Sequence[str]
    ) -> None:
        """Finds the parts of the underlying splits that the expression selects."""
        self._data = data
        self.dataset = name
        self.name = f"{name}[{split}]"
        self.siblings = tuple(siblings)
        self.fingerprint = f"hf:{data._fingerprint}"  # covers files and transformations
        sizes = {
            each: about.num_examples for each, about in (data.info.splits or {}).items()
        }
        self.spans = absolute_of(split, sizes or {split: len(data)})

    def __len__(self) -> int:
        return len(self._data)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``."""
        columns = self._data[list(map(int, indices))]
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


def open_hub(argument: str, split: str) -> Source:
    """Opens a split of ``ORG/NAME[:CONFIG]``, downloaded on first use into the cache of `datasets`.

    Code of a data set is never executed.

    Raises:
      NaloraError: the extra is not installed, or the data set is not available.
    """
    dataset = f"hf:{argument}"
    try:
        import datasets
    except ImportError as error:
        raise NaloraError(
            dataset,
            expected="the library datasets",
            found="none",
            remedy="pip install datasets (or nalora_jax with its extra `datasets`)",
        ) from error
    name, _, config = argument.partition(":")
    remedy = (
        "check the id, its config (hf:ORG/NAME:CONFIG) and the split; "
        "a private data set needs HF_TOKEN"
    )
    with foreign_errors(
        f"{dataset}[{split}]", "a data set that can be loaded from the hub", remedy
    ):
        names = datasets.get_dataset_split_names(name, config or None)
        data = datasets.load_dataset(name, config or None, split=split)
    return HubSource(dataset, split, data, names)


class FileSource(JoinedSource):
    """Records of files, or the subset that a split expression selects.

    Args:
      path: a file, a pattern or a folder, also in a bucket; see `nalora_jax.data.data_files`.
      split: an expression over the splits that `files.splits_of` returns for the path; a single
        file has one split, "train".
      opened: files by split in place of the path's.

    Raises:
      NaloraError: on opening, if a file is missing, broken or empty, or the expression is invalid
        or selects no records.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        opened: Mapping[str, Sequence[RecordFile]] | None = None,
    ) -> None:
        """Opens the files, and finds the records that the expression selects."""
        self.siblings = ("train",)
        if opened is None:
            files = splits_of(str(path))
            self.siblings = tuple(files)
            asked = splits_in(split)
            chosen = [name for name in files if {name, "all"} & asked]
            opened = {name: list(map(open_rows, files[name])) for name in chosen}
        if is_url(path):
            self.dataset = str(path)
        else:
            self.dataset = str(expand_user(path).resolve())
        self.name = f"{path}[{split}]"
        names = ", ".join(self.siblings)
        if names == "train":
            names = 'one split, "train"'
        expected = f'{names}, or slices such as "train[-5%:]"'
        with foreign_errors(self.name, expected, "name a split that is there"):
            sizes = {name: sum(map(len, rows)) for name, rows in opened.items()}
            self.spans = absolute_of(split, sizes)
        members = list(chain.from_iterable(opened.values()))
        # Records are numbered through all files: first number of each split, numbers of the
        # selected records, and first number of each file.
        starts = np.cumsum([0, *sizes.values()]).tolist()
        first = dict(zip(opened, starts, strict=False))
        numbers = np.concatenate(
            [first[name] + np.arange(start, stop) for name, start, stop in self.spans]
        )
        bounds = np.cumsum([0, *map(len, members)])
        file_of = np.searchsorted(bounds, numbers, side="right") - 1
        super().__init__(members, file_of, numbers - bounds[file_of])
        digests = ":".join(member.sha256 for member in members)
        self.fingerprint = f"files:{digests}:{split}"
        require_some(self)


# ---------------------------------------------------------------- held-out records


# share and maximum of held-out records without a split
_SHARE = 0.05
MOST_HELD_OUT = 500
# few records: at least 20, at most a fifth of them
ENOUGH = 20
LARGEST_SHARE = 0.2
_FEWEST = 4
# The same draw in every run, so that runs with different seeds are evaluated on the same records.
_SEED = 20260101


def draw_held_out(source: Source) -> tuple[Source, Source]:
    """Divides records into training and evaluation records: 5%, at most 500; at least 20, but at
    most a fifth.

    Example: 12 of 60, 20 of 100 and of 400, 50 of 1,000, 500 of 10,000 and more; at least two.

    Raises:
      NaloraError: fewer than four records.
    """
    if len(source) < _FEWEST:
        raise NaloraError(
            source.name,
            expected=f"at least {_FEWEST} records, of which two are held out",
            found=len(source),
            remedy="add records, or name others to measure on by --data.eval-split",
        )
    size = len(source)
    enough = min(ENOUGH, round(LARGEST_SHARE * size))
    count = min(max(round(_SHARE * size), enough, 2), MOST_HELD_OUT)
    order = permutation(size, _SEED)
    parts = []
    for indices in (order[count:], order[:count]):
        what = f"{len(indices)} of {size} records"
        parts.append(SelectedSource(source, np.sort(indices), what))
    remaining, held = parts
    return remaining, held
