"""The ``quantization_config`` of a config.json: which modules are quantized, and how the tensors of
each store its weight.

Schemes are those of fine-grained fp8, compressed-tensors, NVIDIA ModelOpt, AMD Quark, GPTQ and AWQ;
`nalora_jax.weights.quantized` reads the tensors.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nalora_jax.common.fields import Fields
from nalora_jax.data.tokenizer import read_json
from nalora_jax.models.family import QUANTIZED, UNQUANTIZED
from nalora_jax.ops.scaled import Element

UNQUANTIZED_DTYPES = ("F32", "F16", "BF16")
ScaleBlock = tuple[int, int]  # inputs and outputs that share a scale; 0 for all
_TENSOR: ScaleBlock = (0, 0)
_CHANNEL: ScaleBlock = (0, 1)


@dataclass(frozen=True)
class Scheme:
    """How the tensors of a module store its weight; tensors by their names within the module."""

    label: str  # for logs and cards
    codes: str
    formats: tuple[str, ...]  # of the codes in the file
    blocks: tuple[ScaleBlock, ...]  # alternatives
    scale_formats: tuple[str, ...] = UNQUANTIZED_DTYPES
    scales: tuple[str, ...] = ("weight_scale",)  # alternatives
    zeros: str = ""
    outer: str = ""
    order: str = ""  # optional
    shape: str = ""  # optional
    # Order of the codes: as they are, packed along the inputs of [out, in], or as GPTQ and AWQ do.
    packing: Literal["plain", "inputs", "gptq", "awq"] = "plain"
    element: Element | None = None  # by default that of the codes' format
    # Dtype to which the reference implementation rounds a product: float32, that of the scales, or
    # bfloat16.
    rounds: Literal["", "scale", "bfloat16"] = ""
    divides: bool = False  # by the outer scale
    zeros_below: int = 0  # the file's zeros are too small by this number

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors."""
        optional = (self.zeros, self.outer, self.order, self.shape)
        return (self.codes, *self.scales, *filter(None, optional))

    @property
    def bits(self) -> float:
        """Bits of a weight, those of its group's scale and zero included."""
        bits = 8
        if self.element in ("int4", "e2m1"):
            bits = 4
        inputs, outputs = self.blocks[-1]
        if not inputs or not outputs:
            return float(bits)
        of_block = 16
        if not set(self.scale_formats) & set(UNQUANTIZED_DTYPES):
            of_block = 8
        if self.zeros:
            of_block += 8
        return bits + of_block / (inputs * outputs)


@dataclass(frozen=True)
class Quantization:
    """The content of a ``quantization_config``."""

    where: str
    # Targets, and their scheme. "Linear" is every module.
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...]  # modules in floats

    def scheme(self, module: str) -> Scheme | None:
        """Returns the scheme of a module; None if it is stored in floats."""
        if is_listed(module, self.ignored):
            return None
        every = None
        for targets, scheme in self.groups:
            if is_listed(module, targets):
                return scheme
            if "Linear" in targets and every is None:
                every = scheme
        return every

    def describe(self) -> str:
        """Returns the schemes' labels."""
        return " and ".join(dict.fromkeys(scheme.label for _, scheme in self.groups))


def is_listed(module: str, patterns: Iterable[str]) -> bool:
    """Returns True if a pattern names the module or a module that contains it.

    Patterns are names or their last parts, "re:" with an expression, or have stars.
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            found = re.match(pattern.removeprefix("re:"), module) is not None
        elif "*" in pattern:
            found = fnmatch.fnmatchcase(module, pattern)
        else:
            found = f".{pattern}." in f".{module}."
        if found:
            return True
    return False


# ---------------------------------------------------------------- the description


def quantization_of(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """Returns the quantization that a ``config.json`` describes.

    None if weights are floats, or as gpt-oss is released (`nalora_jax.weights.model_files`).

    Raises:
      NaloraError: an unknown method, or a setting of it that is not supported.
    """
    settings = raw.get("quantization_config")
    if not settings and isinstance(raw.get("text_config"), Mapping):
        settings = raw["text_config"].get("quantization_config")
    if not settings:
        return None
    f = Fields({"quantization_config": settings}, {}, where)
    f = Fields(f.mapping("quantization_config"), {}, f"{where}: quantization_config")
    method = f.get("quant_method")
    if method == "mxfp4":
        return None
    if method not in QUANTIZED:
        expected = f"one of {', '.join(QUANTIZED)}"
        raise f.error("quant_method", expected, repr(method), UNQUANTIZED)
    groups = _METHODS[method](f)
    ignored: list[str] = []
    for name in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude"):
        ignored += _names(f, name)
    for pattern in f.mapping("dynamic"):  # GPTQ's settings of single modules
        if not pattern.startswith("-:"):
            raise f.error("dynamic", "modules that are not quantized", repr(pattern))
        ignored.append(f"re:{pattern.removeprefix('-:')}")
    for targets, _ in (*groups, (ignored, None)):
        for pattern in targets:
            try:
                is_listed("", [pattern])
            except re.error as error:
                expected = "a regular expression"
                raise f.error(pattern, expected, str(error)) from error
    return Quantization(f.where, groups, tuple(ignored))


def with_modelopt(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a ``config.json`` with the settings that ModelOpt's earlier versions wrote to another
    file of the folder, ``hf_quant_config.json``."""
    if raw.get("quantization_config"):
        return raw
    path = folder / "hf_quant_config.json"
    f = Fields(read_json(path, missing={}), {}, str(path))
    settings = f.mapping("quantization")
    if not settings:
        return raw
    settings |= {"quant_method": "modelopt", "ignore": settings.get("exclude_modules")}
    return raw | {"quantization_config": settings}


QuantizedGroups = tuple[tuple[tuple[str, ...], Scheme], ...]


def _names(f: Fields, name: str) -> list[str]:
    """Returns a list of texts, empty if the field is missing or null."""
    listed = f.raw.get(name) or []
    if not isinstance(listed, list) or not all(type(item) is str for item in listed):
        raise f.error(name, "a list of names", repr(listed)[:60])
    return listed


def _one_of(f: Fields, name: str, known: Iterable[Any], default: Any = None) -> Any:
    """Returns the value of a field that has to be one of ``known``."""
    value = f.raw.get(name)
    if value is None:
        value = default
    if value not in known:
        expected = " or ".join(str(item) for item in known)
        raise f.error(name, expected, repr(value), UNQUANTIZED)
    return value


def _size(f: Fields, name: str, value: Any) -> int:
    """Returns the number of weights in a group; 0 for all inputs, which files write as -1."""
    if value in (None, -1):
        return 0
    if type(value) is not int or value < 1:
        raise f.error(name, "a positive number, or -1", repr(value))
    return value


def _sizes(f: Fields, name: str, value: Any) -> ScaleBlock:
    """Returns a block of a list ``[outputs, inputs]``."""
    if not isinstance(value, list) or len(value) != 2:
        raise f.error(name, "two numbers", repr(value)[:60])
    return (_size(f, name, value[1]), _size(f, name, value[0]))


def _fp8(f: Fields) -> QuantizedGroups:
    """Reads fine-grained fp8 of DeepSeek and Qwen3, and fp8 per tensor or channel."""
    _one_of(f, "expert_dtype", ("fp8",), "fp8")
    label = "fp8"
    blocks = [_TENSOR, _CHANNEL]
    if f.raw.get("weight_block_size") is not None:
        block = _sizes(f, "weight_block_size", f.raw["weight_block_size"])
        label = f"fp8 in blocks of {block[1]} x {block[0]}"
        blocks.append(block)
    scheme = Scheme(
        label,
        "weight",
        ("F8_E4M3", "F8_E5M2"),
        tuple(blocks),
        (*UNQUANTIZED_DTYPES, "U8", "F8_E8M0"),
        scales=("weight_scale_inv", "weight_scale"),
    )
    return ((("Linear",), scheme),)


def _compressed_tensors(f: Fields) -> QuantizedGroups:
    """Reads the groups of compressed-tensors."""
    f.refuse("transform_config", UNQUANTIZED)
    sparsity = Fields(f.mapping("sparsity_config"), {}, f"{f.where}: sparsity_config")
    if sparsity.raw:
        _one_of(sparsity, "format", ("dense",), "dense")
    groups = []
    every = Fields(f.mapping("config_groups"), {}, f"{f.where}: config_groups")
    for name in every.raw:
        where = f"{every.where}: {name}"
        of_group = Fields(every.mapping(name), {}, where)
        weights = Fields(of_group.mapping("weights"), {}, f"{where}: weights")
        if not weights.raw:
            continue
        stored = of_group.raw.get("format") or f.raw.get("format")
        format_ = Fields({"format": stored}, {}, where)
        known = (*_PLAIN, "pack-quantized", *_FP4)
        _one_of(format_, "format", known)
        groups.append(
            (tuple(_names(of_group, "targets")), _group(weights, str(stored)))
        )
    if not groups:
        raise f.error("config_groups", "a group with quantized weights", "none")
    return tuple(groups)


_PLAIN = ("float-quantized", "int-quantized", "naive-quantized")
_FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def _group(f: Fields, format_: str) -> Scheme:
    """Returns the scheme of a group's weights in a format of compressed-tensors."""
    if format_ == "nvfp4-pack-quantized":
        return replace(
            _NVFP4,
            codes="weight_packed",
            outer="weight_global_scale",
            divides=True,
            rounds="bfloat16",
        )
    if format_ == "mxfp4-pack-quantized":
        return replace(_MXFP4, codes="weight_packed")
    strategies = ("tensor", "channel", "group", "block")
    strategy = _one_of(f, "strategy", strategies)
    kind = _one_of(f, "type", ("int", "float"))
    size = _size(f, "group_size", f.raw.get("group_size"))
    blocks = {"tensor": _TENSOR, "channel": _CHANNEL, "group": (size, 1)}
    parts = f"one scale per {strategy}"
    if strategy == "group":
        parts = f"groups of {size}"
    if strategy == "block":
        blocks["block"] = _sizes(f, "block_structure", f.raw.get("block_structure"))
        parts = f"blocks of {blocks['block'][1]} x {blocks['block'][0]}"
    bits = _one_of(f, "num_bits", (8,) if format_ in _PLAIN else (4, 8))
    zeros = ""
    if f.raw.get("symmetric") is False:
        zeros = "weight_zero_point"
    scheme = Scheme(
        f"compressed-tensors {kind}{bits}, {parts}",
        "weight",
        ("I8",) if kind == "int" else ("F8_E4M3",),
        (blocks[strategy],),
        zeros=zeros,
        order="weight_g_idx",
        rounds="scale",
    )
    if format_ in _PLAIN:
        return scheme
    _one_of(f, "type", ("int",))
    element: Element = "int4"
    if bits == 8:
        element = "uint8"
    return replace(
        scheme,
        codes="weight_packed",
        formats=("I32",),
        shape="weight_shape",
        packing="inputs",
        element=element,
    )


_NVFP4 = Scheme(
    "NVFP4",
    "weight",
    ("U8",),
    ((16, 1),),
    ("F8_E4M3",),
    outer="weight_scale_2",
    packing="inputs",
    element="e2m1",
)
_MXFP4 = Scheme(
    "MXFP4",
    "weight",
    ("U8",),
    ((32, 1),),
    ("U8", "F8_E8M0"),
    packing="inputs",
    element="e2m1",
)


def _modelopt(f: Fields) -> QuantizedGroups:
    """Reads NVIDIA ModelOpt's formats."""
    if _one_of(f, "quant_algo", ("NVFP4", "FP8")) == "NVFP4":
        return ((("Linear",), _NVFP4),)
    scheme = Scheme("fp8", "weight", ("F8_E4M3",), (_TENSOR, _CHANNEL))
    return ((("Linear",), scheme),)


def _gptq(f: Fields) -> QuantizedGroups:
    """Reads GPTQ. Its first version stores zeros minus 1, the second as they are."""
    bits = _one_of(f, "bits", (4, 8))
    version = _one_of(f, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    size = _size(f, "group_size", f.raw.get("group_size"))
    targets = ["Linear"]
    listed = f.raw.get("modules_in_block_to_quantize")
    if listed and isinstance(listed, list):
        targets = []
        for names in listed:
            targets += _names(Fields({"modules": names}, {}, f.where), "modules")
    element: Element = "int4"
    if bits == 8:
        element = "uint8"
    scheme = Scheme(
        f"GPTQ int{bits}, {f'groups of {size}' if size else 'one scale per channel'}",
        "qweight",
        ("I32",),
        ((size, 1),),
        scales=("scales",),
        zeros="qzeros",
        order="g_idx",
        packing="gptq",
        element=element,
        rounds="scale",
        zeros_below=int(version == "gptq"),
    )
    return ((tuple(targets), scheme),)


def _awq(f: Fields) -> QuantizedGroups:
    """Reads AWQ."""
    _one_of(f, "bits", (4,), 4)
    _one_of(f, "version", ("gemm", "GEMM"), "gemm")
    _one_of(f, "zero_point", (True,), True)
    size = _size(f, "group_size", f.raw.get("group_size", 128))
    scheme = Scheme(
        f"AWQ int4, {f'groups of {size}' if size else 'one scale per channel'}",
        "qweight",
        ("I32",),
        ((size, 1),),
        scales=("scales",),
        zeros="qzeros",
        packing="awq",
        element="int4",
        rounds="scale",
    )
    return ((("Linear",), scheme),)


def _quark(f: Fields) -> QuantizedGroups:
    """Reads AMD Quark's MXFP4, and fp8 per tensor or channel."""
    f.refuse("layer_quant_config", UNQUANTIZED)
    f.refuse("layer_type_quant_config", UNQUANTIZED)
    every = Fields(
        f.mapping("global_quant_config"), {}, f"{f.where}: global_quant_config"
    )
    weight = Fields(every.mapping("weight"), {}, f"{every.where}: weight")
    if _one_of(weight, "dtype", ("fp4", "fp8_e4m3")) == "fp4":
        _one_of(weight, "group_size", (32,))
        _one_of(weight, "scale_format", ("e8m0",))
        return ((("Linear",), _MXFP4),)
    _one_of(weight, "qscheme", ("per_tensor", "per_channel"))
    scheme = Scheme("fp8", "weight", ("F8_E4M3",), (_TENSOR, _CHANNEL))
    return ((("Linear",), scheme),)


_METHODS: dict[Any, Callable[[Fields], QuantizedGroups]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "quark": _quark,
}
