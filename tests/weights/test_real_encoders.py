"""The encoder that a package mirrors, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.weights import hub
from nalora_jax.weights.dual import load_encoder

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
    ours = Encoder(loaded.config).apply(
        {"params": loaded.params}, batch["tokens"], mask=batch["token_weights"] > 0
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
