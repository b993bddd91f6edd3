"""The interface of record sources, and the simplest source: records in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from nalora_jax.errors import NaloraError

Record = dict[str, Any]
# Contiguous part of a split: its name, first index and the index after the last.
Span = tuple[str, int, int]


class TableRecord(dict[str, Any]):
    """A record of an Arrow table, in which a null may mean that the record does not have the field."""


class Source(ABC):
    """Records of one split expression, by index.

    Attributes:
      name: for messages, e.g. ``"socialiqa[train]"``.
      dataset: data set of the splits: two sources overlap only if it is equal and their spans
        overlap.
      fingerprint: changes whenever the records could have changed.
      siblings: splits of the data set, if known.
    """

    name: str
    dataset: str
    fingerprint: str
    siblings: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    @property
    @abstractmethod
    def spans(self) -> list[Span]:
        """Returns the parts of the underlying splits that this source reads."""

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
        self.name = self.dataset = name
        self._records = list(records)
        text = json.dumps(self._records, sort_keys=True, default=str)
        self.fingerprint = f"records:{name}:{hashlib.sha256(text.encode()).hexdigest()}"
        require_some(self)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``."""
        return [self._records[int(index)] for index in indices]

    @property
    def spans(self) -> list[Span]:
        """Returns one span over all records."""
        return [("records", 0, len(self))]


def require_some(source: Source) -> None:
    """Refuses a source without records.

    Raises:
      NaloraError: the source is empty.
    """
    if len(source) == 0:
        raise NaloraError(
            source.name, expected="at least one record", found="none", remedy="choose another split"
        )


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
        raise NaloraError(where, expected=expected, found=lines[0], remedy=remedy) from error
