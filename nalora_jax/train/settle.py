"""Settings that depend on model and data: learning rate, sequence length, steps of epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from nalora_jax.config import RunConfig
from nalora_jax.data.lengths import with_length
from nalora_jax.data.pipeline import train_data
from nalora_jax.data.preference import pair_data, pair_sizes
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_train
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.train.inputs import described, stream_shape
from nalora_jax.train.learning_rate import with_learning_rate
from nalora_jax.weights.base import read_tokenizer_of
from nalora_jax.weights.hub import ResolvedSource

log = logging.getLogger(__name__)

_EVAL_EVERY = 50


def settled(
    config: RunConfig,
    files: ResolvedSource | None,
    source: Mapping[str, Source] | None = None,
    *,
    images: int = 0,
) -> RunConfig:
    """Returns ``config`` with learning rate, sequence length, steps and evaluation interval.

    Args:
      config: the run's settings.
      files: files of the model, for its config and tokenizer; None for image and text encoders.
      source: sources by split, which replace the data set of ``config``.
      images: number of training images of image and text encoders.

    Raises:
      NaloraError: bad data, or an optimizer without an automatic learning rate.
    """
    if config.epochs and files is None:
        config = _with_steps(config, images, "images")
    if files is not None and (config.epochs or not config.data.max_length):
        config = _of_data(config, files, source)
    if not config.optimizer.learning_rate:
        width = 0
        if files is not None:
            width = described(config, files).d_model
        config = with_learning_rate(config, width)
        log.info("learning rate %g", config.optimizer.learning_rate)
    every = config.train.eval_every
    if every < 0:
        every = min(_EVAL_EVERY, max(config.steps // 2, 1))
    return replace(config, train=replace(config.train, eval_every=every))


def _of_data(config: RunConfig, files: ResolvedSource, source: Mapping[str, Source] | None) -> RunConfig:
    added = AddedTokens.of(config.data)
    base = described(config, files)
    tokenizer = read_tokenizer_of(files, base, added)
    measure = None
    if config.preference.loss != "none":
        measure = partial(pair_sizes, preference=config.preference)
    data = with_length(
        config.data, open_train(config.data, source=source), tokenizer, base.max_positions, measure
    )
    config = replace(config, data=data)
    if not config.epochs:
        return config
    shape = stream_shape(config) | {"context": base.max_positions}
    if config.preference.loss != "none":
        pairs = pair_data(open_train(data, source=source), data, config.preference, tokenizer, **shape)
        return _with_steps(config, pairs.rows_per_epoch, "rows of pairs")
    return _with_steps(config, train_data(data, tokenizer, source=source, **shape).rows_per_epoch, "rows")


def _with_steps(config: RunConfig, rows: int, kind: str) -> RunConfig:
    """Returns ``config`` with the number of steps in its epochs."""
    batch = config.train.batch_size
    steps = max(1, math.ceil(config.epochs * rows / batch))
    log.info("%g epochs of %d %s: %d steps of %d", config.epochs, rows, kind, steps, batch)
    return replace(config, steps=steps)
