"""A tiny transformers Llama, the same weights as a Decoder, and a tokenizer of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from tests import tiny
from tests.param_trees import params_from_tensors

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model(llama: LlamaForCausalLM) -> Decoder:
    return Decoder(ModelConfig.from_hf(llama.config.to_dict()))


@pytest.fixture(scope="session")
def variables(llama: LlamaForCausalLM, model: Decoder) -> dict:
    params = params_from_tensors(
        model.config, lambda name: llama.get_parameter(name).detach().numpy()
    )
    return {"params": jax.tree.map(jnp.asarray, params)}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def torch_log_probs(llama: LlamaForCausalLM):
    """Log-probabilities ``[continuation]`` of a continuation's tokens, one forward pass over one
    unpadded text."""

    torch = pytest.importorskip("torch")

    def log_probs(context: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            table = llama(ids).logits[0].double().log_softmax(-1)[len(context) - 1 : -1]
        greedy = bool((table.argmax(-1) == ids[0, len(context) :]).all())
        return table.gather(-1, ids[0, len(context) :, None])[:, 0].numpy(), greedy

    return log_probs
