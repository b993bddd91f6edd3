"""Subsets of a source, and the draw of held-out records if no evaluation split is set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Record, Source, Span
from nalora_jax.errors import NaloraError

SHARE, MOST = 0.05, 500  # share and maximum of held-out records without a split
ENOUGH, LARGEST_SHARE = 20, 0.2  # few records: at least 20, at most a fifth of them
_FEWEST = 4
# The same draw in every run, so that runs with different seeds are evaluated on the same records.
_SEED = 20260101


class SelectedSource(Source):
    """Subset of another source.

    Args:
      base: the other source.
      indices: ascending indices of the records.
      what: description of the subset, for messages.
    """

    def __init__(self, base: Source, indices: np.ndarray, what: str) -> None:
        self._base, self._indices = base, indices
        self.dataset, self.name, self.siblings = base.dataset, f"{base.name}, {what}", base.siblings
        self.fingerprint = (
            f"{base.fingerprint}:{hashlib.sha256(indices.astype('<i8').tobytes()).hexdigest()}"
        )

    def __str__(self) -> str:
        """Returns the name for the log."""
        return self.name

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``."""
        return self._base.read(self._indices[np.asarray(indices, np.int64)].tolist())

    @property
    def spans(self) -> list[Span]:
        """Returns the spans of the other source."""
        return self._base.spans

    def where(self, index: int) -> str:
        """Returns the other source's name of the record."""
        return self._base.where(int(self._indices[index]))


def held_out_count(records: int) -> int:
    """Returns the number of held-out records: 5%, at most 500; at least 20, but at most a fifth.

    Example: 12 of 60, 20 of 100 and of 400, 50 of 1,000, 500 of 10,000 and more; at least two.
    """
    few = min(ENOUGH, round(LARGEST_SHARE * records))
    return min(max(round(SHARE * records), few, 2), MOST)


def draw_held_out(source: Source) -> tuple[Source, Source]:
    """Divides ``whole`` into training and evaluation records, with the size of `held_out_count`.

    Raises:
      NaloraError: fewer than four records.
    """
    if len(source) < _FEWEST:
        expected = f"at least {_FEWEST} records, of which two are held out"
        remedy = "add records, or name others to measure on by --data.eval-split"
        raise NaloraError(source.name, expected=expected, found=len(source), remedy=remedy)
    count = held_out_count(len(source))
    order = permutation(len(source), _SEED)
    parts = np.sort(order[count:]), np.sort(order[:count])
    remaining, held = (
        SelectedSource(source, indices, f"{len(indices)} of {len(source)} records") for indices in parts
    )
    return remaining, held
