"""Texts that a head or an embedding reads as one vector each, with labels, as packed sequences.

A record has one text or a group of several: both answers of a pair, or an anchor, its positive and
its negatives. A text is a segment of a row, without targets; a group is packed as one unit:

    tokens        a a a b b | c c d d d     two groups of two texts
    segment_ids   1 1 1 2 2 | 3 3 4 4 4
    records       1 1                       groups in the row
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import Rendered, messages_of, text_field
from nalora_jax.data.forms import TEXT, tools_of
from nalora_jax.data.pipeline import HostBatch, TrainData, packed_data
from nalora_jax.data.questions import held_out_indices, split_questions
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenize import Example, convert_batches, tokenize_texts
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PooledItem:
    """The tokenized texts of a record and its labels."""

    texts: tuple[str, ...]
    ids: tuple[np.ndarray, ...]  # of each text, int32 [tokens]
    labels: np.ndarray  # float32 [outputs], or [0] without labels


class RecordForm(ABC):
    """The texts and labels of a kind's records."""

    @property
    def group(self) -> int:
        """Returns the number of texts of a record."""
        return 1

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Returns the settings that change the texts, for the cache of tokens."""

    @property
    def ends(self) -> bool:
        """Returns True if texts end with the end-of-sequence id."""
        return False

    @abstractmethod
    def render(
        self, record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
    ) -> list[Rendered]:
        """Returns the texts of a record.

        Raises:
          NaloraError: a field is missing or has another type.
        """

    def label(self, record: Record, where: str) -> list[float]:
        """Returns the labels of a record; none by default.

        Raises:
          NaloraError: the record has no label, or one that the head does not have.
        """
        return []

    def tokenized(
        self,
        source: Source,
        indices: Sequence[int],
        config: DataConfig,
        tokenizer: Tokenizer,
    ) -> Iterator[tuple[tuple[str, ...], tuple[np.ndarray, ...]]]:
        """Yields the texts of each record and their tokens.

        Raises:
          NaloraError: a broken record, or an empty text.
        """

        def render(record: Record, where: str) -> tuple[list[Rendered], None]:
            """Returns the texts of a record."""
            texts = self.render(record, config, tokenizer, where)
            if not all(text.text.strip() for text in texts):
                raise NaloraError(where, expected="a text", found="an empty one")
            return texts, None

        for _, texts, examples, _ in tokenize_texts(
            source, indices, render, tokenizer, end=self.ends
        ):
            words = tuple(text.text for text in texts)
            yield words, tuple(example.ids for example in examples)


def whole_text(text: str) -> Rendered:
    """Returns a text that is read from its first to its last token."""
    return Rendered(text, ((0, len(text)),), special=True)


def render_input(
    record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
) -> Rendered:
    """Returns the text that a record asks about: its messages, its prompt or its text.

    Raises:
      NaloraError: the record has none of these fields, or one of another type.
    """
    if config.messages_field in record:
        messages = messages_of(record, config, where)
        (text,) = tokenizer.render_chats([(messages, False)], tools_of(record, where))
        return Rendered(text, ((0, len(text)),), special=False)
    field = config.prompt_field
    if field not in record and TEXT in record:
        field = TEXT
    return whole_text(text_field(record, field, where, "--data.prompt-field", TEXT))


@dataclass(frozen=True, eq=False, kw_only=True)
class PooledData(TrainData):
    """Training rows of texts that are read as one vector each.

    Attributes:
      labels: of each record, float32 ``[records, outputs]``; None without labels.
      form: of the records.
    """

    noun: ClassVar[str] = "texts"
    labels: np.ndarray | None = None
    form: RecordForm | None = None

    @property
    def records_per_row(self) -> int:
        """Returns the maximum number of records in a row."""
        return int(np.diff(self.pattern.starts).max())

    @cached_property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""
        digest = hashlib.sha256(self.store.fingerprint.encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        packed = int(self.pattern.rows < len(self.pattern.lengths))
        capacity = self.pattern.capacity
        return f"pooled:{digest.hexdigest()}:{capacity}:{packed}:{self.seed}"

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the text arrays, ``records [len(rows), records_per_row]``, 1 for each record of a
        row, and with labels ``labels [len(rows), records_per_row, outputs]``."""
        flat = super().arrays(rows)
        counts = np.array([len(self.records_of(index)) for index in rows])
        present = np.arange(self.records_per_row)[None, :] < counts[:, None]
        flat["records"] = present.astype(np.float32)
        if self.labels is not None:
            shape = (*present.shape, self.labels.shape[1])
            labels = np.zeros(shape, np.float32)
            for row, index in enumerate(rows):
                labels[row, : counts[row]] = self.labels[self.records_of(index)]
            flat["labels"] = labels
        return flat


def data_type(texts: int) -> type[PooledData]:
    """Returns the class of training rows whose records have this number of texts."""
    return type(f"PooledData{texts}", (PooledData,), {"group": texts})


def pooled_data(
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    form: RecordForm,
    **options: Any,
) -> PooledData:
    """Tokenizes and packs the texts of ``source``.

    Args:
      source: the records.
      config: how text becomes rows.
      tokenizer: tokenizer of the model.
      form: of the records.
      options: passed to `packed_data`.

    Raises:
      NaloraError: bad records, most do not fit a row, or ``accumulate`` does not divide the batch.
    """

    def examples(records: Source, indices: np.ndarray) -> Iterator[tuple[int, Example]]:
        """Yields the texts of every record, with the index of the record."""
        numbers = indices.tolist()
        texts = form.tokenized(records, numbers, config, tokenizer)
        for index, (_, group) in zip(numbers, texts, strict=True):
            for ids in group:
                yield index, as_input(ids)

    data = packed_data(
        source,
        config,
        tokenizer,
        kind=data_type(form.group),
        examples=examples,
        **options,
        **form.options,
    )
    assert isinstance(data, PooledData)
    labels = read_labels(source, data.store.records[:: form.group], form)
    return replace(data, labels=labels if labels.shape[1] else None, form=form)


def as_input(ids: np.ndarray) -> Example:
    """Returns a text whose tokens are all inputs: an example's last token is a target only, so one
    is added, which the model does not read."""
    answer = np.zeros(len(ids) + 1, bool)
    answer[-1] = True
    return Example(np.append(ids, np.int32(0)), answer)


def read_labels(
    source: Source, indices: Sequence[int] | np.ndarray, form: RecordForm
) -> np.ndarray:
    """Returns the labels of records, float32 ``[records, outputs]``.

    Raises:
      NaloraError: see `RecordForm.label`.
    """
    rows: list[list[float]] = []
    for _, labels in convert_batches(source, indices, form.label):
        rows += labels
    return np.array(rows, np.float32).reshape(len(rows), -1)


def held_out_texts(
    records: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    form: RecordForm,
    context: int,
) -> tuple[list[PooledItem], list[PooledItem]]:
    """Returns held-out records in two lists: for the reported results, and to choose the
    checkpoint.

    Args:
      records: the held-out records.
      config: limits of the evaluation.
      tokenizer: tokenizer of the model.
      form: of the records.
      context: positions of the model; records with a longer text are left out.

    Raises:
      NaloraError: bad records, or fewer than two that fit.
    """
    indices = held_out_indices(records, config)
    labels = read_labels(records, indices, form)
    items = []
    tokenized = form.tokenized(records, indices, config, tokenizer)
    for (texts, ids), values in zip(tokenized, labels, strict=True):
        if max(map(len, ids)) <= context:
            items.append(PooledItem(texts, ids, values))
    return split_questions(items, config.eval_limit, config.select_limit)


def digest_items(items: Sequence[PooledItem]) -> str:
    """Returns the SHA-256 of texts and labels; equal for equal items in the same order."""
    sha256 = hashlib.sha256()
    for item in items:
        for ids in item.ids:
            sha256.update(ids.tobytes() + b"|")
        sha256.update(item.labels.tobytes() + b";")
    return sha256.hexdigest()
