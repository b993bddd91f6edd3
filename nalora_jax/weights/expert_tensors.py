"""Experts that a file stores in another form, read as the tensors that a key map names.

MXFP4, as gpt-oss is released:

    X_blocks uint8 [E, d_out, d_in / 32, 16]     two codes per byte, the lower bits first
    X_scales uint8 [E, d_out, d_in / 32]         exponents, see `nalora_jax.ops.quantize`
        -> X float32 [E, d_in, d_out]            as in a file of floats; a slice reads its blocks

Two stacks a layer, as transformers 5 holds mixtures and some releases are stored; a key map with one
tensor per expert reads both forms:

    X.experts.gate_up_proj [E, 2 d_ff, d_model]  ->  X.experts.<e>.gate_proj.weight [d_ff, d_model],
                                                     X.experts.<e>.up_proj.weight   [d_ff, d_model]
    X.experts.down_proj    [E, d_model, d_ff]    ->  X.experts.<e>.down_proj.weight [d_model, d_ff]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.ops.quantize import MXFP4_BLOCK as BLOCK
from nalora_jax.ops.quantize import MXFP4_LEVELS as LEVELS
from nalora_jax.weights.keymaps import KeyMap
from nalora_jax.weights.shards import FileTensor
from nalora_jax.weights.tensors import Index, TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
# The two float32 levels of a byte, as one number that is looked up at once.
_PAIRS = np.array([(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)], np.float32).view(
    np.uint64
)[:, 0]
with np.errstate(over="ignore"):
    _POWERS = np.ldexp(np.float32(1), np.arange(256) - 127)
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
# By fused tensor: the projections along its axis of outputs.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class _Converted:
    """A tensor that is read from others of the file."""

    shape: tuple[int, ...]
    stored: tuple[str, ...]  # names of the others
    read: Callable[[Index], np.ndarray]
    format: str = ""  # that they must have; by default any that can be read


class ConvertedTensors(TensorSource):
    """The tensors of a source, some of them read from others."""

    def __init__(self, source: TensorSource, converted: Mapping[str, _Converted]) -> None:
        self.where, self._source, self._converted = source.where, source, converted
        used = {name for tensor in converted.values() for name in tensor.stored}
        self._shapes = {name: shape for name, shape in source.shapes().items() if name not in used}
        self._shapes |= {name: tensor.shape for name, tensor in converted.items()}

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        if name not in self._converted:
            self._source.check_readable(name)
            return
        expected = self._converted[name].format
        for stored in self._converted[name].stored:
            if not expected:
                self._source.check_readable(stored)
            elif (found := self._source.stored(stored).format) != expected:
                raise NaloraError(f"{self.where}: {stored}", expected=expected, found=found)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats, reading little more of the file."""
        if name in self._converted:
            return self._converted[name].read(index)
        return self._source.read(name, index)

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of the first tensor that a converted one is read from."""
        if name in self._converted:
            name = self._converted[name].stored[0]
        return self._source.stored(name)


def with_experts(source: TensorSource, keymap: KeyMap) -> TensorSource:
    """Returns the tensors of ``source`` as the key map names them.

    Tensors in MXFP4 are floats, which are exact in float32, and experts that the key map has one by
    one are split.

    Raises:
      NaloraError: blocks and scales do not belong together; a fused tensor does not have three axes, or
        an odd number of gates and ups.
    """
    converted = dict([*_packed(source), *_split(source, keymap)])
    return ConvertedTensors(source, converted) if converted else source


def _packed(source: TensorSource) -> Iterator[tuple[str, _Converted]]:
    shapes = source.shapes()
    for name in [name for name in shapes if name.endswith(_BLOCKS)]:
        stem = name.removesuffix(_BLOCKS)
        shape, scales = shapes[name], shapes.get(stem + _SCALES)
        if len(shape) != 4 or shape[-1] * 2 != BLOCK or scales != shape[:-1]:
            raise NaloraError(
                f"{source.where}: {name}",
                expected=f"[experts, outputs, inputs / {BLOCK}, {BLOCK // 2}], and scales without the last axis",
                found=f"{shape} and {scales or 'no scales'}",
            )
        floats = (shape[0], shape[2] * BLOCK, shape[1])
        yield stem, _Converted(floats, (name, stem + _SCALES), partial(_unpacked, source, stem), "U8")


def _unpacked(source: TensorSource, stem: str, index: Index) -> np.ndarray:
    """Returns a slice of a tensor in MXFP4, from the blocks that it overlaps."""
    experts, inputs, outputs = index
    first = inputs.start // BLOCK
    place = (experts, outputs, slice(first, -(-inputs.stop // BLOCK)))
    blocks, scales = (
        source.read(stem + packed, of).view(np.uint8)
        for packed, of in ((_BLOCKS, (*place, slice(0, BLOCK // 2))), (_SCALES, place))
    )
    values = np.take(_PAIRS, blocks).view(np.float32)  # [experts, outputs, blocks, 32]
    values *= np.take(_POWERS, scales)[..., None]
    flat = values.reshape(*values.shape[:2], -1)
    start = inputs.start - first * BLOCK
    return flat[..., start : start + inputs.stop - inputs.start].swapaxes(-1, -2)


def _split(source: TensorSource, keymap: KeyMap) -> Iterator[tuple[str, _Converted]]:
    for name, shape in source.shapes().items():
        match = _FUSED.match(name)
        if match is None or keymap.canonical(name) in keymap.by_name:
            continue
        parts = _PARTS[match[2]]
        if len(shape) != 3 or shape[1] % len(parts):
            expected = f"[experts, outputs of {' and '.join(parts)}, inputs]"
            raise NaloraError(f"{source.where}: {name}", expected=expected, found=shape)
        experts, rows, inputs = shape[0], shape[1] // len(parts), shape[2]
        for number, part in enumerate(parts):
            for expert in range(experts):
                read = partial(_part, source, name, expert, number * rows)
                yield f"{match[1]}.{expert}.{part}.weight", _Converted((rows, inputs), (name,), read)


def _part(source: TensorSource, name: str, expert: int, first: int, index: Index) -> np.ndarray:
    """Returns a slice of one expert's projection, whose outputs begin at ``first`` of a fused tensor."""
    outputs, inputs = index
    rows = slice(first + outputs.start, first + outputs.stop)
    return source.read(name, (slice(expert, expert + 1), rows, inputs))[0]
