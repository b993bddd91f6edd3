"""A tiny transformers Llama, the same weights as a Decoder, and a tokenizer of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LAYERS = 2


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model(llama: LlamaForCausalLM) -> Decoder:
    return Decoder(ModelConfig.from_hf(llama.config.to_dict()))


@pytest.fixture(scope="session")
def variables(llama: LlamaForCausalLM) -> dict:
    state = {name: tensor.detach().numpy() for name, tensor in llama.state_dict().items()}

    def stacked(name: str) -> jnp.ndarray:
        leaves = np.stack([state[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)])
        return jnp.asarray(np.swapaxes(leaves, 1, -1))

    def kernels(block: str, names: str) -> dict:
        return {f"{name}_proj": {"kernel": stacked(f"{block}.{name}_proj")} for name in names.split()}

    layers = {
        "attn": kernels("self_attn", "q k v o"),
        "ffn": kernels("mlp", "gate up down"),
        "attn_norm": {"scale": stacked("input_layernorm")},
        "ffn_norm": {"scale": stacked("post_attention_layernorm")},
    }
    params = {
        "embed": {"embedding": jnp.asarray(state["model.embed_tokens.weight"])},
        "layers": layers,
        "final_norm": {"scale": jnp.asarray(state["model.norm.weight"])},
    }
    return {"params": params}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, bos_id=None, eos_id=256, pad_id=256, eos_ids=(256,))


@pytest.fixture(scope="session")
def torch_log_probs(llama: LlamaForCausalLM):
    """Log-probabilities ``[continuation]`` of a continuation's tokens, one forward pass over one unpadded text."""

    torch = pytest.importorskip("torch")

    def log_probs(context: list[int], continuation: list[int]) -> tuple[np.ndarray, bool]:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            table = llama(ids).logits[0].double().log_softmax(-1)[len(context) - 1 : -1]
        greedy = bool((table.argmax(-1) == ids[0, len(context) :]).all())
        return table.gather(-1, ids[0, len(context) :, None])[:, 0].numpy(), greedy

    return log_probs
