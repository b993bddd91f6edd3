"""Training batches: an endless, checkpointable stream of packed sequences, prefetched by Grain.

Without ``--data.max-length`` the row length follows from the lengths of the examples.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Protocol

import grain
import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.packing import (
    PackingPlan,
    Pattern,
    fill_rows,
    pack,
    permutation,
    plan_rows,
)
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_training
from nalora_jax.data.store import (
    UNLIMITED,
    Examples,
    TokenStore,
    cut_store,
    open_store,
    text_examples,
)
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError

log = logging.getLogger(__name__)

# Arrays [accumulate, rows of this process, max_length]: tokens, targets, loss_weights,
# segment_ids, positions.
HostBatch = dict[str, np.ndarray]


def stream_text(figures: Mapping[str, Any]) -> str:
    """Returns the figures of a stream as text.

    Example:
      >>> figures = {"examples": 1200, "dropped": 0, "tokens": 40000}
      >>> stream_text(figures | {"steps_per_epoch": 40.5, "packing_efficiency": 0.98})
      '1,200 examples, 40,000 tokens, 40.5 steps per epoch, packing efficiency 98.0%'
    """
    texts = []
    for name, value in figures.items():
        if value or name not in ("dropped", "truncated", "split"):
            noun = name.replace("_", " ")
            if name == "packing_efficiency":
                texts.append(f"{noun} {value:.1%}")
            else:
                texts.append(f"{value:,} {noun}")
    return ", ".join(texts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream(ABC):
    """Endless stream of rows, each a pure function of its number.

    Row r of the stream is row ``r % rows_per_epoch`` of epoch ``r // rows_per_epoch``.

    Attributes:
      batch_size: rows of a batch over all hosts.
      accumulate: micro-batches of a batch.
      rows: rows of every micro-batch that this process reads.
      workers: threads that prefetch batches.
    """

    batch_size: int
    accumulate: int
    rows: tuple[int, ...]
    workers: int

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int:
        """Returns the number of rows with every record once."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""

    @abstractmethod
    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns arrays ``[len(rows), ...]`` of these rows of the stream."""

    def batch_at(self, row: int) -> HostBatch:
        """Returns the batch whose first row over all hosts is ``row``; pure in ``row``."""
        micro = self.batch_size // self.accumulate
        first = np.arange(self.accumulate)[:, None] * micro
        rows = row + first + np.array(self.rows)  # [accumulate, rows of this process]
        batch = self.arrays(rows.ravel().tolist())
        for name, value in batch.items():
            batch[name] = value.reshape(*rows.shape, *value.shape[1:])
        return batch

    def batches(self, state: dict[str, Any] | None = None) -> BatchIterator:
        """Returns an endless iterator, from the start or from a state of `BatchIterator.get_state`.

        Raises:
          NaloraError: the state belongs to other data.
        """
        iterator = BatchIterator(self)
        if state is not None:
            iterator.set_state(state)
        return iterator


class ImageReader(Protocol):
    """Reads the images of packed examples."""

    def batch(self, rows: Sequence[np.ndarray]) -> HostBatch:
        """Returns arrays ``[rows, ...]``; each row is an array of examples of the store."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainData(Stream):
    """Packed sequences of a run as an endless stream.

    Attributes:
      store: tokens of the examples.
      pattern: the assignment of examples to rows.
      seed: of the order of the rows.
      images: images of every row, for models with image input.
    """

    noun: ClassVar[str] = "examples"
    group: ClassVar[int] = 1  # examples of the store that share a slot
    store: TokenStore
    pattern: Pattern
    seed: int
    images: ImageReader | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Returns the number of rows with every example once."""
        return self.pattern.rows

    @cached_property
    def _plan(self) -> Callable[[int], PackingPlan]:
        """Returns the function that plans the rows of an epoch; two epochs are kept."""
        lengths = self.store.lengths(self.group)
        return lru_cache(maxsize=2)(
            lambda epoch: plan_rows(self.pattern, lengths, self.seed, epoch)
        )

    def records_of(self, index: int) -> np.ndarray:
        """Returns the examples in row ``index`` of the stream."""
        epoch, row = divmod(index, self.rows_per_epoch)
        return self._plan(epoch).row(row)

    @property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""
        packed = int(self.pattern.rows < len(self.pattern.lengths))
        return f"{self.store.fingerprint}:{self.pattern.capacity}:{packed}:{self.seed}"

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        counts = self.store.counts
        rows = self.pattern.rows
        return {
            self.noun: len(self.pattern.lengths),
            "dropped": counts.dropped,
            "truncated": counts.truncated,
            "split": counts.split,
            "tokens": counts.tokens,
            "targets": counts.targets,
            "rows_per_epoch": rows,
            "steps_per_epoch": round(rows / self.batch_size, 2),
            "packing_efficiency": round(self.pattern.efficiency, 4),
        }

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns arrays ``[len(rows), max_length]``; of models with image input also pixels."""
        store = self.store
        # A record has `group` consecutive examples of the store: [records, group] -> [examples].
        places = np.arange(self.group)
        examples = [
            (self.group * self.records_of(i)[:, None] + places).ravel() for i in rows
        ]
        flat = fill_rows(
            examples, store.tokens, store.answer, store.offsets, self.pattern.capacity
        )
        if self.images is not None:
            flat |= self.images.batch(examples)
        return flat


class BatchIterator(Iterator[HostBatch]):
    """Iterator over batches, prefetched by Grain's threads, whose state is one number.

    The state counts rows over all hosts, so that a run can resume with another number of hosts or
    another batch size.
    """

    def __init__(self, data: Stream) -> None:
        self._data = data
        self._row = 0
        self._batches = self._open()

    def _open(self) -> grain.DatasetIterator[HostBatch]:
        """Returns Grain's iterator over the batches that start at the current row."""
        rows = grain.MapDataset.range(self._row, sys.maxsize, self._data.batch_size)
        threads = self._data.workers
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=4 * threads
        )
        return iter(rows.map(self._data.batch_at).to_iter_dataset(options))

    def __next__(self) -> HostBatch:
        batch = next(self._batches)
        self._row += self._data.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch as JSON values.

        Example:
          ``{"row": 1280, "data": "<fingerprint>"}``
        """
        return {"row": self._row, "data": self._data.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from the position in ``state``.

        Raises:
          NaloraError: the state is invalid or belongs to other data.
        """
        if state.get("data") != self._data.fingerprint:
            where = "checkpoint: data position"
            remedy = (
                "continue with the data, tokenizer, --data options and --seed of the run, "
                "or start a new run"
            )
            raise NaloraError(
                where,
                expected=f"a position in {self._data.fingerprint}",
                found=state.get("data"),
                remedy=remedy,
            )
        self.close()
        self._row = int(state["row"])
        self._batches = self._open()

    def close(self) -> None:
        """Stops the prefetching threads."""
        self._batches.close()


def train_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    source: Mapping[str, Source] | None = None,
    **options: Any,
) -> TrainData:
    """Opens, tokenizes and packs the training split.

    Args:
      config: data settings.
      tokenizer: tokenizer of the model.
      source: sources by split, in place of the data set in ``config``.
      options: passed to `packed_data`.

    Raises:
      NaloraError: see `open_source` and `packed_data`.
    """
    records = open_training(config, source=source)
    return packed_data(records, config, tokenizer, **options)


def packed_data(
    records: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    accumulate: int = 1,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    context: int = UNLIMITED,
    kind: type[TrainData] = TrainData,
    examples: Examples | None = None,
    **fields: str,
) -> TrainData:
    """Tokenizes and packs training records.

    Args:
      records: the records.
      config: data settings; without ``max_length`` the row length is chosen (`resolve_row_length`).
      tokenizer: tokenizer of the model.
      batch_size: rows per step over all hosts.
      accumulate: micro-batches per step.
      seed: seed of the shuffle.
      rows: rows of a micro-batch that this process reads
        (`nalora_jax.mesh.distributed.process_rows`); all by default.
      context: maximum tokens of the model.
      kind: of the stream.
      examples: yields the examples of records; by default, one text for each.
      fields: settings that change these examples.

    Raises:
      NaloraError: bad data (see `open_store`), or ``accumulate`` does not divide the batch.
    """
    if batch_size % accumulate:
        raise NaloraError(
            "--train.batch-size",
            expected=f"a multiple of the {accumulate} micro-batches",
            found=batch_size,
        )
    if rows is None:
        rows = range(batch_size // accumulate)
    group = kind.group
    examples = examples or partial(text_examples, config=config, tokenizer=tokenizer)
    uncut = open_store(records, config, tokenizer, seed, examples, **fields)
    if not config.max_length:
        measured = np.sort(permutation(len(records), _SEED)[:SAMPLE])
        if (
            config.train_limit
        ):  # the store lacks the records beyond the limit, which count, too
            sizes = [len(example.ids) - 1 for _, example in examples(records, measured)]
            lengths = np.array(sizes).reshape(-1, group).sum(axis=1)
        else:
            lengths = uncut.lengths(group)[measured]
        config = resolve_row_length(config, lengths, context)
    store = cut_store(uncut, records, config, tokenizer.bos_id, group * context, group)
    return kind(
        store=store,
        pattern=pack(store.lengths(group), config.max_length, several=config.pack),
        seed=seed,
        batch_size=batch_size,
        accumulate=accumulate,
        rows=tuple(map(int, rows)),
        workers=config.workers,
    )


KEPT = 0.99  # share of the examples that fit a row
SHORTEST = 128  # minimum of packed rows: shorter rows make batches too small
FULL_EFFICIENCY = (
    0.9  # packing efficiency for which rows become longer, at most four times
)
_LONGER = (1, 1.25, 1.5, 2, 3, 4)  # factors that are tried in order
SAMPLE = 10_000  # maximum of measured examples
_REPEATED = 1000  # examples: of fewer, the last row would decide the efficiency
_MULTIPLE = 8  # of the row length
_SEED = 20260103  # of the draw of measured examples: the same in every run


def resolve_row_length(
    config: DataConfig, lengths: np.ndarray, context: int = UNLIMITED
) -> DataConfig:
    """Returns ``config`` with a row length that 99 of 100 examples fit.

    The length is a multiple of 8, at least 128 for packed rows, and at most the model's context.
    Packed rows become up to four times as long if shorter ones are less than 90% full.

    Args:
      config: config of the run.
      lengths: row positions of examples, int ``[n]``.
      context: maximum tokens of the model.
    """
    quantile = int(np.quantile(lengths, KEPT, method="inverted_cdf"))
    shortest = 1
    if config.pack:
        shortest = SHORTEST
    length = min(max(_rounded(quantile), shortest), context)
    full = 1.0
    if config.pack:
        tried = []
        for factor in _LONGER:
            longer = min(_rounded(int(factor * length)), context)
            fitting = lengths[(lengths > 0) & (lengths <= longer)]
            if len(fitting):
                repeated = np.tile(fitting, -(-_REPEATED // len(fitting)))
                full = pack(repeated, longer).efficiency
                tried.append((longer, full))
                if full >= FULL_EFFICIENCY:
                    break
        length, full = max(tried, key=lambda row: row[1], default=(length, 0.0))
    fit = float(np.mean(lengths <= length))
    log.info(
        "rows of %d tokens, %.0f%% full: %.1f%% of %d examples fit, the longest has %d; "
        "--data.max-length names another length",
        length,
        100 * full,
        100 * fit,
        len(lengths),
        lengths.max(),
    )
    return replace(config, max_length=length)


def _rounded(length: int) -> int:
    """Returns ``length`` rounded up to a multiple of 8."""
    return -(-length // _MULTIPLE) * _MULTIPLE


class TrainingRows(Protocol):
    """Training data as packed sequences or images."""

    def batches(self) -> BatchIterator:
        """Returns an endless iterator of batches."""

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
