"""Messages about records that are longer than a packed sequence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nalora_jax.config import DataConfig
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.store import Counts

log = logging.getLogger(__name__)


def report_dropped(name: str, counts: Counts, config: DataConfig) -> None:
    """Logs the number of records split or dropped as too long; refuses data if most are dropped.

    Training on only the short half of a data set is not the task that its user specified.
    """
    if counts.split:
        actual = f"{counts.split} records longer than a row of {config.max_length} tokens"
        log.info("%s: %s are split; rows of examples: %d", name, actual, counts.examples)
    if not counts.dropped:
        return
    total, enough = counts.examples + counts.dropped, counts.longest - 1
    share = f"{counts.dropped / total:.0%}"
    actual = (
        f"{counts.dropped} of {total} records ({share}), longer than --data.max-length {config.max_length}"
    )
    if 2 * counts.dropped > total:
        raise mostly_too_long(name, counts.dropped, f"{total} records", counts.longest, config)
    log.warning(
        "%s: left out %s; --data.max-length %d keeps all, --data.too-long split or truncate shortens them",
        name,
        actual,
        enough,
    )


def mostly_too_long(name: str, count: int, of: str, longest: int, config: DataConfig) -> NaloraError:
    """Returns the error for data of which ``count`` out of ``of`` records are longer than a row."""
    share = count / int(of.split()[0])
    return NaloraError(
        name,
        expected="records most of which fit",
        found=f"{count} of {of} ({share:.0%}), longer than --data.max-length {config.max_length}",
        remedy=f"--data.max-length {longest - 1} keeps all, --data.too-long split or truncate shortens them",
    )


def too_long(where: str, size: int, config: DataConfig) -> NaloraError:
    """Returns the error for a record of ``size`` tokens that does not fit a row."""
    return NaloraError(
        where,
        expected=f"at most --data.max-length {config.max_length} tokens and the one after them",
        found=f"{size} tokens",
        remedy="raise --data.max-length, or choose --data.too-long drop, split or truncate",
    )
