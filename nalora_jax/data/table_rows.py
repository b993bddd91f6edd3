"""Rows of Parquet and Arrow files with random access."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.data.digests import data_digest
from nalora_jax.data.source import Record, TableRecord, foreign_errors

_OPEN_GROUPS = 2  # decoded row groups of a Parquet file that stay in memory


class TableRows:
    """Rows of a Parquet file, decoded by row group on demand, or of a memory-mapped Arrow file.

    Args:
      path: path of the file, or the URL of a Parquet file in a bucket.
      name: name of the file in messages.
    """

    def __init__(self, path: Path | str, name: str = "") -> None:
        self._name = name or str(path)
        self.sha256 = data_digest(path)
        self._open: OrderedDict[int, Any] = OrderedDict()
        with self._errors():
            sizes, self._groups = _parquet(path) if self._kind == ".parquet" else _arrow(Path(path))
        self._ends = np.cumsum([0, *sizes])

    @property
    def _kind(self) -> str:
        return PurePath(self._name).suffix.lower()

    def _errors(self) -> Any:
        return foreign_errors(self._name, f"a readable {self._kind[1:]} file", "write it again")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the rows at ``indices``; each row group is decoded once per call."""
        import pyarrow as pa

        places = np.asarray(indices, np.int64)
        groups = np.searchsorted(self._ends, places, side="right") - 1
        records: list[Record] = [{}] * len(places)
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            with self._errors():
                rows = self._group(group).take(pa.array(places[at] - self._ends[group])).to_pylist()
            for position, row in zip(at.tolist(), rows, strict=True):
                records[position] = TableRecord(row)
        return records

    def _group(self, number: int) -> Any:
        if number not in self._open:
            rows = self._groups[number]()
            # Arrow trusts a file's offsets: without validation, a damaged file causes reads outside
            # its memory.
            rows.validate(full=True)
            self._open[number] = rows
            if len(self._open) > _OPEN_GROUPS:
                self._open.popitem(last=False)
        return self._open[number]

    def where(self, index: int) -> str:
        """Returns ``path, row n``, counted from 1."""
        return f"{self._name}, row {range(len(self))[index] + 1}"


Groups = tuple[list[int], list[Callable[[], Any]]]


def _parquet(path: Path | str) -> Groups:
    """Returns the sizes of a Parquet file's row groups, and the functions that decode them."""
    import pyarrow.parquet as pq

    source = buckets.opened(path) if isinstance(path, str) else path
    about = pq.read_metadata(source, memory_map=True)
    file = pq.ParquetFile(source, metadata=about, memory_map=True, read_dictionary=_coded_texts(about))
    count = file.num_row_groups
    return [about.row_group(i).num_rows for i in range(count)], [
        partial(file.read_row_group, i) for i in range(count)
    ]


def _coded_texts(about: Any) -> list[str]:
    """Returns the paths of the dictionary-encoded text columns, which stay encoded in memory.

    Decoding would repeat a text for every row that has it: a file of 2 kB can expand to gigabytes.
    """
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    columns = [(number, about.schema.column(number)) for number in range(len(about.schema))]
    return [
        column.path
        for number, column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.logical_type.type in ("STRING", "NONE")
        and any(group.column(number).has_dictionary_page for group in groups)
    ]


def _arrow(path: Path) -> Groups:
    """Returns the record batches of an Arrow file or a stream written by datasets, as `Groups`."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        reader: Any = pa.ipc.open_file(mapped)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid:
        mapped.seek(0)
        batches = list(pa.ipc.open_stream(mapped))
    return [batch.num_rows for batch in batches], [
        partial(pa.Table.from_batches, [batch]) for batch in batches
    ]
