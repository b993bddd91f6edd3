"""Experts of a layer that a file stores in two tensors, read as one tensor per expert.

    X.experts.gate_up_proj [E, 2 d_ff, d_model]  ->  X.experts.<e>.gate_proj.weight [d_ff, d_model],
                                                     X.experts.<e>.up_proj.weight   [d_ff, d_model]
    X.experts.down_proj    [E, d_model, d_ff]    ->  X.experts.<e>.down_proj.weight [d_model, d_ff]

transformers 5 holds mixtures in this form, and some releases are stored in it. A key map with one
tensor per expert reads both forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.weights.keymaps import KeyMap
from nalora_jax.weights.slices import Index
from nalora_jax.weights.tensors import FileTensor, TensorSource

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
# By fused tensor: the projections along its axis of outputs.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class _Place(NamedTuple):
    """The part of a fused tensor that is one expert's projection."""

    name: str  # of the fused tensor
    expert: int
    first: int  # row of its outputs
    shape: tuple[int, int]


def with_experts(source: TensorSource, keymap: KeyMap) -> TensorSource:
    """Returns ``source``, or a `FusedExperts` around it if the key map has one tensor per expert."""
    fused = [
        name
        for name in source.shapes()
        if _FUSED.match(name) and keymap.canonical(name) not in keymap.by_name
    ]
    return FusedExperts(source, fused) if fused else source


class FusedExperts:
    """The tensors of a source whose fused experts appear as one tensor per expert, as a `TensorSource`.

    Args:
      source: the file or folder.
      fused: names of its fused tensors.
    """

    def __init__(self, source: TensorSource, fused: list[str]) -> None:
        self._source, self._fused = source, fused

    @property
    def where(self) -> str:
        """The file or folder."""
        return self._source.where

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor.

        Raises:
          NaloraError: a fused tensor does not have three axes, or an odd number of gates and ups.
        """
        stored = {name: shape for name, shape in self._source.shapes().items() if name not in self._fused}
        return stored | {name: place.shape for name, place in self._places.items()}

    @cached_property
    def _places(self) -> dict[str, _Place]:
        places = {}
        for name in self._fused:
            match, shape = _FUSED.match(name), self._source.shapes()[name]
            assert match is not None
            parts = _PARTS[match[2]]
            if len(shape) != 3 or shape[1] % len(parts):
                expected = f"[experts, outputs of {' and '.join(parts)}, inputs]"
                raise NaloraError(f"{self.where}: {name}", expected=expected, found=shape)
            experts, rows, inputs = shape[0], shape[1] // len(parts), shape[2]
            for number, name_of_part in enumerate(parts):
                for e in range(experts):
                    places[f"{match[1]}.{e}.{name_of_part}.weight"] = _Place(
                        name, e, number * rows, (rows, inputs)
                    )
        return places

    def _stored_name(self, name: str) -> str:
        return self._places[name].name if name in self._places else name

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        self._source.check_readable(self._stored_name(name))

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats, reading little more of the file."""
        if name not in self._places:
            return self._source.read(name, index)
        place, (outputs, inputs) = self._places[name], index
        rows = slice(place.first + outputs.start, place.first + outputs.stop)
        return self._source.read(place.name, (slice(place.expert, place.expert + 1), rows, inputs))[0]

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of the fused tensor, if it is part of one."""
        return self._source.stored(self._stored_name(name))
