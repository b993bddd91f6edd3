"""The encoders that packages mirror, against onnxruntime and transformers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from nalora_jax import downloads
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.weights.vision import hub
from nalora_jax.weights.vision.model import load_encoder

pytestmark = pytest.mark.network


def test_minilm_gives_the_embeddings_of_transformers() -> None:
    loaded = load_encoder("all-minilm-l6-v2", dtype="float32")
    texts = ["A red heart.", "The capital of France is Paris", "smiling face with sunglasses"]
    folder, _ = hub.resolve_folder("all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(folder).eval()(**given).last_hidden_state
    weights = given["attention_mask"][..., None]
    theirs = ((hidden * weights).sum(1) / weights.sum(1)).numpy()
    batch = loaded.tokenizer(texts)
    ours = Encoder(loaded.config).apply({"params": loaded.params}, batch["tokens"], mask=batch["token_weights"] > 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_vit_s_gives_the_features_of_onnxruntime(tmp_path) -> None:
    loaded = load_encoder("vit-s-focus", dtype="float32")
    model = onnx.load(downloads.fetch(hub.ONNX["vit-s-focus"].file))
    # What the rest of that model reads is the norm behind the last layer.
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
