"""ArrayRecord files of JSON objects.

ArrayRecord files written by TFDS hold serialized examples instead, which only the folder's
description can decode.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from nalora_jax.data.source import Record, foreign_errors
from nalora_jax.errors import NaloraError


def is_array_record(name: str) -> bool:
    """Returns True for the name of an ArrayRecord file: ``train.array_record-00000-of-00004``."""
    return re.search(r"\.array_?record(-\d+-of-\d+)?$", name) is not None


class ArrayRecords:
    """Records of one ArrayRecord file.

    Args:
      path: path of the file.
      name: name of the file in messages.

    Raises:
      NaloraError: the file cannot be read.
    """

    def __init__(self, path: Path, name: str) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._name = name
        with foreign_errors(name, "a readable ArrayRecord file", "write it again"):
            with path.open("rb") as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self._reader = ArrayRecordReader(str(path))
            self._count = self._reader.num_records()

    def __len__(self) -> int:
        return int(self._count)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the objects at ``indices``.

        Raises:
          NaloraError: a record is not a JSON object.
        """
        with foreign_errors(self._name, "a readable ArrayRecord file", "write it again"):
            data = self._reader.read(list(map(int, indices)))
        return [self._parsed(index, record) for index, record in zip(indices, data, strict=True)]

    def _parsed(self, index: int, data: bytes) -> Record:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            expected, actual = "a JSON object", f"{len(data)} bytes of another format"
            remedy = "name a data set of TFDS by its folder (with dataset_info.json), or by tfds:<name>"
            raise NaloraError(self.where(index), expected=expected, found=actual, remedy=remedy)
        return value

    def where(self, index: int) -> str:
        """Returns ``path, record n``, counted from 1."""
        return f"{self._name}, record {range(len(self))[index] + 1}"
