"""Experts that a file stores in another form, read as the tensors that a key map names.

MXFP4, as gpt-oss is released:

    X_blocks uint8 [E, d_out, d_in / 32, 16]     two codes per byte, the lower bits first
    X_scales uint8 [E, d_out, d_in / 32]         exponents, see `nalora_jax.ops.mxfp4`
        -> X float32 [E, d_in, d_out]            as in a file of floats; a slice reads its blocks

Two stacks a layer, as transformers 5 holds mixtures and some releases are stored; a key map with one
tensor per expert reads both forms:

    X.experts.gate_up_proj [E, 2 d_ff, d_model]  ->  X.experts.<e>.gate_proj.weight [d_ff, d_model],
                                                     X.experts.<e>.up_proj.weight   [d_ff, d_model]
    X.experts.down_proj    [E, d_model, d_ff]    ->  X.experts.<e>.down_proj.weight [d_model, d_ff]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.ops.mxfp4 import BLOCK, LEVELS
from nalora_jax.weights.keymaps import KeyMap
from nalora_jax.weights.tensors import FileTensor, Index, TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
# The two float32 levels of a byte, as one number that is looked up at once.
_PAIRS = np.array([(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)], np.float32).view(
    np.uint64
)[:, 0]
with np.errstate(over="ignore"):
    _POWERS = np.ldexp(np.float32(1), np.arange(256) - 127)


def with_floats(source: TensorSource) -> TensorSource:
    """Returns ``source``, or a `PackedTensors` around it if it has tensors in MXFP4."""
    if not any(name.endswith(_BLOCKS) for name in source.shapes()):
        return source
    return PackedTensors(source)


class PackedTensors:
    """The tensors of a source whose MXFP4 tensors appear as floats, as a `TensorSource`."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    @property
    def where(self) -> str:
        """The file or folder."""
        return self._source.where

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor, ``[E, d_in, d_out]`` for MXFP4.

        Raises:
          NaloraError: blocks and scales do not belong together.
        """
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        stored = dict(self._source.shapes())
        for name in [name for name in stored if name.endswith(_BLOCKS)]:
            stem = name.removesuffix(_BLOCKS)
            shape, scales = stored.pop(name), stored.pop(stem + _SCALES, None)
            if len(shape) != 4 or shape[-1] * 2 != BLOCK or scales != shape[:-1]:
                raise NaloraError(
                    f"{self.where}: {name}",
                    expected=f"[experts, outputs, inputs / {BLOCK}, {BLOCK // 2}], and scales without the last axis",
                    found=f"{shape} and {scales or 'no scales'}",
                )
            stored[stem] = (shape[0], shape[2] * BLOCK, shape[1])
        return stored

    def _parts(self, name: str) -> tuple[str, ...]:
        """Returns the names of a tensor's parts; none for a tensor that is stored as it is."""
        if name in self._source.shapes():
            return ()
        return (name + _BLOCKS, name + _SCALES)

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        for packed in self._parts(name):
            if (number_format := self._source.stored(packed).format) != "U8":
                raise NaloraError(f"{self.where}: {packed}", expected="U8", found=number_format)
        if not self._parts(name):
            self._source.check_readable(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats; values are exact in float32."""
        if not self._parts(name):
            return self._source.read(name, index)
        experts, inputs, outputs = index
        first = inputs.start // BLOCK
        overlapped = slice(first, -(-inputs.stop // BLOCK))
        place = (experts, outputs, overlapped)
        blocks, scales = (
            self._source.read(packed, of).view(np.uint8)
            for packed, of in zip(self._parts(name), ((*place, slice(0, BLOCK // 2)), place), strict=True)
        )
        values = np.take(_PAIRS, blocks).view(np.float32)  # [experts, outputs, blocks, 32]
        values *= np.take(_POWERS, scales)[..., None]
        flat = values.reshape(*values.shape[:2], -1)
        start = inputs.start - first * BLOCK
        return flat[..., start : start + inputs.stop - inputs.start].swapaxes(-1, -2)

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of the blocks, if it is packed."""
        return self._source.stored((self._parts(name) or (name,))[0])


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
