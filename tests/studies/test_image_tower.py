"""The image tower of the studies, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from nalora_jax.common import downloads, imports
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.weights.dual import load_encoder
from nalora_jax.weights.hub import ENCODERS

HELPER = Path(__file__).parents[2] / "studies" / "image_tower.py"
pytestmark = pytest.mark.network


def test_vit_s_gives_the_features_of_onnxruntime(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.setattr(ENCODERS, "_values", dict(ENCODERS._values))
    imports.import_file(str(HELPER))
    loaded = load_encoder("vit-s-focus", dtype="float32")
    file = ENCODERS.get("vit-s-focus").__globals__["FILE"]
    model = onnx.load(downloads.fetch_file(file))
    # The rest of that model reads the norm after the last layer.
    output = "/backbone/layernorm/Add_1_output_0"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "cut.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    (theirs,) = session.run([output], {"input_image": pixels.transpose(0, 3, 1, 2)})
    ours = Encoder(loaded.config).apply({"params": loaded.params}, pixels, pooled=False)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())
    assert np.abs(theirs).max() > 1.0
    assert loaded.processor.shortest == 224
