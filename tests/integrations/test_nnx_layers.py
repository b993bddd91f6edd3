"""The same functions from Flax NNX: a user's own NNX block is adapted, with both mechanisms intact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nalora_jax.dense import init_a
from nalora_jax.method import activations, statistics
from nalora_jax.method.low_rank import residual
from nalora_jax.method.optimizer import nalora
from nalora_jax.method.state import channel_factors, init_gate_state, update_gate_state
from nalora_jax.train.mechanisms import make_mechanisms

SILU, REGIONS = activations.get("silu"), activations.partition("silu")
MECHANISMS = make_mechanisms(("hard:keep=0.25,warmup=1", "homogeneity:warmup=1"), activation="silu")
D, F, R = 16, 40, 4


class SwiGLU(nnx.Module):
    """A user's block; adapters and the mask are handed in, so that nothing of it has to change its type."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, lora: dict, mask: jax.Array | None) -> tuple[jax.Array, dict]:
        z = self.gate(x) + residual(x, lora["a"], lora["b"], 2.0, mask)
        stats = statistics.channel_statistics(z, jnp.ones(z.shape[:-1], bool), SILU, REGIONS)
        return self.down(SILU.phi(z) * self.up(x)), stats


def test_an_nnx_block_trains_its_adapter_and_nothing_else() -> None:
    model = SwiGLU(nnx.Rngs(0))
    graph, weights = nnx.split(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(weights))
    x, y = jax.random.normal(jax.random.key(1), (2, 24, D))
    lora = {"block": {"gate": {"a": init_a(jax.random.key(2), (D, R)), "b": jnp.zeros((R, F))}}}
    optimizer = nalora(optax.adamw(1e-2), {"block/gate": "block"}, MECHANISMS)
    state, gates = optimizer.init(lora), init_gate_state({"block": (F,)}, MECHANISMS)

    @jax.jit
    def step(lora: Any, state: Any, gates: Any) -> Any:
        factors = channel_factors(gates, MECHANISMS)
        masks = factors["gradient_a"]

        def loss(lora: Any) -> tuple[jax.Array, Any]:
            out, stats = nnx.merge(graph, weights)(x, lora["block"]["gate"], masks["block"])
            return jnp.mean(jnp.square(out - y)), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(lora)
        updates, state = optimizer.update(grads, state, lora, gate_factors=factors)
        gates = update_gate_state(gates, {"block": stats}, MECHANISMS)
        return optax.apply_updates(lora, updates), state, gates, value, masks["block"]

    losses = []
    for i in range(12):
        previous = lora["block"]["gate"]["b"]
        lora, state, gates, value, mask = step(lora, state, gates)
        losses.append(float(value))
        moved = np.abs(np.asarray(lora["block"]["gate"]["b"] - previous)).max(axis=0) > 0
        if i == 0:
            assert moved.all()  # no mask during the warm-up
        else:
            np.testing.assert_array_equal(moved, np.asarray(mask) > 0)
            assert moved.sum() == F // 4
    assert losses[-1] < losses[0]
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(weights))
    jax.tree.map(np.testing.assert_array_equal, before, after)
