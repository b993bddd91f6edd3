"""The interface of record sources, records in memory, and mixtures of sources.

    --data.dataset a.jsonl*3,b.parquet*0.5,socialiqa

A weight is the number of times that an epoch contains each record of a data set. 3 means three
times; 0.5 means half of the records, drawn once by a fixed seed; the default is 1. A mixture is
therefore a fixed list of records, and shuffling, packing, limits and resuming work as for any other
source.
"""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.config.checks import check_path, is_valid_path
from nalora_jax.data.packing import permutation
from nalora_jax.errors import NaloraError

Record = dict[str, Any]
# Contiguous part of a split: its name, first index and the index after the last.
Span = tuple[str, int, int]
RecordChange = Callable[[Record, str], Record]  # (record, where) -> record


class TableRecord(dict[str, Any]):
    """A record of an Arrow table, in which a null may mean that the record does not have the
    field."""


class Source(ABC):
    """Records of one split expression, by index.

    Attributes:
      name: for messages, e.g. ``"socialiqa[train]"``.
      dataset: data set of the splits: two sources overlap only if it is equal and their spans
        overlap.
      fingerprint: changes whenever the records could have changed.
      spans: parts of the underlying splits that this source reads.
      siblings: splits of the data set, if known.
    """

    name: str
    dataset: str
    fingerprint: str
    spans: list[Span]
    siblings: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``; one call for many indices is fastest."""

    def where(self, index: int) -> str:
        """Returns the name of a record in messages."""
        return f"{self.name}, record {index}"

    @property
    def parts(self) -> list[Source]:
        """Returns the sources that this source combines, or itself."""
        return [self]


class RecordsSource(Source):
    """Records in memory.

    Args:
      name: for messages, and to detect overlap: two sources with the same name overlap.
      records: plain dicts with JSON values.
    """

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        """Copies the list of records, and computes their fingerprint."""
        self.name = name
        self.dataset = name
        self._records = list(records)
        self.spans = [("records", 0, len(self._records))]
        text = json.dumps(self._records, sort_keys=True, default=str)
        self.fingerprint = f"records:{name}:{digest_of(text)}"
        require_some(self)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``."""
        return [self._records[int(index)] for index in indices]


class JoinedSource(Source):
    """Records of several parts: other sources, or files.

    Args:
      members: the parts.
      of: part of each record, int ``[records]``.
      places: index of each record in its part, int ``[records]``.
      change: ``(record, where) -> record``; by default, records stay as they are.
    """

    def __init__(
        self,
        members: Sequence[Any],
        of: np.ndarray,
        places: np.ndarray,
        change: RecordChange | None = None,
    ) -> None:
        """Sets the records; subclasses set the other attributes of a `Source`."""
        self._members = members
        self._of = of
        self._places = places
        self._change = change

    def __len__(self) -> int:
        return len(self._of)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``, with one read per part."""
        at = np.asarray(indices, np.int64)
        read = lambda part, places: self._members[part].read(places)  # noqa: E731
        records = read_in_parts(self._of[at], self._places[at], read)
        if self._change is None:
            return records
        pairs = zip(at.tolist(), records, strict=True)
        return [self._change(record, self.where(index)) for index, record in pairs]

    def where(self, index: int) -> str:
        """Returns the record's name in its part."""
        member = self._members[self._of[index]]
        return str(member.where(int(self._places[index])))


class SourceView(JoinedSource):
    """Records of another source: those at ``indices`` (by default all), possibly changed."""

    def __init__(
        self,
        base: Source,
        indices: np.ndarray | None = None,
        change: RecordChange | None = None,
    ) -> None:
        """Takes the attributes of ``base``; the fingerprint covers the indices."""
        chosen = indices
        if chosen is None:
            chosen = np.arange(len(base))
        super().__init__([base], np.zeros(len(chosen), np.int64), chosen, change)
        self.name = base.name
        self.dataset = base.dataset
        self.siblings = base.siblings
        self.spans = base.spans
        self.fingerprint = base.fingerprint
        if indices is not None:
            self.fingerprint += f":{digest_of(indices.astype('<i8').tobytes())}"


class SelectedSource(SourceView):
    """Subset of another source; ``what`` describes it in messages."""

    def __init__(self, base: Source, indices: np.ndarray, what: str) -> None:
        super().__init__(base, indices)
        self.name += f", {what}"


def require_some(source: Source) -> None:
    """Refuses a source without records.

    Raises:
      NaloraError: the source is empty.
    """
    if len(source) == 0:
        raise NaloraError(
            source.name,
            expected="at least one record",
            found="none",
            remedy="choose another split",
        )


def json_object(value: Any, where: str, remedy: str = "") -> Record:
    """Returns a JSON object, parsed if it is a text.

    Raises:
      NaloraError: the text is not JSON, or the value is not an object.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # also bad UTF-8
            raise NaloraError(
                where, expected="a JSON object", found=error, remedy=remedy
            ) from error
    if not isinstance(value, dict):
        raise NaloraError(
            where,
            expected="a JSON object",
            found=f"a {type(value).__name__}",
            remedy=remedy,
        )
    return value


def read_in_parts(
    parts: np.ndarray,
    places: np.ndarray,
    read: Callable[[int, list[int]], list[Record]],
) -> list[Record]:
    """Returns records that are in several parts; ``read(part, places)`` is called once for each
    part.

    Args:
      parts: part of each record, int ``[records]``.
      places: index of each record in its part, int ``[records]``.
      read: returns the records at some places of a part.
    """
    records: list[Record] = [{}] * len(parts)
    for part in np.unique(parts).tolist():
        at = np.flatnonzero(parts == part)
        of_part = read(part, places[at].tolist())
        for position, record in zip(at.tolist(), of_part, strict=True):
            records[position] = record
    return records


@contextlib.contextmanager
def foreign_errors(where: str, expected: str, remedy: str) -> Iterator[None]:
    """Raises another library's errors as NaloraErrors.

    TFDS and Arrow raise many types, with messages of several paragraphs.
    """
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NaloraError(
            where, expected=expected, found=lines[0], remedy=remedy
        ) from error


_SEED = 20260102  # of the draw of part of a data set: the same in every run
_MOST = 1000.0  # largest weight


class MixedSource(JoinedSource):
    """Records of several sources, each repeated or sampled by its weight.

    Args:
      sources: the sources.
      weights: number of times that an epoch contains each record of a source.

    Raises:
      NaloraError: a weight leaves no records of a source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        """Chooses the records of every source by its weight."""
        pairs = list(zip(sources, weights, strict=True))
        chosen = [_chosen(source, weight) for source, weight in pairs]
        self._counts = [len(indices) for indices in chosen]
        of = np.repeat(np.arange(len(sources)), self._counts)
        super().__init__(list(sources), of, np.concatenate(chosen))
        names = []
        for source, weight in pairs:
            name = source.name
            if weight != 1:
                name += f" * {weight:g}"
            names.append(name)
        self.name = " + ".join(names)
        self.dataset = self.name
        fingerprints = [f"{source.fingerprint}*{weight:g}" for source, weight in pairs]
        self.fingerprint = f"mixture:{'|'.join(fingerprints)}"
        self.spans = [("mixture", 0, len(self))]

    def describe(self) -> str:
        """Returns the number and share of records of each source.

        Example:
          ``"a.jsonl[train] 300 (60%), b.parquet[train] 200 (40%)"``
        """
        pairs = zip(self.parts, self._counts, strict=True)
        return ", ".join(
            f"{source.name} {count} ({share_text(count, len(self))})"
            for source, count in pairs
        )

    @property
    def parts(self) -> list[Source]:
        """Returns the sources that are mixed."""
        return list(self._members)


def share_text(count: int, total: int) -> str:
    """Returns ``count`` of ``total`` in percent; a share below 1% has one digit.

    Example:
      >>> share_text(140, 280), share_text(1, 280), share_text(1, 30_000)
      ('50%', '0.4%', '0.003%')
    """
    share = count / total
    if 0 < share < 0.01:
        return f"{100 * share:.1g}%"
    return f"{share:.0%}"


def _chosen(source: Source, weight: float) -> np.ndarray:
    """Returns the indices of a source's records, each repeated by the weight."""
    size = len(source)
    repeats, share = divmod(weight, 1)
    # 2.5: all records twice, and half of them once more
    drawn = np.sort(permutation(size, _SEED)[: round(share * size)])
    indices = np.concatenate([np.tile(np.arange(size), int(repeats)), drawn])
    if not len(indices):
        raise NaloraError(
            source.name, expected="a weight that leaves a record", found=f"{weight:g}"
        )
    return indices


def components(dataset: str) -> list[tuple[str, float]]:
    """Returns the data sets in ``--data.dataset``, with their weights.

    Example:
      >>> components("a.jsonl*3, b.parquet")
      [('a.jsonl', 3.0), ('b.parquet', 1.0)]

    Raises:
      NaloraError: a name is empty or not valid in a file system, or a weight is out of range.
    """
    for text in filter(str.strip, dataset.split(",")):
        check_path("--data.dataset", text)
    is_file = is_valid_path(dataset) and Path(dataset).exists()
    if is_file or not set(dataset) & {",", "*"}:
        return [(dataset, 1.0)]
    names = []
    for text in dataset.split(","):
        match = re.fullmatch(r"\s*(.+?)(?:\*(\d+\.?\d*|\.\d+))?\s*", text)
        if match is None or not 0 < float(match[2] or 1) <= _MOST:
            raise NaloraError(
                "--data.dataset",
                expected=f"data sets with weights in (0, {_MOST:g}], such as a.jsonl*3,b.parquet",
                found=repr(dataset),
            )
        names.append((match[1], float(match[2] or 1)))
    return names
