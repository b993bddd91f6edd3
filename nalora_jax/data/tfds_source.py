"""Data sets of TFDS, including this library's tasks, read without TensorFlow."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.digests import digest_of
from nalora_jax.common.downloads import cache_dir
from nalora_jax.data import tasks
from nalora_jax.data.data_files import DATA_FILE_EXTENSIONS
from nalora_jax.data.source import Record, Source, Span, foreign_errors
from nalora_jax.errors import NaloraError

_FEATURES = "features.json"  # every folder that TFDS prepared has it


class TfdsSource(Source):
    """One split expression of a TFDS data set, opened when first read, without TensorFlow.

    Args:
      name: for messages.
      split: TFDS split expression.
      opener: returns the random-access source of the split, whose ``dataset_info`` describes it.
      fingerprint: fingerprint if known without opening; otherwise computed from the files.
      siblings: splits of the data set, if known without opening.
      encoded: field whose values stay bytes.
      timed: a data set that is prepared again is another one, since TFDS stores no checksum of its
        files.
    """

    def __init__(
        self,
        name: str,
        split: str,
        opener: Callable[[], Any],
        fingerprint: str = "",
        siblings: Sequence[str] = (),
        *,
        encoded: str = "",
        timed: bool = True,
    ) -> None:
        """Sets the attributes of a `Source`; opens the data set if the fingerprint or siblings are
        not given."""
        self.dataset = name
        self.name = f"{name}[{split}]"
        self._split = split
        self._opener = opener
        self._encoded = encoded
        self.fingerprint = fingerprint or f"{self._content_fingerprint(timed)}:{split}"
        self.siblings = tuple(siblings or self.info.splits)

    @cached_property
    def _data(self) -> Any:
        """Returns the random-access source of the split, opened on first use."""
        remedy = (
            "check the name, its config and the split (tensorflow.org/datasets/splits)"
        )
        with tfds_errors(self.name, remedy):
            data = self._opener()
        return data

    @property
    def info(self) -> Any:
        """Returns TFDS's description of the data set."""
        return self._data.dataset_info

    def _content_fingerprint(self, timed: bool) -> str:
        """Returns ``tfds:NAME:DIGEST``, the digest of the prepared files' description.

        With ``timed`` the digest includes the description's time of modification.
        """
        import tensorflow_datasets as tfds

        path = tfds.core.Path(self.info.data_dir) / "dataset_info.json"
        stamp = str(path.stat().mtime).encode() if timed else b""
        return f"tfds:{self.info.full_name}:{digest_of(path.read_bytes() + stamp)}"

    def __len__(self) -> int:
        return len(self._data)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``, decoded to plain Python."""
        with tfds_errors(self.name, "prepare the data set again"):
            values = self._data.__getitems__([int(index) for index in indices])
        return list(map(self._record, values))

    def _record(self, value: Mapping[str, Any]) -> Record:
        return {name: self._plain(name, member) for name, member in value.items()}

    def _plain(self, name: str, value: Any) -> Any:
        """Returns the value of the field ``name`` as plain Python; of the encoded field as
        bytes."""
        if name == self._encoded:
            if isinstance(value, bytes):
                return value
            return bytes(np.asarray(value).item())
        return plain_feature(value)

    @property
    def spans(self) -> list[Span]:  # type: ignore[override]
        """Returns parts of the data set's splits."""
        with tfds_errors(self.name, "see tensorflow.org/datasets/splits"):
            return absolute(self._split, self.info.splits)


def is_tfds_folder(name: str) -> bool:
    """Returns True for the folder of a data set's version that TFDS prepared, also in a bucket."""
    if buckets.is_url(name):
        is_file = "*" in name or PurePath(name).suffix.lower() in DATA_FILE_EXTENSIONS
        return not is_file and _FEATURES in buckets.names(name)
    return (Path(name).expanduser() / _FEATURES).is_file()


def folder_source(name: str, split: str) -> Source:
    """Returns the split of a folder that TFDS prepared; from a bucket, only its files are fetched.

    Raises:
      NaloraError: the folder cannot be fetched or read, or has no such split.
    """
    if not buckets.is_url(name):
        folder = Path(name).expanduser()
        return TfdsSource(name, split, partial(_open_folder, folder, split))
    asked = splits_in(split)
    files = []
    for file in buckets.files(name):
        # pond-train.array_record-00000-of-00001
        match = re.search(r"-(\w+)\.\w+-\d+-of-\d+$", file)
        if match is None or match[1] in asked or "all" in asked:
            files.append(file)
    versions = "".join(map(buckets.version, files))
    fingerprint = f"tfds:{name}:{digest_of(versions)}:{split}"
    opener = lambda: _open_folder(buckets.local_folder(files), split)  # noqa: E731
    return TfdsSource(name, split, opener, fingerprint)


def _open_folder(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split=split)


def task_source(name: str, split: str) -> Source:
    """Returns a task of this library, or ``needle:WORDS`` (`nalora_jax.data.tasks`), prepared on
    first use.

    Its fingerprint is known unopened because the package is pinned.

    Raises:
      NaloraError: there are no texts of this length, or there is no such split.
    """
    kind, _, words = name.partition(":")
    needle = kind == "needle"
    if needle:
        lengths = list(map(str, tasks.LENGTHS))
        if words not in lengths:
            raise NaloraError(
                "--data.dataset",
                expected=f"needle:WORDS, with WORDS one of {', '.join(lengths)}",
                found=repr(name),
            )
        sizes = tasks.NEEDLE_SIZES
        version = f"{name}:{tasks.NEEDLE_VERSION}"
    else:
        task, _ = tasks.task_of(name)
        sizes = tasks.SIZES[task]
        version = f"commonsense/{name}:{tasks.VERSION}"
    if not splits_in(split) <= {*sizes, "all"}:
        raise NaloraError(
            f"{name}, split",
            expected=f"one of {', '.join(sizes)}, or a slice",
            found=repr(split),
        )

    def builder() -> Any:
        """Returns the TFDS builder of the task."""
        from nalora_jax.data.builders import Commonsense, Needle

        options = {"data_dir": cache_dir() / "tfds", "file_format": "array_record"}
        if needle:
            return Needle(config=words, **options)
        return Commonsense(config=name, **options)

    fingerprint = f"{version}:{tasks.WHEEL_SHA256}:{split}"
    opener = lambda: prepared(builder).as_data_source(split=split)  # noqa: E731
    return TfdsSource(name, split, opener, fingerprint, tuple(sizes))


def prepared(builder: Callable[[], Any]) -> Any:
    """Returns a TFDS builder of this library with its data prepared on first use (seconds),
    atomically by a rename."""
    finished = Path(builder().data_dir) / "dataset_info.json"
    if not finished.exists():
        try:
            with _tfds_output():
                builder().download_and_prepare()
        except OSError:
            if not finished.exists():  # else another process wrote it first
                raise
    return builder()


def open_tfds(name: str, split: str, data_dir: str, **options: Any) -> Any:
    """Returns random access to a split of any TFDS data set, prepared on first use."""
    import tensorflow_datasets as tfds

    with _tfds_output():
        return tfds.data_source(name, split=split, data_dir=data_dir or None, **options)


@contextlib.contextmanager
def _tfds_output() -> Iterator[None]:
    """Redirects TFDS's prints, as stdout is a command's result; shows bars only on terminals."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def tfds_errors(where: str, remedy: str) -> Iterator[None]:
    """Raises TFDS's errors as NaloraErrors."""
    with foreign_errors(where, "a readable TFDS data set", remedy):
        try:
            yield
        except ImportError as error:
            raise NaloraError(
                where,
                expected="a data set that TFDS prepares without TensorFlow",
                found=error,
                remedy='prepare it elsewhere with file_format="array_record" '
                "and name its folder by --data.data-dir",
            ) from error


def absolute(split: str, splits: Any) -> list[Span]:
    """Returns the index ranges that a split expression selects, in its order."""
    import tensorflow_datasets as tfds

    spans = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits):
        end = part.to
        if end is None:
            end = splits[part.splitname].num_examples
        spans.append((part.splitname, part.from_ or 0, end))
    return spans


def absolute_of(split: str, sizes: Mapping[str, int]) -> list[Span]:
    """Returns `absolute` when only the splits' sizes are known."""
    if split in sizes:
        return [(split, 0, sizes[split])]
    import tensorflow_datasets as tfds  # only slices need it

    infos = {
        n: tfds.core.SplitInfo(name=n, shard_lengths=[size], num_bytes=0)
        for n, size in sizes.items()
    }
    return absolute(split, infos)


def plain_feature(value: Any) -> Any:
    """Returns a decoded TFDS feature as plain Python; bytes that are not text stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {name: plain_feature(member) for name, member in value.items()}
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        return value.tolist()
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_feature(member) for member in value]
    return value


def splits_in(expression: str) -> set[str]:
    """Returns the names of the splits in an expression: train and test of ``train[:10%]+test``."""
    return {piece.split("[")[0].strip() for piece in expression.split("+")}
