"""Messages about records that are longer than a packed sequence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nalora_jax.config import DataConfig
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.store import Counts

log = logging.getLogger(__name__)


UNLIMITED = 2**24  # context of a model that is not known


def advice(longest: int, context: int, ways: str = "split or truncate") -> str:
    """Returns advice on records of up to ``longest`` positions in a model with ``context`` positions."""
    keeps = f"--data.max-length {longest} keeps all"
    if longest > context:
        keeps = f"some are longer than the {context:,} tokens that a row may have with this model"
    return f"{keeps}, --data.too-long {ways} shortens them"


def report_dropped(
    name: str,
    counts: Counts,
    config: DataConfig,
    context: int = UNLIMITED,
    ways: str = "split or truncate",
) -> None:
    """Logs the number of records split or dropped as too long; refuses data if most are dropped.

    Training on only the short half of a data set is not the task that its user specified.

    Args:
      name: of the data.
      counts: numbers of records, and the longest.
      config: gives the row length.
      context: maximum tokens of a row.
      ways: values of ``too_long`` that keep long records.
    """
    if counts.split:
        actual = f"{counts.split} records longer than a row of {config.max_length} tokens"
        log.info("%s: %s are split; rows of examples: %d", name, actual, counts.examples)
    if not counts.dropped:
        return
    total = counts.examples + counts.dropped
    share = f"{counts.dropped / total:.0%}"
    actual = (
        f"{counts.dropped} of {total} records ({share}), longer than --data.max-length {config.max_length}"
    )
    if 2 * counts.dropped > total:
        remedy = advice(counts.longest - 1, context, ways)
        raise mostly_too_long(name, counts.dropped, f"{total} records", config, remedy)
    log.warning("%s: left out %s; %s", name, actual, advice(counts.longest - 1, context, ways))


def mostly_too_long(name: str, count: int, of: str, config: DataConfig, remedy: str) -> NaloraError:
    """Returns the error for data of which ``count`` out of ``of`` records are longer than a row."""
    share = count / int(of.split()[0])
    return NaloraError(
        name,
        expected="records most of which fit",
        found=f"{count} of {of} ({share:.0%}), longer than --data.max-length {config.max_length}",
        remedy=remedy,
    )


def too_long(where: str, size: int, config: DataConfig, context: int) -> NaloraError:
    """Returns the error for a record of ``size`` tokens that does not fit a row."""
    remedy = "raise --data.max-length, or choose --data.too-long drop, split or truncate"
    if size - 1 > context:
        remedy = f"choose --data.too-long drop, split or truncate: the model has {context:,} positions"
    return NaloraError(
        where,
        expected=f"at most --data.max-length {config.max_length} tokens and the one after them",
        found=f"{size} tokens",
        remedy=remedy,
    )
