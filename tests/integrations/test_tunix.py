"""A Tunix model as it stands: adapted by a keymap and rules, with both mechanisms on (needs ``google-tunix``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nalora_jax.config import LoRAConfig
from nalora_jax.integrations import adapt_nnx
from nalora_jax.method.optimizer import nalora
from nalora_jax.method.state import channel_factors, init_gate_state, own_factors, update_gate_state
from nalora_jax.train.mechanisms import make_mechanisms

# Tunix 0.1.7 calls what newer Flax and JAX deprecate.
pytestmark = [
    pytest.mark.tunix,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("their_broadcasting"),
]

KEYMAP = [(r"layers/(\d+)/mlp/(\w+)", r"layers/\1/ffn/\2")]
LAYERS, F, VOCAB = 2, 64, 50
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (4, 16)).astype(np.int32)
RULES = ("hard:keep=0.25,warmup=1", "homogeneity:warmup=1")


@pytest.fixture
def their_broadcasting() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def llama() -> tuple[Any, str]:
    from tunix.models.llama3 import model

    config = model.ModelConfig(LAYERS, VOCAB, 32, F, 4, 8, 2, 10_000, 1e-5, weight_tying=True)
    return _with_weights(model.Llama3(config, rngs=nnx.Rngs(0))), "silu"


def gemma() -> tuple[Any, str]:
    from tunix.models.gemma import model

    large = model.ModelConfig.gemma_2b()
    sizes = {"num_embed": VOCAB, "embed_dim": 32, "hidden_dim": F, "num_heads": 4, "head_dim": 8}
    config = replace(large, num_layers=LAYERS, attention_types=large.attention_types[:LAYERS], **sizes)
    return _with_weights(model.Gemma(config, rngs=nnx.Rngs(0))), "gelu_new"


def _with_weights(model: Any) -> Any:
    """Tunix starts FFN kernels at zero, to be loaded over."""
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear):
            kernel = module.kernel[...]
            module.kernel[...] = jax.random.normal(jax.random.key(i), kernel.shape) / np.sqrt(
                kernel.shape[0]
            )
    return model


def loss(call: Any) -> jax.Array:
    batch, length = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    logits, _ = call(TOKENS, positions, None, causal)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@pytest.mark.parametrize("family", [llama, gemma])
def test_a_tunix_model_trains_with_both_mechanisms(family: Any) -> None:
    model, activation = family()
    graph, params = nnx.split(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    adapted = adapt_nnx(graph, params, keymap=KEYMAP, lora=LoRAConfig(), activation=activation)
    assert sorted(adapted.gates) == [f"layers/{i}/ffn/gate_proj" for i in range(LAYERS)]
    lora, mechanisms = adapted.init(jax.random.key(1)), make_mechanisms(RULES, activation=activation)
    np.testing.assert_allclose(
        loss(lambda *args: adapted.apply(params, lora, *args)), loss(model), rtol=1e-6
    )
    optimizer = nalora(optax.adamw(1e-2), adapted.gates, mechanisms)
    state, gates = optimizer.init(lora), init_gate_state(adapted.gate_shapes, mechanisms)

    @jax.jit
    def step(params: Any, lora: Any, state: Any, gates: Any) -> Any:
        factors = channel_factors(gates, mechanisms)
        masks = factors["gradient_a"]
        value, grads, stats = adapted.gradients(loss, params, lora, gate_mask=masks)
        updates, state = optimizer.update(grads, state, lora, gate_factors=factors)
        gates = update_gate_state(gates, stats, mechanisms)
        return optax.apply_updates(lora, updates), state, gates, value, masks

    losses = []
    for _ in range(20):
        previous = lora["layers"]["0"]["ffn"]["gate_proj"]["b"]
        lora, state, gates, value, masks = step(params, lora, state, gates)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    moved = np.abs(np.asarray(lora["layers"]["0"]["ffn"]["gate_proj"]["b"] - previous)).max(axis=0) > 0
    np.testing.assert_array_equal(moved, np.asarray(masks["layers/0/ffn"]) > 0)
    assert moved.sum() == F // 4
    assert float(jnp.std(own_factors(gates, mechanisms)["step_scale"]["layers/1/ffn"])) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.to_pure_dict(params)))
    served = nnx.merge(graph, adapted.merge(params, lora))
    np.testing.assert_allclose(
        loss(served), loss(lambda *args: adapted.apply(params, lora, *args)), rtol=1e-4
    )
