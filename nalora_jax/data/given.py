"""In-memory records that a program passes in, and functions that turn records into examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.source import (
    Record,
    RecordsSource,
    Source,
    SourceView,
    TableRecord,
)
from nalora_jax.data.sources import AUTO_SPLIT, open_source
from nalora_jax.data.tokenize import batches
from nalora_jax.errors import NaloraError, describe_error

IN_MEMORY = "in memory"  # name of a data set that a program passed in
# Returns an example (of any form of `nalora_jax.data.forms`) for a record, or None to skip it.
RecordFormat = Callable[[Record], Record | None]
Data = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]


def format_source(base: Source, function: RecordFormat) -> SourceView:
    """Returns the records of another source, converted by a function.

    The function is called once for every record now, to find the records that it skips and to
    detect later changes of its results. Reading a record calls it again.

    Raises:
      NaloraError: the function fails, or returns neither a dict nor None; the message names the
        record.
    """

    def example(record: Record, where: str) -> Record | None:
        """Returns the result of ``function`` for one record; an error names the record."""
        where = f"format, {where}"
        try:
            result = function(record)
        except Exception as error:
            raise NaloraError(
                where, expected="an example", found=describe_error(error)
            ) from error
        if result is not None and not isinstance(result, dict):
            raise NaloraError(
                where, expected="a dict, or None", found=type(result).__name__
            )
        # Nulls of a table's record may mean absent fields, also in the example.
        if result and isinstance(record, TableRecord):
            return TableRecord(result)
        return result

    digest = hashlib.sha256()
    kept = []  # indices of the records that are not skipped
    for indices, records in batches(base, np.arange(len(base))):
        for index, record in zip(indices, records, strict=True):
            result = example(record, base.where(index))
            if result is not None:
                kept.append(index)
                text = json.dumps(result, sort_keys=True, default=str)
                digest.update(text.encode())
    again = lambda record, where: example(record, where) or {}  # noqa: E731
    view = SourceView(base, np.array(kept, np.int64), again)
    view.fingerprint = f"formatted:{base.fingerprint}:{digest.hexdigest()}"
    return view


def resolve_sources(
    config: DataConfig,
    *,
    data: Data | None = None,
    source: Mapping[str, Source] | None = None,
    format: RecordFormat | None,
) -> tuple[DataConfig, Mapping[str, Source] | None]:
    """Returns in-memory data as sources by split, with the matching data settings.

    Args:
      config: the run's data settings.
      data: records, of which some are held out; or records by split, such as
        ``{"train": ..., "validation": ...}``. An iterable is read once, into memory. A
        `datasets.Dataset` or ``DatasetDict`` also works.
      source: sources by split.
      format: makes an example from each record; without ``data`` and ``source``, from each record
        of the data set in ``config``.

    Raises:
      NaloraError: both ``data`` and ``source`` are set, a record is not a dict, or ``format``
        fails.
    """
    if data is not None and source is not None:
        raise NaloraError("run", expected="data or source", found="both")
    sources = source
    if data is not None:
        if not isinstance(data, Mapping):
            data = {"train": data}
        sources = {name: _records(name, records) for name, records in data.items()}
        config = replace(config, dataset=IN_MEMORY)
    if format is None:
        return config, sources
    if sources is None:
        train = open_source(config, config.train_split)
        sources = {config.train_split: train}
        held = config.eval_split
        if held == AUTO_SPLIT and "validation" in train.siblings:
            held = "validation"
        if held != AUTO_SPLIT:  # otherwise some training records are held out
            sources[held] = open_source(config, held)
    return config, {
        name: format_source(records, format) for name, records in sources.items()
    }


def _records(split: str, records: Iterable[Mapping[str, Any]]) -> Source:
    """Returns the in-memory records of ``split`` as a source; reads the iterable to its end.

    Records of the ``datasets`` library become ``TableRecord``: their nulls may mean absent fields.
    """
    read: list[Record] = []
    kind: type[dict[str, Any]] = dict
    if type(records).__module__.startswith("datasets."):
        kind = TableRecord
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            name = type(record).__name__
            raise NaloraError(
                f"data[{split!r}], record {index}", expected="a dict", found=f"a {name}"
            )
        read.append(kind(record))
    return RecordsSource(f"{IN_MEMORY}[{split}]", read)
