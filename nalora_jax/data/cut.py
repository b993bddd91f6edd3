"""Cuts tokenized examples to the row length by dropping, truncating or refusing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.source import Source
from nalora_jax.data.store import TokenStore, is_whole, load_store, write_store
from nalora_jax.data.tokenize import Example, fit
from nalora_jax.data.too_long import report_dropped, too_long
from nalora_jax.errors import NaloraError


def cut_store(store: TokenStore, source: Source, config: DataConfig, bos_id: int | None) -> TokenStore:
    """Returns the examples that fit ``config.max_length``, or ``store`` itself if all of them fit.

    Cut examples are cached next to the store.

    Args:
      store: all examples of ``source``.
      source: names records in messages.
      config: gives ``max_length`` and ``too_long``.
      bos_id: id that stays at the beginning of a truncated example.

    Raises:
      NaloraError: a record is too long and ``too_long`` is an error; fewer than half of the records
        or none of them fit; the disk is full.
    """
    sizes = np.diff(store.offsets)
    long = sizes > config.max_length + 1
    if not long.any():
        return store
    if config.too_long == "error":
        first = int(np.argmax(long))
        raise too_long(source.where(int(store.records[first])), int(sizes[first]), config)
    longest, count = store.counts.longest, int(long.sum())
    drop = config.too_long == "drop"
    if drop and count == len(sizes):
        raise NaloraError(
            source.name,
            expected=f"records of at most {config.max_length} tokens",
            found=f"{count} records, all of them longer",
            remedy=f"--data.max-length {longest - 1} keeps all, --data.too-long truncate shortens them",
        )
    folder = store.folder.with_name(f"{store.folder.name}-{config.max_length}-{config.too_long}")
    if not is_whole(folder):
        examples = _examples(
            store,
            np.flatnonzero(~long) if drop else np.arange(len(sizes)),
            config.max_length,
            bos_id,
        )
        write_store(folder, examples, dropped=count if drop else 0, truncated=0 if drop else count)
    cut = load_store(folder)
    cut = replace(cut, counts=replace(cut.counts, longest=longest))
    report_dropped(source.name, cut.counts, config)
    return cut


def _examples(
    store: TokenStore, indices: np.ndarray, max_length: int, bos_id: int | None
) -> Iterator[tuple[int, Example]]:
    for index in indices:
        place = slice(store.offsets[index], store.offsets[index + 1])
        example = Example(np.asarray(store.tokens[place]), np.asarray(store.answer[place]))
        yield int(store.records[index]), fit(example, max_length, bos_id)
