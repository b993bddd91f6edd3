"""The tensors of Hugging Face folders with quantized weights.

A module of such a folder has several tensors instead of its ``weight [out, in]``:

    fp8, ModelOpt fp8         weight fp8 [out, in], weight_scale_inv or weight_scale
    compressed-tensors 8 bits weight fp8 or int8 [out, in], weight_scale, weight_zero_point
    compressed-tensors int    weight_packed int32 [out, in / 8], weight_scale, weight_zero_point,
                              weight_shape, weight_g_idx
    NVFP4, MXFP4              weight_packed uint8 [out, in / 2], weight_scale, weight_global_scale
    ModelOpt NVFP4            weight uint8 [out, in / 2], weight_scale, weight_scale_2
    GPTQ                      qweight int32 [in / 8, out], qzeros, scales, g_idx
    AWQ                       qweight int32 [in, out / 8], qzeros, scales

`QuantizedTensors` presents them as ``weight [out, in]`` in floats. `QuantizedTensors.loaders` loads
the kernels of layers as they are stored (`nalora_jax.ops.scaled`). Values equal those of the
format's reference implementation bit for bit: each scheme states to which dtype that one rounds.
Activations are not quantized.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.quantize import MXFP4_LEVELS, kernels
from nalora_jax.ops.scaled import PACKED_INPUTS, ZEROS, Element, Scaled, Scaling
from nalora_jax.weights.keymaps import KeyMap, SourceTensor, keymap_for
from nalora_jax.weights.quantization_config import (
    UNQUANTIZED_DTYPES,
    Quantization,
    ScaleBlock,
    Scheme,
)
from nalora_jax.weights.shards import SAFETENSORS_DTYPES, FileTensor
from nalora_jax.weights.tensors import PARAM_DTYPES as DTYPES_OF
from nalora_jax.weights.tensors import (
    WORKERS,
    Index,
    TensorSource,
    filled_array,
    whole,
)

log = logging.getLogger(__name__)

# By the number format in the file: the element of codes, the format of scales, and the dtype in
# which numbers are read; fp8 as its bits.
_ELEMENTS: dict[str, Element] = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "int8"}
_SCALES = {
    "F8_E4M3": "e4m3",
    "U8": "e8m0",
    "F8_E8M0": "e8m0",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
_READ: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("U8", "F8_E8M0", "F8_E4M3", "F8_E5M2"), np.dtype("u1")),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_NUMPY_FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
_LEVELS = np.asarray(MXFP4_LEVELS, np.float32)
_FORMATS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # of `Scaling.rounds`
_ELEMENT_BITS = {"int4": 4, "e2m1": 4}  # 8 of others
# AWQ's place of each of eight columns in an int32.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# For quantized activations and caches, which are not read.
_UNUSED = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
)
# Tensors of all schemes but ``weight``: a module in floats has none.
_PARTS = (
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "weight_zero_point",
    "weight_global_scale",
    "weight_scale_2",
    "weight_shape",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
_PIECE = 1 << 17  # codes copied at once, by one worker


@dataclass(frozen=True)
class _Weight:
    """A quantized weight: its format, and the names of its tensors in the file by role."""

    scheme: Scheme
    scaling: Scaling
    shape: ScaleBlock  # [inputs, outputs]
    names: Mapping[str, str]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _ELEMENT_BITS.get(self.scaling.element, 8)


@dataclass(frozen=True)
class _Place:
    """The position of a tensor of the file, or of a part of it, in a leaf."""

    name: str
    lead: tuple[int, ...]  # the leaf's leading indices: layer, expert
    first: int  # output of the tensor


class QuantizedTensors(TensorSource):
    """The tensors of a folder with quantized weights, these as floats.

    Raises:
      NaloraError: tensors of a module are missing, have another shape or number format than its
        scheme states, or belong to another scheme.
    """

    def __init__(self, source: TensorSource, quantization: Quantization) -> None:
        self.where = source.where
        self.quantization = quantization
        self.file = source  # the tensors as they are stored
        self._weights: dict[str, _Weight] = {}
        self._scheme = cache(quantization.scheme)
        shapes = dict(source.shapes())
        for name in source.shapes():
            module, _, tensor = name.rpartition(".")
            if tensor in _UNUSED:
                del shapes[name]
            scheme = self._scheme(module)
            if (
                scheme is None
                or tensor != scheme.codes
                or self._format(name) in UNQUANTIZED_DTYPES
            ):
                continue
            weight = self._weight(module, scheme)
            for part in scheme.tensors:
                shapes.pop(f"{module}.{part}", None)
            self._weights[f"{module}.weight"] = weight
        for name in shapes:
            module, _, tensor = name.rpartition(".")
            in_floats = tensor == "weight" and self._format(name) in UNQUANTIZED_DTYPES
            if tensor in _PARTS or (tensor == "weight" and not in_floats):
                raise self._mixed(name, module)
        for name, weight in self._weights.items():
            shapes[name] = weight.shape[::-1]
        self._shapes = shapes

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        if name not in self._weights:
            self.file.check_readable(name)

    def scaling(self, name: str) -> Scaling | None:
        """Returns the number format of a weight; None for floats."""
        weight = self._weights.get(name)
        if weight is None:
            return None
        return weight.scaling

    def parts(self, name: str) -> Mapping[str, str]:
        """Returns the tensors of a quantized weight by role ("codes", "scales", ...)."""
        weight = self._weights.get(name)
        if weight is None:
            return {}
        return weight.names

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of a quantized one, of its codes."""
        if name in self._weights:
            name = self._weights[name].names["codes"]
        return self.file.stored(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor; of a quantized one in the dtype to which its format
        rounds."""
        if name not in self._weights:
            return self.file.read(name, index)
        weight = self._weights[name]
        scaling = weight.scaling
        outputs, inputs = index
        codes = self._codes(weight, inputs, outputs)
        if scaling.element in _NUMPY_FLOATS:
            values = codes.view(_NUMPY_FLOATS[scaling.element]).astype(np.float32)
        elif scaling.element == "e2m1":
            values = np.take(_LEVELS, codes)
        else:
            values = codes.astype(np.float32)
        # [inputs], the block of each; [outputs] likewise
        of_inputs = self._order(weight)[inputs, 0]
        of_outputs = np.arange(outputs.start, outputs.stop)
        of_outputs //= scaling.block[1] or weight.shape[1]
        columns = slice(of_outputs[0], of_outputs[-1] + 1)
        rows = slice(of_inputs.min(), of_inputs.max() + 1)
        places = np.ix_(of_inputs - rows.start, of_outputs - columns.start)
        if "zeros" in weight.names:
            zeros = self._zeros(weight, rows, columns)
            values -= zeros[places].astype(np.float32)
        else:
            values -= ZEROS.get(scaling.element, 0)
        scales = self._scales(weight, rows, columns)
        if scaling.scale == "e4m3":
            scales = scales.view(ml_dtypes.float8_e4m3fn)
        elif scaling.scale == "e8m0":
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scales = scales.astype(np.float32)
        if "outer" in weight.names:
            outer = self._outer(weight)
            if scaling.divides:
                scales = scales / outer
            else:
                scales = scales * outer
        values *= scales[places]
        return values.T.astype(SAFETENSORS_DTYPES[_FORMATS[scaling.rounds]])

    # ------------------------------------------------------------ as they are stored

    def loaders(
        self, keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> dict[str, Callable[[Sharding], Scaled]]:
        """Returns functions that load leaves as the folder stores them, by path.

        Others are dequantized while they are read: a log line names them, with their bytes.

        Args:
          keymap: of the same model.
          shapes: of the leaves by path.
          dtype: of the parameters.

        Raises:
          NaloraError: tensors are missing, or the projection of a layer is in floats although
            ``quantization_config`` does not exclude it.
        """
        names = keymap.check(self._shapes, self.where)
        places: dict[str, list[_Place]] = defaultdict(list)
        reasons: dict[str, str] = {}
        for tensor in keymap.tensors:
            name = names[tensor.name]
            paths = [slot.path for slot in tensor.slots]
            self._check_quantized(name, paths)
            if name not in self._weights:
                continue
            first = 0
            for slot, rows in zip(tensor.slots, tensor.rows, strict=True):
                place = _Place(name, slot.index, first)
                places[slot.path].append(place)
                if reason := self._reason(tensor, place, slot.path, shapes[slot.path]):
                    reasons.setdefault(slot.path, reason)
                first += rows
        loaders: dict[str, Callable[[Sharding], Scaled]] = {}
        dequantized = 0
        for path, of_leaf in places.items():
            formats = set()
            for place in of_leaf:
                weight = self._weights[place.name]
                formats.add((weight.scaling, "zeros" in weight.names))
            if len(formats) > 1 or len(of_leaf) < math.prod(shapes[path][:-2]):
                reasons.setdefault(path, "its layers have different formats")
            if path in reasons:
                dequantized += (
                    math.prod(shapes[path]) * np.dtype(DTYPES_OF[dtype]).itemsize
                )
                continue
            loaders[path] = partial(self._load, shapes[path], of_leaf)
        log.info(
            "%s: %s; %d stacks of kernels stay as they are stored",
            self.where,
            self.quantization.describe(),
            len(loaders),
        )
        if dequantized:
            log.warning(
                "%s: dequantized to %s, %.3g MB: %s",
                self.where,
                dtype,
                dequantized / 1e6,
                "; ".join(f"{path} ({reason})" for path, reason in reasons.items()),
            )
        return loaders

    def _check_quantized(self, name: str, paths: Sequence[str]) -> None:
        """Raises an error for the projection of a layer in floats that is not excluded."""
        module = name.removesuffix(".weight")
        if name in self._weights or self._scheme(module) is None:
            return
        # AutoAWQ excludes modules that contain a name: "gate" is also of a gate_proj.
        if any(excluded in module for excluded in self.quantization.ignored):
            return
        if any(re.search(kernels("int8"), path) for path in paths):
            raise self._mixed(name, module)

    def _reason(
        self, tensor: SourceTensor, place: _Place, path: str, shape: tuple[int, ...]
    ) -> str:
        """Returns the reason for which a leaf cannot hold a tensor as it is stored, or ""."""
        scaling = self._weights[place.name].scaling
        transform = tensor.transform
        if not re.search(kernels("int8"), path):
            return "not the projection of a layer"
        if not transform.swaps or transform.mixes_rows or transform.alternates:
            return "its rows are reordered"
        if scaling.per_byte == 2 and shape[-2] % PACKED_INPUTS:
            return f"its {shape[-2]} inputs are not a multiple of {PACKED_INPUTS}"
        if scaling.block[1] > 1 and place.first % scaling.block[1]:
            return "it begins within a block"
        return ""

    def _load(
        self, shape: tuple[int, ...], places: Sequence[_Place], sharding: Sharding
    ) -> Scaled:
        """Returns a leaf as it is stored."""
        weights = [self._weights[place.name] for place in places]
        scaling = weights[0].scaling
        *lead, d_in, d_out = shape
        blocks = scaling.blocks((d_in, d_out))
        scales: np.dtype[Any] = np.dtype(np.uint8)
        if scaling.scale in _FORMATS:
            scales = SAFETENSORS_DTYPES[_FORMATS[scaling.scale]]
        codes: np.dtype[Any] = np.dtype(np.uint8)
        if scaling.element == "int8":
            codes = np.dtype(np.int8)
        arrays: dict[str, Any] = {"zeros": None, "outer": None, "order": None}
        wanted: dict[str, tuple[ScaleBlock, np.dtype[Any]]] = {
            "codes": ((d_in // scaling.per_byte, d_out), codes),
            "scales": (blocks, scales),
        }
        if "zeros" in weights[0].names:
            wanted["zeros"] = (blocks, codes)
        if "outer" in weights[0].names:
            wanted["outer"] = ((1, 1), np.dtype(np.float32))
        if any("order" in weight.names for weight in weights):
            wanted["order"] = ((d_in, 1), np.dtype(np.int32))
        for role, (inner, dtype) in wanted.items():
            fill = partial(self._fill, role, places)
            arrays[role] = filled_array((*lead, *inner), dtype, sharding, fill)
        return Scaled(**arrays, scaling=scaling)

    def _fill(
        self, role: str, places: Sequence[_Place], buffer: np.ndarray, index: Index
    ) -> None:
        """Fills ``buffer`` with the slice ``index`` of an array of a leaf."""
        *lead, rows, columns = index

        def copy(place: _Place) -> None:
            at = []
            for i, within in zip(place.lead, lead, strict=True):
                if not within.start <= i < within.stop:
                    return
                at.append(i - within.start)
            target = buffer[tuple(at)]
            by_rows = self._weights[place.name].scheme.packing in ("gptq", "awq")
            for part_rows, part_columns in _pieces(rows, columns, by_rows=by_rows):
                part = self._part(role, place, part_rows, part_columns)
                row = part_rows.start - rows.start
                column = part_columns.start - columns.start
                height, width = part.shape
                target[row : row + height, column : column + width] = part

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(copy, places))  # list() raises the workers' errors

    def _part(
        self, role: str, place: _Place, rows: slice, columns: slice
    ) -> np.ndarray:
        """Returns a part of an array of one kernel, as `nalora_jax.ops.scaled` describes it."""
        weight = self._weights[place.name]
        if role == "outer":
            return self._outer(weight).reshape(1, 1)
        if role == "order":
            return self._order(weight)[rows]
        first = place.first
        if role != "codes":
            first //= weight.scaling.block[1] or weight.shape[1]
        columns = slice(first + columns.start, first + columns.stop)
        if role == "scales":
            return self._scales(weight, rows, columns)
        if role == "zeros":
            return self._zeros(weight, rows, columns)
        if weight.scaling.per_byte == 1:
            return self._codes(weight, rows, columns)
        half = PACKED_INPUTS // 2
        runs = slice(rows.start // half, -(-rows.stop // half))
        whole = slice(runs.start * PACKED_INPUTS, runs.stop * PACKED_INPUTS)
        codes = self._codes(weight, whole, columns)
        halves = codes.reshape(-1, 2, half, codes.shape[-1])
        pairs = halves[:, 0] | (halves[:, 1] << 4)
        start = rows.start - runs.start * half
        return pairs.reshape(-1, codes.shape[-1])[
            start : start + rows.stop - rows.start
        ]

    # ------------------------------------------------------------ parts of a weight

    def _codes(self, weight: _Weight, inputs: slice, outputs: slice) -> np.ndarray:
        """Returns codes, uint8 or int8 ``[inputs, outputs]``."""
        name = weight.names["codes"]
        packing = weight.scheme.packing
        if packing == "plain":
            return self._words(name, (outputs, inputs)).T
        if packing == "inputs":
            return self._unpacked(weight, name, outputs, inputs, 1).T
        if packing == "gptq":
            return self._unpacked(weight, name, outputs, inputs, 0).T
        return self._unpacked(weight, name, inputs, outputs, 1)

    def _scales(self, weight: _Weight, rows: slice, columns: slice) -> np.ndarray:
        """Returns scales of blocks, ``[rows, columns]``; of "e4m3" and "e8m0" the bits."""
        return self._grid(weight, weight.names["scales"], rows, columns)

    def _zeros(self, weight: _Weight, rows: slice, columns: slice) -> np.ndarray:
        """Returns zeros of blocks, integers ``[rows, columns]``."""
        name = weight.names["zeros"]
        packing = weight.scheme.packing
        if packing == "plain":
            return self._grid(weight, name, rows, columns)
        zeros = self._unpacked(weight, name, rows, columns, int(packing != "inputs"))
        return (zeros + weight.scheme.zeros_below) & (2**weight.bits - 1)

    def _grid(
        self, weight: _Weight, name: str, rows: slice, columns: slice
    ) -> np.ndarray:
        """Returns a slice of an array with one number per block."""
        if weight.scheme.packing in ("gptq", "awq"):
            return self._words(name, (rows, columns))
        shape = self.file.shapes()[name]
        if len(shape) == 2:
            return self._words(name, (columns, rows)).T
        n_in, n_out = weight.scaling.blocks(weight.shape)
        return self._words(name, whole(shape)).reshape(n_out, n_in).T[rows, columns]

    def _outer(self, weight: _Weight) -> np.ndarray:
        """Returns the scale of the scales, float32 []."""
        name = weight.names["outer"]
        return self._words(name, whole(self.file.shapes()[name])).reshape(())

    def _order(self, weight: _Weight) -> np.ndarray:
        """Returns the block of each input, int32 ``[inputs, 1]``."""
        if "order" in weight.names:
            name = weight.names["order"]
            order = self._words(name, whole(self.file.shapes()[name]))
            return order.astype(np.int32)[:, None]
        d_in = weight.shape[0]
        blocks = np.arange(d_in, dtype=np.int32) // (weight.scaling.block[0] or d_in)
        return blocks[:, None]

    def _unpacked(
        self, weight: _Weight, name: str, others: slice, packed: slice, axis: int
    ) -> np.ndarray:
        """Returns codes uint8 ``[others, packed]`` of a matrix in which words along ``axis`` hold
        several."""
        size = _READ[self._format(name)].itemsize
        per_word = 8 * size // weight.bits
        words = slice(packed.start // per_word, -(-packed.stop // per_word))
        if axis == 1:
            read = self._words(name, (others, words))
        else:
            read = self._words(name, (words, others)).T
        places = np.arange(per_word)
        if weight.scheme.packing == "awq":
            places = np.asarray(_AWQ_PLACES)
        shifts = (places * weight.bits).astype(read.dtype)
        # The sign of a word is shifted in, and masked.
        codes = ((read[..., None] >> shifts) & (2**weight.bits - 1)).astype(np.uint8)
        first = packed.start - words.start * per_word
        flat = codes.reshape(len(read), -1)
        return flat[:, first : first + packed.stop - packed.start]

    def _words(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor of the file; fp8 as its bits."""
        read = self.file.read(name, index)
        return read.view(_READ.get(self._format(name), read.dtype))

    def _format(self, name: str) -> str:
        return self.file.stored(name).format

    # ------------------------------------------------------------ checks

    def _weight(self, module: str, scheme: Scheme) -> _Weight:
        """Returns the weight of a module, whose tensors are checked."""
        shapes = self.file.shapes()
        names = {"codes": f"{module}.{scheme.codes}"}
        roles = {
            "scales": scheme.scales,
            "zeros": (scheme.zeros,),
            "outer": (scheme.outer,),
        }
        roles |= {"order": (scheme.order,), "shape": (scheme.shape,)}
        for role, options in roles.items():
            for option in filter(None, options):
                if f"{module}.{option}" in shapes:
                    names.setdefault(role, f"{module}.{option}")
            needed = role not in ("order", "shape") and any(options)
            if needed and role not in names:
                raise NaloraError(
                    f"{self.where}: {names['codes']}",
                    expected=f"{' or '.join(options)} of the same module ({scheme.label})",
                    found="no such tensor",
                    remedy="download the folder again",
                )
        self._check_format(names["codes"], scheme.formats)
        self._check_format(names["scales"], scheme.scale_formats)
        element = scheme.element or _ELEMENTS[self._format(names["codes"])]
        scale = _SCALES[self._format(names["scales"])]
        rounds: Any = "float32"
        if scheme.rounds == "scale":
            rounds = scale
        elif scheme.rounds:
            rounds = scheme.rounds
        scaling = Scaling(element, (0, 0), scale, rounds, scheme.divides)
        weight = _Weight(scheme, scaling, (0, 0), names)
        shape = self._float_shape(weight)
        stored = shapes[names["scales"]]
        grids = []
        for block in scheme.blocks:
            scaling = replace(scaling, block=block)
            grid = _file_grid(scaling.blocks(shape), scheme.packing)
            if stored in _spellings(grid):
                weight = replace(weight, scaling=scaling, shape=shape)
                self._check_small(weight)
                return self._without_plain_order(weight)
            grids.append(str(grid))
        raise NaloraError(
            f"{self.where}: {names['scales']}",
            expected=f"{scheme.label}: the shape {' or '.join(grids)} for {shape[::-1]} weights",
            found=stored,
        )

    def _float_shape(self, weight: _Weight) -> ScaleBlock:
        """Returns inputs and outputs of a weight."""
        name = weight.names["codes"]
        shape = self.file.shapes()[name]
        if len(shape) != 2:
            raise NaloraError(f"{self.where}: {name}", expected="a matrix", found=shape)
        per_word = 8 * _READ[self._format(name)].itemsize // weight.bits
        rows, columns = shape
        packing = weight.scheme.packing
        if packing == "gptq":
            return (rows * per_word, columns)
        if packing == "awq":
            return (rows, columns * per_word)
        if packing == "plain":
            return (columns, rows)
        if "shape" not in weight.names:
            return (columns * per_word, rows)
        name = weight.names["shape"]
        self._check_format(name, ("I64", "I32"))
        found = tuple(self._words(name, whole(self.file.shapes()[name])).tolist())
        if len(found) != 2 or (rows, columns) != (found[0], -(-found[1] // per_word)):
            raise NaloraError(
                f"{self.where}: {name}",
                expected=f"the shape of which {weight.names['codes']} has {shape} words",
                found=found,
            )
        return (found[1], found[0])

    def _check_small(self, weight: _Weight) -> None:
        """Checks the shapes of zeros, outer scale and order."""
        n_in, n_out = weight.scaling.blocks(weight.shape)
        packing = weight.scheme.packing
        if packing != "plain":  # zeros are packed along the outputs
            n_out = -(-n_out // (32 // weight.bits))
        grid = _file_grid((n_in, n_out), packing)
        expected = {"zeros": grid, "outer": (1,), "order": (weight.shape[0],)}
        for role, shape in expected.items():
            name = weight.names.get(role)
            if name is None:
                continue
            found = self.file.shapes()[name]
            if found != shape and found not in _spellings(shape):
                raise NaloraError(
                    f"{self.where}: {name}", expected=f"the shape {shape}", found=found
                )
        formats = {"outer": ("F32",), "order": ("I32", "I64"), "zeros": ("I32",)}
        if packing == "plain":
            formats["zeros"] = ("I8",)
        for role, known in formats.items():
            if role in weight.names:
                self._check_format(weight.names[role], known)

    def _without_plain_order(self, weight: _Weight) -> _Weight:
        """Returns the weight without an order that is the order of blocks."""
        if "order" not in weight.names:
            return weight
        order = self._order(weight)
        names = {role: name for role, name in weight.names.items() if role != "order"}
        plain = replace(weight, names=names)
        if (order == -1).all() or np.array_equal(order, self._order(plain)):
            return plain
        blocks = weight.scaling.blocks(weight.shape)[0]
        if order.min() < 0 or order.max() >= blocks:
            raise NaloraError(
                f"{self.where}: {weight.names['order']}",
                expected=f"numbers of {blocks} groups",
                found=f"{order.min()} to {order.max()}",
            )
        return weight

    def _check_format(self, name: str, known: Sequence[str]) -> None:
        if self._format(name) not in known:
            raise NaloraError(
                f"{self.where}: {name}",
                expected=f"{' or '.join(known)}, as quantization_config states",
                found=self._format(name),
            )

    def _mixed(self, name: str, module: str) -> NaloraError:
        """Returns the error for a tensor that the module's scheme does not have."""
        scheme = self._scheme(module)
        expected = "a weight in floats, as quantization_config states of this module"
        if scheme is not None:
            expected = f"{scheme.label}, as quantization_config states"
        return NaloraError(
            f"{self.where}: {name}",
            expected=expected,
            found=f"a tensor in {self._format(name)}",
            remedy="correct quantization_config, or download the folder again",
        )


def stored_bits(
    quantization: Quantization, config: ModelConfig
) -> tuple[tuple[str, float], ...]:
    """Returns `ModelConfig.stored_bits`: of stacks of kernels that are quantized in all layers."""
    bits: dict[str, float] = {}
    floats = set()
    for tensor in keymap_for(config).tensors:
        scheme = quantization.scheme(tensor.name.removesuffix(".weight"))
        for slot in tensor.slots:
            if scheme is None or not re.search(kernels("int8"), slot.path):
                floats.add(slot.path)
            else:
                bits[slot.path] = max(scheme.bits, bits.get(slot.path, 0.0))
    return tuple((path, bits[path]) for path in bits if path not in floats)


def _file_grid(blocks: ScaleBlock, packing: str) -> ScaleBlock:
    """Returns the shape of an array with one number per block in the file."""
    if packing in ("gptq", "awq"):
        return blocks
    return blocks[::-1]


def _spellings(grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes in which files store a grid: axes of length 1 may be missing."""
    if all(size == 1 for size in grid):
        return (grid, (1,), ())
    if grid[-1] == 1:
        return (grid, grid[:1])
    return (grid,)


def _pieces(
    rows: slice, columns: slice, *, by_rows: bool
) -> Iterator[tuple[slice, slice]]:
    """Yields parts of a slice of about `_PIECE` elements, cut along the file's first axis."""
    if by_rows:
        width = max(1, columns.stop - columns.start)
        step = max(PACKED_INPUTS, _PIECE // width // PACKED_INPUTS * PACKED_INPUTS)
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop)), columns
        return
    step = max(1, _PIECE // max(1, rows.stop - rows.start))
    for start in range(columns.start, columns.stop, step):
        yield rows, slice(start, min(start + step, columns.stop))
