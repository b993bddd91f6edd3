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
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.ops.mxfp4 import BLOCK, LEVELS
from nalora_jax.weights.keymaps import KeyMap, Slot
from nalora_jax.weights.shards import FileTensor
from nalora_jax.weights.tensors import Index, TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
# The two float32 levels of a byte, as one number that is looked up at once.
_PAIRS = np.array([(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)], np.float32).view(
    np.uint64
)[:, 0]
with np.errstate(over="ignore"):
    _POWERS = np.ldexp(np.float32(1), np.arange(256) - 127)
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# By fused tensor: the projections along its axis of outputs.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Unpacked(TensorSource):
    """The tensors of a source, those in MXFP4 as floats, which are exact in float32.

    Raises:
      NaloraError: blocks and scales do not belong together.
    """

    def __init__(self, source: TensorSource) -> None:
        self.where, self._source, self._shapes = source.where, source, dict(source.shapes())
        self._packed = {name.removesuffix(_BLOCKS) for name in self._shapes if name.endswith(_BLOCKS)}
        for stem in self._packed:
            shape, scales = self._shapes.pop(stem + _BLOCKS), self._shapes.pop(stem + _SCALES, None)
            if len(shape) != 4 or shape[-1] * 2 != BLOCK or scales != shape[:-1]:
                raise NaloraError(
                    f"{source.where}: {stem}{_BLOCKS}",
                    expected=f"[experts, outputs, inputs / {BLOCK}, {BLOCK // 2}], and scales without the last axis",
                    found=f"{shape} and {scales or 'no scales'}",
                )
            self._shapes[stem] = (shape[0], shape[2] * BLOCK, shape[1])

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        if name not in self._packed:
            self._source.check_readable(name)
            return
        for stored in (name + _BLOCKS, name + _SCALES):
            if (found := self._source.stored(stored).format) != "U8":
                raise NaloraError(f"{self.where}: {stored}", expected="U8", found=found)

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of one in MXFP4, of its blocks."""
        return self._source.stored(name + _BLOCKS if name in self._packed else name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats; of one in MXFP4, from the blocks that it overlaps."""
        if name not in self._packed:
            return self._source.read(name, index)
        experts, inputs, outputs = index
        first = inputs.start // BLOCK
        place = (experts, outputs, slice(first, -(-inputs.stop // BLOCK)))
        blocks = self._source.read(name + _BLOCKS, (*place, slice(0, BLOCK // 2))).view(np.uint8)
        scales = self._source.read(name + _SCALES, place).view(np.uint8)
        values = np.take(_PAIRS, blocks).view(np.float32)  # [experts, outputs, blocks, 32]
        values *= np.take(_POWERS, scales)[..., None]
        flat = values.reshape(*values.shape[:2], -1)
        start = inputs.start - first * BLOCK
        return flat[..., start : start + inputs.stop - inputs.start].swapaxes(-1, -2)


def with_fused_experts(keymap: KeyMap, names: Iterable[str]) -> KeyMap:
    """Returns the key map of a file with the tensors ``names``, which may fuse the experts of a layer."""
    tensors = dict(keymap.by_name)
    for name in map(keymap.canonical, names):
        match = _FUSED.fullmatch(name)
        if match is None or name in tensors:
            continue
        stems = [f"{match[1]}.{{}}.{part}.weight" for part in _PARTS[match[2]]]
        parts = [tensors[stem.format(0)] for stem in stems if stem.format(0) in tensors]
        count = 0
        while all(stem.format(count) in tensors for stem in stems):
            for stem in stems:
                del tensors[stem.format(count)]
            count += 1
        if count:  # [outputs, inputs] each -> [experts, outputs of all parts, inputs]
            rows = tuple(part.shape[0] for part in parts)
            slots = tuple(Slot(slot.path, slot.layer) for part in parts for slot in part.slots)
            shape = (count, sum(rows), parts[0].shape[1])
            tensors[name] = replace(parts[0], name=name, shape=shape, slots=slots, rows=rows)
    return replace(keymap, tensors=tuple(tensors.values()))
