"""Weights from ONNX files that are not as they should be; real ones: test_real_weights.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.weights.vision.onnx import OnnxFile


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "encoder.weight")
    graph = onnx.helper.make_graph([], "graph", [], [], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    assert OnnxFile(path).shapes() == {"encoder.weight": (2, 2)}
    path.write_bytes(path.read_bytes().replace(b"encoder.weight", b"encoder.\xff\xfeight"))
    with pytest.raises(NaloraError, match=r"model\.onnx: expected a whole ONNX file"):
        OnnxFile(path).shapes()
