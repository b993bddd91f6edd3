"""Memory of loading a large model, watched from outside of the process.

    python benchmarks/loading.py --gigabytes 30 --quantize nf4
    python benchmarks/loading.py --gigabytes 8 --stored fp8

Writes a Hugging Face folder of a Llama, in bfloat16 or with its kernels in a quantized format that
memory keeps (``--stored``). The weights are zeros in sparse files, which take no disk. A separate
process loads the folder while this one reads its anonymous memory every 20 ms. Prints the peak
above the start of the load, the bytes of the loaded arrays and those of the largest tensor in the
file: the peak should stay near the loaded arrays plus one tensor.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ENVIRONMENT, parser_of, save
from machines import proc_fields

_SHARD_BYTES = 5_000_000_000
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# Of ``--stored``: the quantization_config, and the tensors of a kernel [out, in] by name.
_BLOCK = 128
_FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [_BLOCK, _BLOCK],
    "modules_to_not_convert": ["lm_head"],
}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": _BLOCK,
                "symmetric": True,
            },
        }
    },
}
_SETTINGS = {"bf16": None, "fp8": _FP8, "int4": _INT4}
_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
Tensor = tuple[str, tuple[int, ...]]  # number format and shape
_CHILD = """
import sys, time
import jax
from nalora_jax.weights.base import load_model

jax.block_until_ready(jax.numpy.zeros(8))
print("ready", flush=True)
start = time.perf_counter()
quantized = sys.argv[2] if sys.argv[2] != "none" else None
loaded = load_model(sys.argv[1], dtype="bfloat16", quantized=quantized)
leaves = jax.block_until_ready(jax.tree.leaves(loaded.params))
print(sum(leaf.nbytes for leaf in leaves), time.perf_counter() - start, flush=True)
"""


def main() -> None:
    """Writes the folder, loads it and prints the figures."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=30, help="of the folder's weights"
    )
    parser.add_argument("--quantize", default="nf4", help="nf4, int8, mxfp4 or none")
    parser.add_argument(
        "--stored",
        default="bf16",
        choices=_SETTINGS,
        help="format of the files' kernels; without bf16 memory keeps it, and --quantize is none",
    )
    options = parser.parse_args()
    if options.stored != "bf16":
        options.quantize = "none"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest, stored = write_folder(folder, options.gigabytes * 1e9, options.stored)
        measured = watch(folder, options.quantize)
    measured |= {"file_bytes": stored, "largest_tensor_bytes": largest}
    above = measured["peak_bytes"] - measured["loaded_bytes"]
    measured["peak_above_loaded_in_tensors"] = above / largest
    for key, value in measured.items():
        print(f"{key:30} {value:,.2f}")
    case = f"{options.gigabytes:g} GB, {options.quantize}"
    if options.stored != "bf16":
        case = f"{options.gigabytes:g} GB, {options.stored} as stored"
    save("loading", case, measured)


def write_folder(folder: Path, size: float, stored: str) -> tuple[int, int]:
    """Writes config, tokenizer and sparse weights of about ``size`` bytes.

    Returns the bytes of the largest tensor and of all.
    """
    of_layer = layer_tensors("model.layers.0.", stored)
    layer_bytes = sum(map(tensor_bytes, of_layer.values()))
    layers = max(1, round(size / layer_bytes))
    hidden = _CONFIG["hidden_size"]
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": ("BF16", (_CONFIG["vocab_size"], hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    for layer in range(layers):
        tensors |= layer_tensors(f"model.layers.{layer}.", stored)
    config = _CONFIG | {"num_hidden_layers": layers}
    if _SETTINGS[stored] is not None:
        config["quantization_config"] = _SETTINGS[stored]
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    write_weights(folder, tensors)
    sizes = [tensor_bytes(tensor) for tensor in tensors.values()]
    return max(sizes), sum(sizes)


def layer_tensors(prefix: str, stored: str) -> dict[str, Tensor]:
    """Returns a layer's tensors in transformers' files."""
    hidden = _CONFIG["hidden_size"]
    wide = _CONFIG["intermediate_size"]
    queries = _CONFIG["num_attention_heads"] * _CONFIG["head_dim"]
    keys = _CONFIG["num_key_value_heads"] * _CONFIG["head_dim"]
    kernels = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors: dict[str, Tensor] = {}
    for name, shape in kernels.items():
        for part, tensor in kernel_tensors(shape, stored).items():
            tensors[f"{prefix}{name}.{part}"] = tensor
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = ("BF16", (hidden,))
    return tensors


def kernel_tensors(shape: tuple[int, int], stored: str) -> dict[str, Tensor]:
    """Returns the tensors of a kernel ``[out, in]``, whose sizes are multiples of blocks."""
    d_out, d_in = shape
    if stored == "fp8":
        blocks = (d_out // _BLOCK, d_in // _BLOCK)
        return {"weight": ("F8_E4M3", shape), "weight_scale_inv": ("F32", blocks)}
    if stored == "int4":
        return {
            "weight_packed": ("I32", (d_out, d_in // 8)),
            "weight_scale": ("BF16", (d_out, d_in // _BLOCK)),
        }
    return {"weight": ("BF16", shape)}


def tensor_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor."""
    format_, shape = tensor
    return _BYTES[format_] * math.prod(shape)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of single bytes."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary["<end>"] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors of zeros as sparse shards with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if used and used + tensor_bytes(tensor) > _SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor_bytes(tensor)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_sparse(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file whose data are a hole."""
    header = {}
    end = 0
    for name, (format_, shape) in tensors.items():
        start = end
        end += tensor_bytes((format_, shape))
        header[name] = {"dtype": format_, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def watch(folder: Path, quantize: str) -> dict[str, float]:
    """Loads a folder in a process, and returns its peak above the start, and what it loaded."""
    command = [sys.executable, "-c", _CHILD, str(folder), quantize]
    environment = os.environ | ENVIRONMENT
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = anonymous_bytes(child.pid)
        peak = before
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.02)
        loaded, seconds = child.stdout.readline().split()
    return {
        "peak_bytes": peak - before,
        "loaded_bytes": float(loaded),
        "seconds": float(seconds),
    }


def anonymous_bytes(pid: int) -> int:
    """Returns the memory of a process that is no file's; 0 if it has ended."""
    field = proc_fields(f"/proc/{pid}/status").get("RssAnon", "0 kB")
    return 1024 * int(field.split()[0])


if __name__ == "__main__":
    main()
