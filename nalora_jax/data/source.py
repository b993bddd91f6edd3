"""What a source of records is, and the simplest one: records that lie in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from nalora_jax.errors import NaloraError

Record = dict[str, Any]
# A contiguous part of a split: its name, first index and the index after the last.
Span = tuple[str, int, int]


class TableRecord(dict[str, Any]):
    """A record of an Arrow table, in which a null may mean that the record does not have the field."""


class Source(ABC):
    """Records of one split expression, by index.

    Attributes:
      name: for messages, e.g. ``"socialiqa[train]"``.
      dataset: what the splits belong to: two sources overlap only if this and their spans do.
      fingerprint: changes whenever the records could have.
      siblings: splits that the data set has, where that is known.
    """

    name: str
    dataset: str
    fingerprint: str
    siblings: tuple[str, ...] = ()

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

    @property
    def parts(self) -> list[Source]:
        """The sources that this one is put together from: itself, where it is not."""
        return [self]


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


def require_some(source: Source) -> None:
    """Refuses a source without records.

    Raises:
      NaloraError: there are none.
    """
    if len(source) == 0:
        raise NaloraError(source.name, expected="at least one record", found="none", remedy="choose another split")


@contextlib.contextmanager
def foreign_errors(where: str, expected: str, remedy: str) -> Iterator[None]:
    """Says what another library says (TFDS and Arrow raise many types, in paragraphs) as this library's error."""
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        found = str(error).strip().splitlines() or [type(error).__name__]
        raise NaloraError(where, expected=expected, found=found[0], remedy=remedy) from error
