"""Renders the records of a source in batches; an error names up to ten broken records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import MissingFieldError, Rendered, render
from nalora_jax.data.forms import form_of
from nalora_jax.data.source import Record, Source
from nalora_jax.errors import ListedError, NaloraError, shorten

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

# Records read, rendered and tokenized together, and their characters: enough to use every core with
# little memory.
_CHUNK, _CHARACTERS = 2048, 8_000_000
# Records that are searched for other broken records, and the largest number of them in a message.
_SEARCHED, _NAMED = 10_000, 10
_SHOWN = 170  # characters of each error in a message about several


def rendered(
    source: Source, indices: np.ndarray, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[Record], list[Rendered]]]:
    """Yields indices, records and texts to tokenize together: fewer if records are long.

    Raises:
      NaloraError: a record cannot be read or rendered; see `broken_records`.
    """
    done = 0

    def convert(record: Record, where: str) -> Rendered:
        return render(record, config, tokenizer, where)

    try:
        for chunk, records in batches(source, indices):
            pairs = zip(chunk, records, strict=True)
            yield chunk, records, [convert(record, source.where(index)) for index, record in pairs]
            done += len(chunk)
    except NaloraError as error:
        known = source[int(indices[0])] if done else None
        raise broken_records(error, source, indices[done:], convert, config, known) from error


def broken_records(
    first: NaloraError,
    source: Source,
    indices: Sequence[int] | np.ndarray,
    convert: Callable[[Record, str], Any],
    config: DataConfig | None = None,
    known: Record | None = None,
) -> NaloraError:
    """Returns an error that names up to ten broken records of a source.

    If all records fail in the same way, the settings are wrong rather than the records, and the first
    record's error is returned.

    Args:
      first: the error of a record at ``indices``.
      source: the records.
      indices: of records to search; at most 10,000 are.
      convert: called with a record and its name; raises a NaloraError for a broken record.
      config: names the fields of text records; None for others.
      known: a record that `convert` accepts, if one is known.
    """
    errors: list[NaloraError] = []
    odd = set()  # names of records without a field of the form
    for index in map(int, indices[:_SEARCHED]):
        where = source.where(index)
        try:
            record = source[index]
            convert(record, where)
        except NaloraError as error:
            errors.append(error)
            if isinstance(error, MissingFieldError) and error.where == where:
                odd.add(where)
            if len(errors) == _NAMED:
                break
        else:
            known = known or record
    if known is not None and config is not None:
        form = form_of(known, config)
        errors = [_with_form(error, form) if error.where in odd else error for error in errors]
    reasons = {(str(error.expected), str(error.found)) for error in errors}
    if len(errors) < 2 or (known is None and len(reasons) == 1):
        return next(iter(errors), first)
    # Without the folders, which the first line names: a long path would leave no room for the error.
    names = [error.where.rpartition("/")[2] for error in errors]
    texts = [
        str(NaloraError(n, expected=e.expected, found=e.found)) for n, e in zip(names, errors, strict=True)
    ]
    lines = [shorten(" ".join(text.split()), _SHOWN) for text in texts]
    count = f"{len(errors)} broken ones" if len(errors) < _NAMED else f"{_NAMED} or more broken ones"
    remedy = errors[0].remedy if len(reasons) == 1 else ""
    found = "\n  ".join([f"{count}:", *lines])
    return ListedError(source.name, expected="records without errors", found=found, remedy=remedy)


def _with_form(error: NaloraError, form: str) -> NaloraError:
    """Returns the error of a record that does not have the form of the others."""
    expected, remedy = f"{form}, as in the other records", "fix or remove this record"
    return NaloraError(error.where, expected=expected, found=f"fields {error.found}", remedy=remedy)


def batches(source: Source, indices: np.ndarray) -> Iterator[tuple[list[int], list[Any]]]:
    """Yields indices and records to process together: fewer if records are long."""
    start, count = 0, 1
    while start < len(indices):
        chunk = indices[start : start + count].tolist()
        records = source.read(chunk)
        sizes = [_characters(record) for record in records]
        first = total = 0
        for i, size in enumerate(sizes):
            if i > first and total + size > _CHARACTERS:
                yield chunk[first:i], records[first:i]
                first, total = i, 0
            total += size
        yield chunk[first:], records[first:]
        start += len(chunk)
        count = int(min(_CHARACTERS * len(sizes) / max(sum(sizes), 1), 4 * count, _CHUNK)) or 1


def _characters(value: Any) -> int:
    """Returns the number of characters in a record's texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 0
