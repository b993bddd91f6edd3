"""Files and folders of records with random access.

The formats are JSON lines and arrays, CSV, TSV, Parquet, Arrow and ArrayRecord. Files in buckets
are copied to the cache when they are opened; for Parquet only the row groups that are read are
fetched.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.common.files import expand_user
from nalora_jax.data.source import (
    Record,
    TableRecord,
    foreign_errors,
    json_object,
    read_in_parts,
)
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError

DELIMITERS = {".csv": ",", ".tsv": "\t"}  # by extension
# Extensions of the data files that are searched for in folders.
DATA_FILE_EXTENSIONS = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"),
    *(".array_record", ".arrayrecord"),
)
# Prefixes of file and folder names, and the splits that they mean.
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_SPLITS |= {"dev": "validation", "test": "test"}
# JSON files of which a folder that datasets' save_to_disk wrote has one.
_SAVED = ("dataset_dict.json", "state.json")
# JSON files that describe a folder of data, as datasets and TFDS write them.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "features.json", *_SAVED)


@dataclass(frozen=True, eq=False)
class RecordFile:
    """Records of one file, by index."""

    name: str  # in messages
    sha256: str  # of the file, or of the checksum that its bucket stores
    count: int
    # Returns the values at some indices, in that order: objects, or JSON texts of objects.
    fetch: Callable[[Sequence[int]], Sequence[Any]]
    # name of a record in messages, with its line or number, counted from 1
    where: Callable[[int], str]
    remedy: str = "fix this item"  # for a value that is not an object

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``, in that order.

        Raises:
          NaloraError: one is not an object.
        """
        records = []
        for index, value in zip(indices, self.fetch(indices), strict=True):
            if not isinstance(value, dict):
                value = json_object(value, self.where(index), self.remedy)
            records.append(value)
        return records


def open_rows(path: Path | str) -> RecordFile:
    """Opens the records of a file by its extension; unknown extensions are read as JSON lines.

    Args:
      path: path of the file, or a text with the URL of a file in a bucket.

    Raises:
      NaloraError: the file is missing, cannot be fetched, does not have the format of its
        extension, or is empty.
    """
    name = str(path)
    kind = PurePath(path).suffix.lower()
    if kind == ".parquet":
        return _table(path, name)
    if isinstance(path, str):
        path = buckets.local_copy(path)
    if is_array_record(name):
        return _array_records(path, name)
    if kind == ".json" and _begins_array(path):
        return _json_array(path, name)
    if kind in DELIMITERS:
        return _delimited(path, DELIMITERS[kind], name)
    if kind in (".arrow", ".feather"):
        return _table(path, name)
    return _json_lines(path, name)


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
    files: dict[Any, PurePath]
    if buckets.is_url(name):
        if "*" in name:
            return {"train": buckets.files(name)}
        if buckets.exists(name):
            return {"train": [name]}
        root = name.rstrip("/") + "/"
        files = {
            file: PurePath(file.removeprefix(root)) for file in buckets.files(root)
        }
    else:
        path = expand_user(name)
        if glob.has_magic(name) and not path.exists():
            matches = glob.glob(str(path), recursive=True)  # noqa: PTH207
            return {"train": [Path(match) for match in sorted(matches)]}
        if not path.is_dir():
            return {"train": [path]}
        if (path / "dataset_dict.json").is_file():
            names = read_json(path / "dataset_dict.json").get("splits", [])
            return {str(split): _arrow_files(path / str(split)) for split in names}
        if (path / "state.json").is_file():
            return {"train": _arrow_files(path)}
        files = {
            file: file.relative_to(path)
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
    splits: dict[str, list[Any]] = {}
    for file, within in files.items():  # within: the path below the folder
        is_data = within.suffix.lower() in DATA_FILE_EXTENSIONS or is_array_record(
            within.name
        )
        if is_data and within.name not in _DESCRIPTIONS:
            splits.setdefault(_split_of(within), []).append(file)
    if not splits:
        raise NaloraError(
            name,
            expected="a folder that datasets' save_to_disk wrote, or one with data files",
            found=f"no file that ends in {', '.join(DATA_FILE_EXTENSIONS)}",
        )
    if set(splits) == {""}:  # no name starts with a split
        return {"train": splits[""]}
    return splits


def is_path(text: str) -> bool:
    """Returns True if ``text`` names files.

    It does if it has a data file's extension, or if a file or folder of that name, or one that
    matches it, exists.
    """
    path = expand_user(text)
    if (
        buckets.is_url(text)
        or path.suffix.lower() in DATA_FILE_EXTENSIONS
        or path.is_file()
    ):
        return True
    saved = any((path / name).is_file() for name in _SAVED)
    return saved or ("/" in text and (path.is_dir() or glob.has_magic(text)))


def _begins_array(path: Path) -> bool:
    """Returns True if a JSON file starts with "[", after a byte order mark and white space."""
    start = _bytes(path, 4096).removeprefix(codecs.BOM_UTF8)
    return start.lstrip()[:1] == b"["


def _split_of(file: PurePath) -> str:
    """Returns the split with which a file's name begins, else the name of its innermost folder
    that begins with one; "" if no name does."""
    for component in (file.name, *reversed(file.parent.parts)):
        match = re.match(r"([a-z]+)(?![a-z])", component.lower())
        if match and match[1] in _SPLITS:
            return _SPLITS[match[1]]
    return ""


def _arrow_files(folder: Path) -> list[Path]:
    """Returns the Arrow files of one split as listed by save_to_disk."""
    listed = read_json(folder / "state.json").get("_data_files")
    names = []
    if isinstance(listed, list):
        names = [entry.get("filename") for entry in listed if isinstance(entry, dict)]
    # Names without a folder, so that no file outside of this folder is read.
    valid = [isinstance(name, str) and Path(name).name == name for name in names]
    if not names or not all(valid):
        raise NaloraError(
            str(folder / "state.json"),
            expected="_data_files, names of Arrow files",
            found=repr(listed),
        )
    return [folder / str(name) for name in names]


def _json_array(path: Path, name: str) -> RecordFile:
    """Returns the objects of a JSON file that holds one array; the file is read into memory."""
    data = _bytes(path)
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NaloraError(
            name, expected="a JSON array of objects", found=error, remedy="fix it"
        ) from error
    return loaded_rows(name, rows, digest_of(data))


def loaded_rows(
    name: str,
    rows: list[Any],
    sha256: str = "",
    where: Callable[[int], str] | None = None,
) -> RecordFile:
    """Returns records in memory as a file; messages name a record's number by default."""
    where = where or (lambda index: f"{name}, item {index + 1}")
    fetch = lambda indices: [rows[index] for index in indices]  # noqa: E731
    return RecordFile(name, sha256, len(rows), fetch, where)


def _delimited(path: Path, delimiter: str, name: str) -> RecordFile:
    """Returns the rows of a CSV or TSV file whose first row names the fields.

    Every value is a text. The file is read into memory.
    """
    data = _bytes(path)
    rows = []
    lines = [0]
    # a conversation can exceed the default of 128 kB
    limit = csv.field_size_limit(2**31 - 1)
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
                place = f"{name}:{reader.line_num}"
                raise NaloraError(
                    place,
                    expected=f"{len(fields)} values, one for each of {', '.join(fields)}",
                    found=f"{len(row)}",
                    remedy="quote values that hold the separator or a line break",
                )
            rows.append(dict(zip(fields, row, strict=True)))
            lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        place = f"{name}:{lines[-1] + 1}"
        raise NaloraError(
            place, expected="rows of text in UTF-8", found=error, remedy="save it again"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return loaded_rows(
        name, rows, digest_of(data), lambda index: f"{name}:{lines[index + 1]}"
    )


def _bytes(path: Path, size: int = -1) -> bytes:
    """Returns the first ``size`` bytes of a file, by default all."""
    with readable(path), path.open("rb") as file:
        data = file.read(size)
    return data


def is_array_record(name: str) -> bool:
    """Returns True for the name of an ArrayRecord file: ``train.array_record-00000-of-00004``."""
    return re.search(r"\.array_?record(-\d+-of-\d+)?$", name) is not None


def _array_records(path: Path, name: str) -> RecordFile:
    """Returns the JSON objects of an ArrayRecord file.

    ArrayRecord files written by TFDS hold serialized examples instead, which only the folder's
    description can decode.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    errors = partial(
        foreign_errors, name, "a readable ArrayRecord file", "write it again"
    )
    with errors():
        sha256 = file_digest(path)
        reader = ArrayRecordReader(str(path))
        count = int(reader.num_records())

    def fetch(indices: Sequence[int]) -> Sequence[bytes]:
        """Returns the bytes of the records at ``indices``."""
        with errors():
            data: list[bytes] = reader.read(list(map(int, indices)))
        return data

    remedy = "name a data set of TFDS by its folder (with dataset_info.json), or by tfds:<name>"
    return RecordFile(
        name, sha256, count, fetch, lambda index: f"{name}, record {index + 1}", remedy
    )


def _json_lines(path: Path, name: str) -> RecordFile:
    """Returns the objects of a JSON Lines file; blank lines are skipped.

    One pass over the file computes the line offsets and the sha256; memory is 8 bytes a line.
    """
    offsets = array("q")
    skipped = array("q")
    digest = hashlib.sha256()
    position = 0
    with (
        readable(path, "a readable file of JSON lines", name),
        path.open("rb") as handle,
    ):
        for text in handle:
            if text.strip():
                offsets.append(position)
            else:
                skipped.append(position)
            position += len(text)
            digest.update(text)
        if not offsets:
            raise NaloraError(
                name, expected="at least one JSON line", found="an empty file"
            )
        content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    starts = np.array(offsets, np.int64)
    blanks = np.array(skipped, np.int64)

    def fetch(indices: Sequence[int]) -> Sequence[bytes]:
        """Returns the lines at ``indices``, without their line breaks."""
        lines = []
        for start in starts[np.asarray(indices, np.int64)].tolist():
            end = content.find(b"\n", start)
            if end < 0:  # the last line
                end = len(content)
            lines.append(content[start:end])
        return lines

    def where(index: int) -> str:
        """Returns the file and the number of a record's line, blank lines included."""
        blank_lines = int(np.searchsorted(blanks, starts[index]))
        return f"{name}:{index + blank_lines + 1}"

    return RecordFile(
        name, digest.hexdigest(), len(starts), fetch, where, "fix or remove this line"
    )


# ---------------------------------------------------------------- Parquet and Arrow


_OPEN_GROUPS = 2  # decoded row groups of a Parquet file that stay in memory


def _table(path: Path | str, name: str) -> RecordFile:
    """Returns the rows of a Parquet file, decoded by row group on demand, or of a memory-mapped
    Arrow file.

    ``path`` may be the URL of a Parquet file in a bucket.
    """
    kind = PurePath(name).suffix.lower()
    errors = partial(
        foreign_errors, name, f"a readable {kind[1:]} file", "write it again"
    )
    if isinstance(path, str):
        sha256 = digest_of(buckets.version(path))
    else:
        with readable(path):
            sha256 = file_digest(path)
    with errors():
        if kind == ".parquet":
            groups = _parquet(path)
        else:
            groups = _arrow(Path(path))
    bounds = np.cumsum([0, *(size for size, _ in groups)])

    @lru_cache(_OPEN_GROUPS)
    def decoded(group: int) -> Any:
        """Returns the table of a group of rows, checked."""
        rows = groups[group][1]()
        # Arrow trusts a file's offsets: without validation, a damaged file causes reads outside its
        # memory.
        rows.validate(full=True)
        return rows

    def read(group: int, rows: list[int]) -> list[Record]:
        """Returns the records at ``rows`` of a group."""
        import pyarrow as pa

        with errors():
            values = decoded(group).take(pa.array(rows)).to_pylist()
        return [TableRecord(row) for row in values]

    def fetch(indices: Sequence[int]) -> Sequence[Record]:
        """Returns the records at ``indices`` of the file."""
        places = np.asarray(indices, np.int64)
        group_of = np.searchsorted(bounds, places, side="right") - 1
        # each group is decoded once
        return read_in_parts(group_of, places - bounds[group_of], read)

    return RecordFile(
        name, sha256, int(bounds[-1]), fetch, lambda index: f"{name}, row {index + 1}"
    )


# Size of each group of rows, and the function that decodes it.
_RowGroups = list[tuple[int, Callable[[], Any]]]


def _parquet(path: Path | str) -> _RowGroups:
    """Returns a Parquet file's row groups."""
    import pyarrow.parquet as pq

    source = buckets.open_ranges(path) if isinstance(path, str) else path
    about = pq.read_metadata(source, memory_map=True)
    file = pq.ParquetFile(
        source, metadata=about, memory_map=True, read_dictionary=_coded_texts(about)
    )
    sizes = [about.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [(size, partial(file.read_row_group, i)) for i, size in enumerate(sizes)]


def _coded_texts(about: Any) -> list[str]:
    """Returns the paths of the dictionary-encoded text columns, which stay encoded in memory.

    Decoding would repeat a text for every row that has it: a file of 2 kB can expand to gigabytes.
    """
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    paths = []
    for number in range(len(about.schema)):
        column = about.schema.column(number)
        kinds = column.physical_type, column.logical_type.type
        if kinds not in (("BYTE_ARRAY", "STRING"), ("BYTE_ARRAY", "NONE")):
            continue
        if any(group.column(number).has_dictionary_page for group in groups):
            paths.append(column.path)
    return paths


def _arrow(path: Path) -> _RowGroups:
    """Returns the record batches of an Arrow file or a stream written by datasets."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        reader: Any = pa.ipc.open_file(mapped)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid:
        mapped.seek(0)
        batches = list(pa.ipc.open_stream(mapped))
    return [
        (batch.num_rows, partial(pa.Table.from_batches, [batch])) for batch in batches
    ]


@contextmanager
def readable(
    path: Path, expected: str = "a readable file", name: str = ""
) -> Iterator[None]:
    """Raises file system errors about a path, or its ``name``, as errors of this library."""
    try:
        yield
    except OSError as error:
        found = error.strerror or error
        raise NaloraError(
            name or str(path), expected=expected, found=found, remedy="check the path"
        ) from error
