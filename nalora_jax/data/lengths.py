"""Chooses the row length from the lengths of a data set's examples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from nalora_jax.common.notes import counting
from nalora_jax.config import DataConfig
from nalora_jax.data.packing import pack, permutation
from nalora_jax.data.rendered import rendered
from nalora_jax.data.source import Source
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.data.too_long import UNLIMITED

log = logging.getLogger(__name__)

KEPT = 0.99  # share of the examples that fit a row
SHORTEST = 128  # minimum of packed rows: shorter rows make batches too small
FULL = 0.9  # packing efficiency for which rows become longer, at most four times
_LONGER = (1, 1.25, 1.5, 2, 3, 4)
SAMPLE = 10_000  # maximum of measured examples
_REPEATED = 1000  # examples: of fewer, the last row would decide the efficiency
_MULTIPLE = 8
_SEED = 20260103  # of the draw of measured examples: the same in every run


def with_length(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    context: int = UNLIMITED,
    measure: Callable[[Source, DataConfig, Tokenizer], np.ndarray] | None = None,
) -> DataConfig:
    """Returns ``config`` with a row length of 0 replaced by one that 99 of 100 examples fit.

    The length is a multiple of 8, at least 128 for packed rows, and at most the model's context. Packed
    rows become up to four times as long if shorter ones are less than 90% full.

    Args:
      config: config of the run.
      source: training records; at most 10,000 are measured.
      tokenizer: tokenizer of the model.
      context: maximum tokens of the model.
      measure: row positions of records; by default `example_lengths`.
    """
    if config.max_length:
        return config
    lengths = (measure or example_lengths)(source, config, tokenizer)
    quantile = int(np.quantile(lengths, KEPT, method="inverted_cdf"))
    shortest = SHORTEST if config.pack else 1
    length = min(max(-(-quantile // _MULTIPLE) * _MULTIPLE, shortest), context)
    full = 1.0
    if config.pack:
        length, full = _filled(lengths, length, context)
    fitting = float(np.mean(lengths <= length))
    log.info(
        "rows of %d tokens, %.0f%% full: %.1f%% of %d examples fit, the longest has %d; "
        "--data.max-length names another length",
        length,
        100 * full,
        100 * fitting,
        len(lengths),
        lengths.max(),
    )
    return replace(config, max_length=length)


def _filled(lengths: np.ndarray, length: int, context: int) -> tuple[int, float]:
    """Returns the shortest row length that packs well, else the one that packs best, and its efficiency."""
    tried = []
    for factor in _LONGER:
        longer = min(-(-int(factor * length) // _MULTIPLE) * _MULTIPLE, context)
        fitting = lengths[(lengths > 0) & (lengths <= longer)]
        if not len(fitting):
            continue
        repeated = np.tile(fitting, -(-_REPEATED // len(fitting)))
        tried.append((longer, pack(repeated, longer).filling))
        if tried[-1][1] >= FULL:
            return tried[-1]
    return max(tried, key=lambda row: row[1], default=(length, 0.0))


def drawn(source: Source) -> np.ndarray:
    """Returns the ascending indices of the measured records, at most 10,000, equal in all runs."""
    return np.sort(permutation(len(source), _SEED)[:SAMPLE])


def example_lengths(source: Source, config: DataConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the row positions of examples, int64 [n]; of more than 10,000, those of a fixed draw.

    Raises:
      NaloraError: a record is broken.
    """
    indices = drawn(source)
    lengths: list[int] = []
    with counting("measuring examples", len(indices)) as done:
        for chunk, _, texts in rendered(source, indices, config, tokenizer):
            lengths += [len(example.ids) - 1 for example in tokenize(texts, tokenizer)]
            done(len(chunk))
    return np.array(lengths, np.int64)
