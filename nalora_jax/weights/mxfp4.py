"""Experts in MXFP4, as gpt-oss is released, read as tensors of floats.

    X_blocks uint8 [E, d_out, d_in / 32, 16]     two codes per byte, the lower bits first
    X_scales uint8 [E, d_out, d_in / 32]         exponents, see `nalora_jax.ops.mxfp4`
        -> X float32 [E, d_in, d_out]            as in a file of floats

A slice of X reads the blocks that it overlaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.ops.mxfp4 import BLOCK, LEVELS
from nalora_jax.weights.slices import Index
from nalora_jax.weights.tensors import FileTensor, TensorSource

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
