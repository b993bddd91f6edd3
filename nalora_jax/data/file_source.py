"""Files as a source of records; `nalora_jax.data.files` lists the formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.buckets import is_url
from nalora_jax.common.files import expand_user
from nalora_jax.data.files import RecordFile, open_rows, splits_of
from nalora_jax.data.source import Record, Source, Span, foreign_errors, require_some
from nalora_jax.data.tfds_source import absolute_of


class FileSource(Source):
    """Records of files, or the subset that a split expression selects.

    Args:
      path: a file, a pattern or a folder, also in a bucket; see `nalora_jax.data.files`.
      split: an expression over the splits that `files.splits_of` returns for the path; a single
        file has one split, "train".

    Raises:
      NaloraError: on opening, if a file is missing, broken or empty, or the expression is invalid
        or selects no records.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        files = splits_of(str(path))
        self.siblings = tuple(files)
        self.dataset = str(path) if is_url(path) else str(expand_user(path).resolve())
        self.name = f"{path}[{split}]"
        asked = {piece.split("[")[0].strip() for piece in split.split("+")}
        chosen = [name for name in files if {name, "all"} & asked]
        opened = {name: [open_rows(file) for file in files[name]] for name in chosen}
        self._spans = self._parse(split, opened, files)
        self._rows = [rows_of_file for rows in opened.values() for rows_of_file in rows]
        self._ends = np.cumsum([0, *map(len, self._rows)])
        sizes = [sum(map(len, rows)) for rows in opened.values()]
        first = dict(zip(opened, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._index = np.concatenate(
            [first[name] + np.arange(start, stop) for name, start, stop in self._spans]
        )
        self.fingerprint = f"files:{':'.join(rows_of_file.sha256 for rows_of_file in self._rows)}:{split}"
        require_some(self)

    def _parse(
        self, split: str, opened: Mapping[str, Sequence[RecordFile]], files: Mapping[str, Any]
    ) -> list[Span]:
        only = 'one split, "train", or' if list(files) == ["train"] else f"{', '.join(files)}, or"
        with foreign_errors(
            self.name, f'{only} slices such as "train[-5%:]"', "name a split that is there"
        ):
            return absolute_of(split, {name: sum(map(len, rows)) for name, rows in opened.items()})

    def __len__(self) -> int:
        return len(self._index)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``; all records of one file are read in one call."""
        records: list[Record] = [{}] * len(indices)
        places = [self._place(index) for index in indices]
        for number in {file for file, _ in places}:
            at = [position for position, (file, _) in enumerate(places) if file == number]
            for position, record in zip(
                at, self._rows[number].read([places[p][1] for p in at]), strict=True
            ):
                records[position] = record
        return records

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the number of the file and the row in it."""
        row = int(self._index[index])
        file = int(np.searchsorted(self._ends, row, side="right")) - 1
        return file, row - int(self._ends[file])

    @property
    def spans(self) -> list[Span]:
        """Returns parts of the files' splits."""
        return self._spans

    def where(self, index: int) -> str:
        """Returns ``path:line``, or the file format's equivalent."""
        file, row = self._place(index)
        return self._rows[file].where(row)
