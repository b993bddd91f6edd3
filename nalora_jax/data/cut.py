"""Fits tokenized examples to rows: too long ones are dropped, truncated, divided or refused; loss on the last part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.source import Source
from nalora_jax.data.store import TokenStore, is_whole, load_store, write_store
from nalora_jax.data.tokenize import Example, divided, fit_example, with_loss_last
from nalora_jax.data.too_long import UNLIMITED, advice, report_dropped, too_long
from nalora_jax.errors import NaloraError


def cut_store(
    store: TokenStore, source: Source, config: DataConfig, bos_id: int | None, context: int = UNLIMITED
) -> TokenStore:
    """Returns examples of at most ``config.max_length`` positions with the loss on ``config.loss_last``.

    It is ``store`` itself if no example changes. Changed examples are cached next to the store.

    Args:
      store: all examples of ``source``.
      source: names records in messages.
      config: gives ``max_length``, ``too_long`` and ``loss_last``.
      bos_id: id that stays at the beginning of a truncated example.
      context: maximum tokens of the model, for advice.

    Raises:
      NaloraError: a record is too long and ``too_long`` is an error; fewer than half of the records
        or none of them fit; an example has no loss token in its last part; the disk is full.
    """
    sizes = np.diff(store.offsets)
    long = sizes > config.max_length + 1
    if not long.any() and not config.loss_last:
        return store
    if long.any() and config.too_long == "error":
        first = int(np.argmax(long))
        raise too_long(source.where(int(store.records[first])), int(sizes[first]), config, context)
    longest, count = store.counts.longest, int(long.sum())
    drop = config.too_long == "drop" and count > 0
    if drop and count == len(sizes):
        raise NaloraError(
            source.name,
            expected=f"records of at most {config.max_length} tokens",
            found=f"{count} records, all of them longer",
            remedy=advice(longest - 1, context),
        )
    last = f"-last-{config.loss_last:g}" if config.loss_last else ""
    folder = store.folder.with_name(f"{store.folder.name}-{config.max_length}-{config.too_long}{last}")
    if not is_whole(folder):
        examples = _examples(store, np.flatnonzero(~(long & drop)), source, config, bos_id)
        names = {"drop": "dropped", "truncate": "truncated", "split": "split"}
        counts = {name: count for how, name in names.items() if how == config.too_long}
        write_store(folder, examples, **counts)
    cut = load_store(folder)
    cut = replace(cut, counts=replace(cut.counts, longest=longest))
    report_dropped(source.name, cut.counts, config, context)
    return cut


def _examples(
    store: TokenStore, indices: np.ndarray, source: Source, config: DataConfig, bos_id: int | None
) -> Iterator[tuple[int, Example]]:
    for index in indices:
        place, record = slice(store.offsets[index], store.offsets[index + 1]), int(store.records[index])
        example = Example(np.asarray(store.tokens[place]), np.asarray(store.answer[place]).astype(bool))
        for row in rows_of(example, config, bos_id, source.where(record)):
            yield record, row


def rows_of(example: Example, config: DataConfig, bos_id: int | None, where: str) -> list[Example]:
    """Returns the rows of an example: its parts with ``too_long`` "split", otherwise one.

    Raises:
      NaloraError: the last part of a row that was not split has no loss token.
    """
    if config.too_long != "split":
        row = with_loss_last(fit_example(example, config.max_length, bos_id), config.loss_last)
        if row.has_target:
            return [row]
        raise NaloraError(
            where,
            expected=f"a token to learn in the last part (--data.loss-last {config.loss_last:g})",
            found=f"none in {len(example.ids)} tokens",
            remedy="raise --data.loss-last, or see --data.loss-on",
        )
    rows = (with_loss_last(row, config.loss_last) for row in divided(example, config.max_length, bos_id))
    return [row for row in rows if row.has_target]
