"""Folders of a tiny Llama with quantized weights, and their floats by compressed-tensors, transformers
or a published formula."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from tests.weights.folders import tokenizer_files

Tensors = dict[str, torch.Tensor]
# Of one weight [out, in]: the tensors of its module, and the floats by the reference.
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

# Blocks of 64 x 36 do not divide any of its weights; groups of 32 do.
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def write_quantized(
    folder: Path, settings: dict[str, Any], quantize: Quantize, sizes: dict[str, Any] = SIZES
) -> Tensors:
    """Writes the folder with its projections quantized; returns all weights as floats."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    tensors: Tensors = {}
    for name, weight in model.state_dict().items():
        weight = torch.randn(weight.shape) * 0.2 + float("norm" in name)
        tensors[name] = weight.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = model.config.to_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_files(folder)
    return quantize_folder(folder, settings, quantize)


def quantize_folder(folder: Path, settings: dict[str, Any], quantize: Quantize) -> Tensors:
    """Quantizes the projections of a folder in place; returns all weights as floats."""
    stored: Tensors = {}
    floats: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = floats[name] = weight
            continue
        tensors, floats[name] = quantize(weight)
        module = name.removesuffix("weight")
        stored |= {module + part: tensor.contiguous() for part, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
    return floats


# ---------------------------------------------------------------- fp8


def fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[Tensors, torch.Tensor]:
    """Fine-grained fp8; block is [out, in], None for one scale a tensor."""
    rows, columns = weight.shape
    height, width = block or weight.shape
    scales = torch.rand(-(-rows // height), -(-columns // width)) * 0.01 + 1e-4
    wide = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    codes = (weight.float() / wide).to(torch.float8_e4m3fn)
    if block is None:
        scales = scales.reshape(())
    tensors = {"weight": codes, "weight_scale_inv": scales}
    size = list(block) if block else None
    return tensors, _dequantize_fp8_weight(codes, scales, size, torch.float32)


def fp8_of_powers(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Fine-grained fp8 with scales that are bytes of exponents (ue8m0), in blocks of 16 x 32."""
    scales = torch.randint(116, 122, (weight.shape[0] // 16, weight.shape[1] // 32))
    scales = scales.to(torch.uint8)
    codes = (weight.float() * 100).to(torch.float8_e4m3fn)
    floats = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    return {"weight": codes, "weight_scale_inv": scales}, floats


def fp8_of_bf16(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Fine-grained fp8 with scales in bf16, as Qwen3 is released, in blocks of 16 x 32."""
    tensors, _ = fp8(weight, (16, 32))
    scales = tensors["weight_scale_inv"].bfloat16()
    floats = Fp8Dequantize(None)._dequantize_one(tensors["weight"], scales, torch.float32)
    return tensors | {"weight_scale_inv": scales}, floats


def fp8_of_rows(
    weight: torch.Tensor, name: str = "weight_scale", *, by_channel: bool = True
) -> tuple[Tensors, torch.Tensor]:
    """As torch quantizes: fp8 with a scale for each output, ``[out, 1]``, or for the tensor."""
    largest = weight.float().abs().amax(1 if by_channel else (0, 1), keepdim=True)
    scales = largest / torch.finfo(torch.float8_e4m3fn).max
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    floats = codes.float() * scales
    if not by_channel:
        scales = scales.reshape(())
    return {"weight": codes, name: scales, "input_scale": torch.tensor(1.0)}, floats


# ---------------------------------------------------------------- compressed-tensors


def compressed(
    weight: torch.Tensor, format_: str, args: QuantizationArgs, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """As compressed-tensors compresses and decompresses; the scales have ``dtype``."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = weight.to(dtype)
    state = {"weight": weight}
    outer = None
    rows, columns = weight.shape
    if args.strategy == "tensor_group":
        outer = generate_gparam(weight.min(), weight.max())
        state["weight_global_scale"] = outer
    if args.strategy in ("group", "tensor_group"):
        parts = weight.reshape(rows, -1, args.group_size)
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        parts = padded.reshape(padded.shape[0] // height, height, -1, width)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.min(), weight.max()
    scale, zero = calculate_qparams(low, high, args, outer)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.load_from_registry(format_)
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(tensors, scheme)["weight"]


def compressed_settings(format_: str, args: QuantizationArgs) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def modelopt(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """NVFP4 in ModelOpt's names; its second scale multiplies the first."""
    scale = torch.tensor(3.7e-4)
    args = QuantizationArgs(**NVFP4)
    tensors, _ = compressed(weight, "nvfp4-pack-quantized", args)
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = levels[torch.stack([codes & 15, codes >> 4], -1).long()].reshape(weight.shape)
    wide = (scales.float() * scale).repeat_interleave(16, 1)
    tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}
    return tensors | {"input_scale": torch.tensor(1.0)}, values * wide


def quark(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """MXFP4 in Quark's names."""
    tensors, floats = compressed(weight, "mxfp4-pack-quantized", QuantizationArgs(**MXFP4))
    tensors["weight"] = tensors.pop("weight_packed")
    return tensors, floats


MXFP4: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
NVFP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
    "zp_dtype": torch.float8_e4m3fn,
}

# ---------------------------------------------------------------- GPTQ, AWQ


def packed(values: torch.Tensor, bits: int, dim: int, order: Sequence[int] = ()) -> torch.Tensor:
    """Packs numbers along a dimension into int32, the k-th of a word from column ``order[k]``."""
    values = values.transpose(0, dim)
    per_word = 32 // bits
    words = values.reshape(-1, per_word, values.shape[-1]).to(torch.int64)
    word = torch.zeros(len(words), values.shape[-1], dtype=torch.int64)
    for k in range(per_word):
        word |= words[:, order[k] if order else k] << (bits * k)
    word = torch.where(word >= 2**31, word - 2**32, word)
    return word.to(torch.int32).transpose(0, dim)


def gptq(
    weight: torch.Tensor, bits: int, group: int, *, ordered: bool, version: int
) -> tuple[Tensors, torch.Tensor]:
    """Random codes in GPTQ's layout, and AutoGPTQ's formula for their floats."""
    d_out, d_in = weight.shape
    group = d_in if group == -1 else group
    groups = -(-d_in // group)
    codes = torch.randint(0, 2**bits, (d_in, d_out))
    # 0 is 15, or 255, in the first version's files
    zeros = torch.randint(0, 2**bits, (groups, d_out))
    scales = (torch.rand(groups, d_out) * 0.01).to(torch.float16)
    scales[0] = 3e-7  # products below the normal numbers of float16
    g_idx = torch.arange(d_in) // group
    if ordered:
        g_idx = g_idx[torch.randperm(d_in)]
    below = 1 if version == 1 else 0
    tensors = {
        "qweight": packed(codes, bits, 0),
        "qzeros": packed((zeros - below) & (2**bits - 1), bits, 1),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    floats = scales[g_idx] * (codes - zeros[g_idx]).to(torch.float16)
    return tensors, floats.T


def awq(weight: torch.Tensor, group: int) -> tuple[Tensors, torch.Tensor]:
    """Random codes in AWQ's order of a "gemm" file, and AutoAWQ's formula for their floats."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    d_out, d_in = weight.shape
    codes = torch.randint(0, 16, (d_in, d_out))
    zeros = torch.randint(0, 16, (d_in // group, d_out))
    scales = (torch.rand(d_in // group, d_out) * 0.01).to(torch.float16)
    tensors = {
        "qweight": packed(codes, 4, 1, order),
        "qzeros": packed(zeros, 4, 1, order),
        "scales": scales,
    }
    wide = zeros.repeat_interleave(group, 0)
    floats = (codes - wide).to(torch.float16) * scales.repeat_interleave(group, 0)
    return tensors, floats.T


# ---------------------------------------------------------------- all formats


def _compressed_case(
    format_: str, dtype: torch.dtype = torch.bfloat16, **fields: Any
) -> tuple[dict[str, Any], Quantize]:
    args = QuantizationArgs(**fields)
    quantize = partial(compressed, format_=format_, args=args, dtype=dtype)
    return compressed_settings(format_, args), quantize


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
BLOCKS = FP8 | {"weight_block_size": [64, 36]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float"}
QUARK = {
    "quant_method": "quark",
    "exclude": ["lm_head"],
    "global_quant_config": {
        "weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0", "qscheme": "per_group"}
    },
}
QUARK_FP8 = QUARK | {
    "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}}
}
F16, F32 = torch.float16, torch.float32
# By name: the quantization_config, and the function that quantizes a weight.
FORMATS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "fp8 in blocks": (BLOCKS, partial(fp8, block=(64, 36))),
    "fp8 per tensor": (FP8 | {"weight_block_size": None}, partial(fp8, block=None)),
    "fp8 with powers of two": (FP8 | {"weight_block_size": [16, 32]}, fp8_of_powers),
    "fp8 with scales in bf16": (FP8 | {"weight_block_size": [16, 32]}, fp8_of_bf16),
    "fp8 of FBGEMM": (
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
        fp8_of_rows,
    ),
    "fp8 of ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        partial(fp8_of_rows, by_channel=False),
    ),
    "fp8 of Quark": (QUARK_FP8, fp8_of_rows),
    "compressed fp8 per tensor": _compressed_case("float-quantized", **FLOAT8, strategy="tensor"),
    "compressed fp8 per channel": _compressed_case(
        "float-quantized", F16, **FLOAT8, strategy="channel"
    ),
    "compressed fp8 in blocks": _compressed_case(
        "float-quantized", F32, **FLOAT8, strategy="block", block_structure=[64, 36]
    ),
    "compressed int8": _compressed_case("int-quantized", **INT8),
    "compressed int8 with zeros": _compressed_case("int-quantized", **INT8, symmetric=False),
    "compressed int4": _compressed_case("pack-quantized", **INT4),
    "compressed int4 with zeros": _compressed_case("pack-quantized", **INT4, symmetric=False),
    "compressed int4 per channel": _compressed_case(
        "pack-quantized", F16, **INT4 | {"strategy": "channel", "group_size": None}
    ),
    "compressed int8 packed": _compressed_case("pack-quantized", F16, **INT4 | {"num_bits": 8}),
    "compressed int8 packed with zeros": _compressed_case(
        "pack-quantized", **INT8, symmetric=False
    ),
    "MXFP4": _compressed_case("mxfp4-pack-quantized", **MXFP4),
    "MXFP4 of Quark": (QUARK, quark),
    "NVFP4": _compressed_case("nvfp4-pack-quantized", **NVFP4),
    "NVFP4 of ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        modelopt,
    ),
    "GPTQ": (GPTQ, partial(gptq, bits=4, group=32, ordered=False, version=1)),
    "GPTQ, ordered, version 2": (
        GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"},
        partial(gptq, bits=4, group=32, ordered=True, version=2),
    ),
    "GPTQ in 8 bits per channel": (
        GPTQ | {"bits": 8, "group_size": -1},
        partial(gptq, bits=8, group=-1, ordered=False, version=1),
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        partial(awq, group=32),
    ),
}
