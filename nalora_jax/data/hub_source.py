"""Data sets of the Hugging Face hub, read with the library `datasets` (extra ``datasets``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nalora_jax.data.source import Record, Source, Span, foreign_errors
from nalora_jax.errors import NaloraError


class HubSource(Source):
    """One split expression of a data set that `datasets` has loaded.

    Args:
      name: for messages.
      split: a split expression in the syntax that TFDS and `datasets` share.
      data: a `datasets.Dataset`.
      siblings: splits of the data set.
    """

    def __init__(self, name: str, split: str, data: Any, siblings: Sequence[str]) -> None:
        self._data = data
        self.dataset, self.name, self.siblings = name, f"{name}[{split}]", tuple(siblings)
        self.fingerprint = f"hf:{data._fingerprint}"  # covers files and transformations
        self._split = split

    def __len__(self) -> int:
        return len(self._data)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``."""
        columns = self._data[list(map(int, indices))]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @property
    def spans(self) -> list[Span]:
        """Returns parts of the data set's splits."""
        from nalora_jax.data.tfds_source import absolute_of

        splits = self._data.info.splits or {}
        sizes = {name: splits[name].num_examples for name in splits} or {self._split: len(self)}
        return absolute_of(self._split, sizes)


def open_hub(argument: str, split: str) -> Source:
    """Opens a split of ``ORG/NAME[:CONFIG]``, downloaded on first use into the cache of `datasets`.

    Code of a data set is never executed.

    Raises:
      NaloraError: the extra is not installed, or the data set is not available.
    """
    try:
        import datasets
    except ImportError as error:
        remedy = "pip install datasets (or nalora_jax with its extra `datasets`)"
        raise NaloraError(
            f"hf:{argument}", expected="the library datasets", found="none", remedy=remedy
        ) from error
    name, _, config = argument.partition(":")
    remedy = (
        "check the id, its config (hf:ORG/NAME:CONFIG) and the split; a private data set needs HF_TOKEN"
    )
    with foreign_errors(f"hf:{argument}[{split}]", "a data set that can be loaded from the hub", remedy):
        names = datasets.get_dataset_split_names(name, config or None)
        data = datasets.load_dataset(name, config or None, split=split)
    return HubSource(f"hf:{argument}", split, data, names)
