"""Files and folders of records with random access.

The formats are JSON lines and arrays, CSV, TSV, Parquet, Arrow and ArrayRecord. Files in buckets
are copied to the cache when they are opened; for Parquet only the row groups that are read are
fetched.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import mmap
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.common.files import expand_user
from nalora_jax.data.source import Record, TableRecord, foreign_errors, json_object, read_in_parts
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # by extension
# Extensions of the data files that are searched for in folders.
ENDINGS = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".array_record",
    ".arrayrecord",
)
# Prefixes of file and folder names, and the splits that they mean.
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "test": "test"}
# JSON files that describe a folder of data, as datasets and TFDS write them.
_DESCRIPTIONS = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "features.json",
)


class RecordFile(ABC):
    """Records of one file, by index."""

    name: str  # in messages
    sha256: str  # of the file, or of the checksum that its bucket stores
    unit = "record"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``, in that order."""

    def where(self, index: int) -> str:
        """Returns the name of a record in messages: its number, counted from 1."""
        return f"{self.name}, {self.unit} {range(len(self))[index] + 1}"


class LoadedRows(RecordFile):
    """Records in memory.

    Args:
      name: name of the file in messages.
      rows: the records.
      sha256: digest of the file.
      lines: line of each record in the file; by default, messages name the item's number.
    """

    unit = "item"

    def __init__(self, name: str, rows: list[Any], sha256: str = "", lines: Sequence[int] = ()) -> None:
        self.name, self.rows, self.sha256, self._lines = name, rows, sha256, lines

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``.

        Raises:
          NaloraError: one is not an object.
        """
        return [json_object(self.rows[index], self.where(index), "fix this item") for index in indices]

    def where(self, index: int) -> str:
        """Returns ``path:line`` or the number of an item."""
        return f"{self.name}:{self._lines[index]}" if self._lines else super().where(index)


def open_rows(path: Path | str) -> RecordFile:
    """Opens the records of a file by its extension; unknown extensions are read as JSON lines.

    Args:
      path: path of the file, or a text with the URL of a file in a bucket.

    Raises:
      NaloraError: the file is missing, cannot be fetched, does not have the format of its
        extension, or is empty.
    """
    name, kind = str(path), PurePath(path).suffix.lower()
    if kind == ".parquet":
        return TableRows(path)
    if isinstance(path, str):
        path = buckets.local_copy(path)
    if is_array_record(name):
        return ArrayRecords(path, name)
    if kind == ".json" and _begins_with(path, b"["):
        return _json_array(path, name)
    if kind in DELIMITERS:
        return _delimited(path, DELIMITERS[kind], name)
    if kind in (".arrow", ".feather"):
        return TableRows(path, name)
    return JsonLines(path, name)


def splits_of(name: str) -> Mapping[str, Sequence[Path | str]]:
    """Returns the files of every split of a path.

    A file or a pattern has one split, "train". A folder is either one that
    `datasets.Dataset.save_to_disk` wrote, or one of data files at any depth. In the second case a
    file belongs to the split with which its name or the name of one of its folders begins
    (``train-00000-of-00002.parquet``, ``validation/part.jsonl``); if no name begins with a split,
    all files are "train".

    Raises:
      NaloraError: a folder without such files.
    """
    if buckets.is_url(name):
        return _remote_splits(name)
    path = expand_user(name)
    if glob.has_magic(name) and not path.exists():
        return {"train": [Path(file_name) for file_name in sorted(glob.glob(str(path), recursive=True))]}  # noqa: PTH207
    if not path.is_dir():
        return {"train": [path]}
    if (path / "dataset_dict.json").is_file():
        names = read_json(path / "dataset_dict.json").get("splits", [])
        return {str(split): _arrow_files(path / str(split)) for split in names}
    if (path / "state.json").is_file():
        return {"train": _arrow_files(path)}
    return _by_split(
        name, {file: file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()}
    )


def _remote_splits(name: str) -> Mapping[str, Sequence[str]]:
    """Returns `splits_of` a path in a bucket."""
    if "*" in name:
        return {"train": buckets.files(name)}
    if buckets.exists(name):
        return {"train": [name]}
    root = name.rstrip("/") + "/"
    return _by_split(name, {file: PurePath(file.removeprefix(root)) for file in buckets.files(root)})


def _by_split(folder: str, names: Mapping[Any, PurePath]) -> dict[str, list[Any]]:
    """Groups the data files ``names``, paths within ``folder``, by the split in their names."""
    splits: dict[str, list[Any]] = {}
    for file, name in names.items():
        if name.name not in _DESCRIPTIONS and (
            name.suffix.lower() in ENDINGS or is_array_record(name.name)
        ):
            splits.setdefault(_split_of(name), []).append(file)
    if not splits:
        raise NaloraError(
            folder,
            expected="a folder that datasets' save_to_disk wrote, or one with data files",
            found=f"no file that ends in {', '.join(ENDINGS)}",
        )
    if set(splits) == {""}:
        return {"train": splits[""]}
    return splits


def is_path(text: str) -> bool:
    """Returns True if ``text`` names files.

    It does if it has a data file's extension, or if a file or folder of that name, or one that
    matches it, exists.
    """
    path = expand_user(text)
    if buckets.is_url(text) or path.suffix.lower() in ENDINGS or path.is_file():
        return True
    return ("/" in text and path.is_dir()) or _is_saved(path) or (glob.has_magic(text) and "/" in text)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _split_of(file: PurePath) -> str:
    """Returns the split at the start of a file's name, else of its innermost such folder; or ""."""
    for component in (file.name, *reversed(file.parent.parts)):
        match = re.match(r"([a-z]+)(?![a-z])", component.lower())
        if match and match[1] in _SPLITS:
            return _SPLITS[match[1]]
    return ""


def _arrow_files(folder: Path) -> list[Path]:
    """Returns the Arrow files of one split as listed by save_to_disk."""
    listed = read_json(folder / "state.json").get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise NaloraError(
            str(folder / "state.json"), expected="_data_files, names of Arrow files", found=repr(listed)
        )
    return [folder / str(name) for name in names]


def _json_array(path: Path, name: str) -> LoadedRows:
    """Returns the objects of a JSON file that holds one array; the file is read into memory."""
    data = _bytes(path)
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NaloraError(name, expected="a JSON array of objects", found=error, remedy="fix it") from error
    return LoadedRows(name, rows, hashlib.sha256(data).hexdigest())


def _delimited(path: Path, delimiter: str, name: str) -> LoadedRows:
    """Returns the rows of a CSV or TSV file whose first row names the fields.

    Every value is a text. The file is read into memory.
    """
    data, rows, lines = _bytes(path), [], [0]
    limit = csv.field_size_limit(2**31 - 1)  # a conversation can exceed the default of 128 kB
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        fields = next(reader, [])
        if len(set(fields)) < len(fields) or not all(fields):
            raise NaloraError(
                f"{name}:1",
                expected="a name of its own for every column",
                found=", ".join(map(repr, fields)),
            )
        for row in filter(None, reader):
            if len(row) != len(fields):
                raise NaloraError(
                    f"{name}:{reader.line_num}",
                    expected=f"{len(fields)} values, one for each of {', '.join(fields)}",
                    found=f"{len(row)}",
                    remedy="quote values that hold the separator or a line break",
                )
            rows.append(dict(zip(fields, row, strict=True)))
            lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise NaloraError(
            f"{name}:{lines[-1] + 1}",
            expected="rows of text in UTF-8",
            found=error,
            remedy="save it again",
        ) from error
    finally:
        csv.field_size_limit(limit)
    return LoadedRows(name, rows, hashlib.sha256(data).hexdigest(), lines[1:])


def _bytes(path: Path) -> bytes:
    with readable(path):
        data = path.read_bytes()
    return data


def _begins_with(path: Path, mark: bytes) -> bool:
    """Returns True if a file starts with ``mark`` after white space and a byte-order mark."""
    with readable(path), path.open("rb") as file:
        begins = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == mark
    return begins


def is_array_record(name: str) -> bool:
    """Returns True for the name of an ArrayRecord file: ``train.array_record-00000-of-00004``."""
    return re.search(r"\.array_?record(-\d+-of-\d+)?$", name) is not None


class ArrayRecords(RecordFile):
    """Records of one ArrayRecord file of JSON objects.

    ArrayRecord files written by TFDS hold serialized examples instead, which only the folder's
    description can decode.

    Args:
      path: path of the file.
      name: name of the file in messages.

    Raises:
      NaloraError: the file cannot be read.
    """

    def __init__(self, path: Path, name: str) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self.name = name
        with foreign_errors(name, "a readable ArrayRecord file", "write it again"):
            self.sha256 = file_digest(path)
            self._reader = ArrayRecordReader(str(path))
            self._count = self._reader.num_records()

    def __len__(self) -> int:
        return int(self._count)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the objects at ``indices``.

        Raises:
          NaloraError: a record is not a JSON object.
        """
        with foreign_errors(self.name, "a readable ArrayRecord file", "write it again"):
            data = self._reader.read(list(map(int, indices)))
        remedy = "name a data set of TFDS by its folder (with dataset_info.json), or by tfds:<name>"
        pairs = zip(indices, data, strict=True)
        return [json_object(record, self.where(index), remedy) for index, record in pairs]


class JsonLines(RecordFile):
    """Objects of a JSON Lines file, by index; blank lines are skipped.

    One pass over the file computes the line offsets and the sha256; memory is 8 bytes a line.

    Args:
      path: path of the file.
      name: name of the file in messages, its path by default.

    Raises:
      NaloraError: on opening, if the file is missing or has no lines.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.path, self.name = Path(path), name or str(path)
        try:
            self._starts, self._blanks, self.sha256 = _index(self.path)
            if not len(self._starts):
                raise NaloraError(self.name, expected="at least one JSON line", found="an empty file")
            with self.path.open("rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            expected, actual = "a readable file of JSON lines", error.strerror or error
            remedy = "check the path"
            raise NaloraError(self.name, expected=expected, found=actual, remedy=remedy) from error

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the objects at ``indices``.

        Raises:
          NaloraError: a line is not a JSON object; the message names the line.
        """
        records = []
        for index in indices:
            start = int(self._starts[index])
            end = self._bytes.find(b"\n", start)
            line = self._bytes[start : len(self._bytes) if end < 0 else end]
            records.append(json_object(line, self.where(index), "fix or remove this line"))
        return records

    def where(self, index: int) -> str:
        """Returns ``path:line``, with lines counted from 1 as in editors."""
        skipped = int(np.searchsorted(self._blanks, self._starts[index]))
        return f"{self.name}:{range(len(self))[index] + skipped + 1}"


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the byte offsets of lines with text and of blank lines, and the file's sha256."""
    starts, blanks, digest, position = array("q"), array("q"), hashlib.sha256(), 0
    with path.open("rb") as handle:
        for line in handle:
            (starts if line.strip() else blanks).append(position)
            position += len(line)
            digest.update(line)
    return np.array(starts, np.int64), np.array(blanks, np.int64), digest.hexdigest()


# ---------------------------------------------------------------- Parquet and Arrow


_OPEN_GROUPS = 2  # decoded row groups of a Parquet file that stay in memory


class TableRows(RecordFile):
    """Rows of a Parquet file, decoded by row group on demand, or of a memory-mapped Arrow file.

    Args:
      path: path of the file, or the URL of a Parquet file in a bucket.
      name: name of the file in messages.
    """

    unit = "row"

    def __init__(self, path: Path | str, name: str = "") -> None:
        self.name = name or str(path)
        if isinstance(path, str):
            self.sha256 = digest_of(buckets.version(path))
        else:
            with readable(path):
                self.sha256 = file_digest(path)
        with self._errors():
            sizes, self._groups = _parquet(path) if self._kind == ".parquet" else _arrow(Path(path))
        self._ends = np.cumsum([0, *sizes])
        self._group = lru_cache(_OPEN_GROUPS)(self._decoded)

    @property
    def _kind(self) -> str:
        return PurePath(self.name).suffix.lower()

    def _errors(self) -> Any:
        return foreign_errors(self.name, f"a readable {self._kind[1:]} file", "write it again")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the rows at ``indices``; each row group is decoded once per call."""
        import pyarrow as pa

        def read(group: int, rows: list[int]) -> list[Record]:
            with self._errors():
                return [TableRecord(row) for row in self._group(group).take(pa.array(rows)).to_pylist()]

        places = np.asarray(indices, np.int64)
        groups = np.searchsorted(self._ends, places, side="right") - 1
        return read_in_parts(groups, places - self._ends[groups], read)

    def _decoded(self, number: int) -> Any:
        rows = self._groups[number]()
        # Arrow trusts a file's offsets: without validation, a damaged file causes reads outside its
        # memory.
        rows.validate(full=True)
        return rows


Groups = tuple[list[int], list[Callable[[], Any]]]


def _parquet(path: Path | str) -> Groups:
    """Returns the sizes of a Parquet file's row groups, and the functions that decode them."""
    import pyarrow.parquet as pq

    source = buckets.open_ranges(path) if isinstance(path, str) else path
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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises file system errors about a path as errors of this library."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NaloraError(
            str(path), expected="a readable file", found=reason, remedy="check the path"
        ) from error
