"""Reads the weights of an ONNX file under the names that they had before the export."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.downloads import file_sha256
from nalora_jax.errors import NaloraError
from nalora_jax.weights.origin import FINGERPRINT_PREFIX
from nalora_jax.weights.slices import Index
from nalora_jax.weights.tensors import FileTensor

_WEIGHT = ("MatMul", "Gemm")


class OnnxFile:
    """The initializers of an ONNX file, as a `nalora_jax.weights.tensors.TensorSource`.

    PyTorch's exporter keeps a tensor's name unless it folds a transposition or a constant into it.
    In that case the name is derived from the node that reads it: the weight of
    ``/encoder/layer.0/attention/query/MatMul`` is ``encoder.layer.0.attention.query.weight``,
    transposed.

    Args:
      path: the file.
      prefix: of the names to read ("backbone."); other tensors are left out, and so are constants
        that belong to no layer.

    Raises:
      NaloraError: the package onnx is missing, or the file is damaged or stores its weights in
        other files.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its name before the export."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_readable(self, name: str) -> None:
        """Raises an error if the tensor is not float32, float16 or bfloat16."""
        kind = self._tensors[name].dtype
        if kind.kind != "f" and kind.name != "bfloat16":
            raise NaloraError(f"{self.path}: {name}", expected="floating-point numbers", found=kind.name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor."""
        tensor = self._tensors[name]
        return (tensor if tensor.shape else tensor.reshape(1))[index]

    def stored(self, name: str) -> FileTensor:
        """Returns the complete file: a tensor's position depends on the ONNX encoding."""
        return FileTensor(self.path, 0, self.path.stat().st_size, self._tensors[name].dtype.name)

    def digest(self, config: Any) -> str:
        """Returns the model's fingerprint: a hash of the description and every byte of the file."""
        text = f"{config} {file_sha256(self.path)} {self.prefix}"
        return FINGERPRINT_PREFIX + hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        try:
            onnx = importlib.import_module("onnx")
            helper = importlib.import_module("onnx.numpy_helper")
        except ImportError as error:
            remedy = "pip install 'nalora_jax[vision]'"
            raise NaloraError(self.where, expected="the package onnx", found=error, remedy=remedy) from error
        try:
            graph = onnx.load(str(self.path), load_external_data=False).graph
            if any(tensor.external_data for tensor in graph.initializer):
                raise ValueError("its weights lie in other files")
            arrays = {tensor.name: helper.to_array(tensor) for tensor in graph.initializer}
            # Names that are not UTF-8 are bytes; startswith raises a TypeError for them.
            found = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
            found |= dict(filter(None, (_named(node, arrays) for node in graph.node)))
            found |= _positions(graph, arrays, self.prefix)
        except Exception as error:  # protobuf's errors, or the system's
            raise NaloraError(self.where, expected="a whole ONNX file", found=f"{error}"[:200]) from error
        wanted = {name: array for name, array in found.items() if name.startswith(self.prefix)}
        return {name.removeprefix(self.prefix): array for name, array in wanted.items()}


def _named(node: Any, arrays: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray] | None:
    """Returns the weight that a matmul reads, by its layer's name, in PyTorch's orientation."""
    if node.op_type not in _WEIGHT or len(node.input) < 2 or not node.input[1].startswith("onnx::"):
        return None
    array = arrays.get(node.input[1])
    if array is None or array.ndim != 2:
        return None
    transposed = node.op_type == "MatMul" or not any(a.name == "transB" and a.i for a in node.attribute)
    layer = node.output[0].rpartition(f"/{node.op_type}")[0].strip("/").replace("/", ".")
    return f"{layer}.weight", array.T if transposed else array


def _positions(graph: Any, arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Joins a ViT's position embeddings.

    An export that resizes them splits them into the class token's and the patches'.
    """
    width = max((a.shape[-1] for n, a in arrays.items() if n.endswith("cls_token")), default=0)
    parts: dict[str, np.ndarray] = {}
    for node in graph.node:
        for name in node.input:
            array = arrays.get(name) if name.startswith("onnx::") and "/embeddings/" in node.output[0] else None
            if array is not None and array.ndim == 3 and array.shape[::2] == (1, width):
                parts["first" if array.shape[1] == 1 else "rest"] = array
    if set(parts) != {"first", "rest"}:
        return {}
    whole = np.concatenate([parts["first"], parts["rest"]], axis=1)
    return {f"{prefix}embeddings.position_embeddings": whole}
