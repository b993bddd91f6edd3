"""Part of a source, and the draw that holds some of its records out where nobody has said which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Record, Source, Span
from nalora_jax.errors import NaloraError

SHARE, MOST = 0.05, 500  # of the records, held out where there is no split for it
ENOUGH, LARGEST_SHARE = 20, 0.2  # of few records, as many as say anything, but no more than this share of them
_FEWEST = 4
# One draw for every run, so that runs with different seeds are measured on the same records.
_SEED = 20260101


class SelectedSource(Source):
    """Some records of another source.

    Args:
      base: the other source.
      indices: of the records, in ascending order.
      what: says which they are, for messages.
    """

    def __init__(self, base: Source, indices: np.ndarray, what: str) -> None:
        self._base, self._indices = base, indices
        self.dataset, self.name, self.siblings = base.dataset, f"{base.name}, {what}", base.siblings
        self.fingerprint = f"{base.fingerprint}:{hashlib.sha256(indices.astype('<i8').tobytes()).hexdigest()}"

    def __str__(self) -> str:
        """For the log."""
        return self.name

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._base[int(self._indices[index])]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at ``indices``."""
        return self._base.read(self._indices[np.asarray(indices, np.int64)].tolist())

    @property
    def spans(self) -> list[Span]:
        """Those of the whole."""
        return self._base.spans

    def where(self, index: int) -> str:
        """What the whole calls the record."""
        return self._base.where(int(self._indices[index]))


def held_out_count(records: int) -> int:
    """Of so many records, how many are held out: one in twenty, but 20 of fewer than 400 and a fifth of fewer than 100.

    Example: 12 of 60, 20 of 100 and of 400, 50 of 1,000, 500 of 10,000 and more; never fewer than two.
    """
    few = min(ENOUGH, round(LARGEST_SHARE * records))
    return min(max(round(SHARE * records), few, 2), MOST)


def draw_held_out(whole: Source) -> tuple[Source, Source]:
    """``whole`` divided into records to train on and others to measure on, as `held_out_count` says.

    Raises:
      NaloraError: fewer than four records.
    """
    if len(whole) < _FEWEST:
        raise NaloraError(
            whole.name,
            expected=f"at least {_FEWEST} records, of which two are held out",
            found=len(whole),
            remedy="add records, or name others to measure on by --data.eval-split",
        )
    count = held_out_count(len(whole))
    order = permutation(len(whole), _SEED)
    parts = np.sort(order[count:]), np.sort(order[:count])
    rest, held = (SelectedSource(whole, part, f"{len(part)} of {len(whole)} records") for part in parts)
    return rest, held
