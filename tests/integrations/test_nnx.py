"""NNX models that know nothing of this library: adapted by a keymap and rules, with both mechanisms on."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nalora_jax import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.integrations import adapt_nnx
from nalora_jax.measurement import GateStatsConfig, Probe, gate_statistics
from nalora_jax.method import activations
from nalora_jax.method.low_rank import residual
from nalora_jax.method.optimizer import nalora
from nalora_jax.method.state import channel_factors, init_gate_state, own_factors, update_gate_state
from nalora_jax.ops import reductions
from nalora_jax.train.mechanisms import make_mechanisms

D, F, LAYERS = 16, 40, 2
KEYMAP = [(r"blocks/(\d+)/(gate|up|down)", r"layers/\1/ffn/\2_proj")]
RULES = LoRAConfig(rules=(LoRARule("ffn/(gate|down)", 4),))


class Block(nnx.Module):
    def __init__(self, remat: bool, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)
        self.remat = remat

    def forward(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.silu(self.gate(x)) * self.up(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(Block.forward)(self, x) if self.remat else self.forward(x)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, remat: bool = False) -> None:
        self.blocks = nnx.List([Block(remat, rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X, Y = np.random.default_rng(1).standard_normal((2, 24, D), np.float32)


def trained_like(lora: Any) -> Any:
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(lora))))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), lora)


@pytest.mark.parametrize("remat", [False, True])
def test_values_gradients_and_statistics_are_those_of_the_functions(remat: bool) -> None:
    graph, state = nnx.split(Model(nnx.Rngs(0), remat))
    adapted = adapt_nnx(graph, state, keymap=KEYMAP, lora=RULES)
    lora = trained_like(adapted.init(jax.random.key(2)))
    masks = {f"layers/{i}/ffn": jax.random.uniform(jax.random.key(i), (F,)) for i in range(LAYERS)}
    kernels = trees.flatten(nnx.to_pure_dict(state))

    def by_hand(lora: Any) -> Any:
        x, stats = X, {}
        for i in range(LAYERS):
            gate, up, down = (kernels[f"blocks/{i}/{name}/kernel"] for name in ("gate", "up", "down"))
            own = lora["layers"][str(i)]["ffn"]
            base = x @ gate
            delta = residual(x, own["gate_proj"]["a"], own["gate_proj"]["b"], 2.0, masks[f"layers/{i}/ffn"])
            z = base + delta
            ones = jnp.ones(z.shape[:-1], bool)
            probe = Probe(
                *(reductions.sampled(v, ones, GateStatsConfig().probe_stride) for v in (base, delta))
            )
            stats[f"layers/{i}/ffn"] = gate_statistics(
                z, probe, ones, activations.get("silu"), GateStatsConfig()
            )
            h = jax.nn.silu(z) * (x @ up)
            x = x + h @ down + residual(h, own["down_proj"]["a"], own["down_proj"]["b"], 2.0)
        y = x @ kernels["head/kernel"] + jnp.broadcast_to(kernels["head/bias"], x.shape)
        return jnp.mean((y - Y) ** 2), stats

    (want, want_stats), want_grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(lora)
    gradients = jax.jit(partial(adapted.gradients, lambda call: jnp.mean((call(X) - Y) ** 2)))
    got, grads, stats = gradients(state, lora, gate_mask=masks)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, leaf in trees.flatten(want_grads).items():
        np.testing.assert_allclose(trees.flatten(grads)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    for path, leaf in trees.flatten(want_stats).items():
        np.testing.assert_allclose(trees.flatten(stats)[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)
    served = nnx.merge(graph, adapted.merge(state, lora))
    np.testing.assert_allclose(served(X), adapted.apply(state, lora, X), atol=1e-5)


def test_training_moves_the_adapters_alone_and_uses_both_mechanisms() -> None:
    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
    adapted = adapt_nnx(graph, state, keymap=KEYMAP, lora=RULES)
    lora = adapted.init(jax.random.key(1))
    mechanisms = make_mechanisms(("hard:keep=0.25,warmup=1", "homogeneity"), activation="silu")
    np.testing.assert_array_equal(adapted.apply(state, lora, X), model(X))
    optimizer = nalora(optax.adamw(1e-2), adapted.gates, mechanisms)
    opt_state, gates = optimizer.init(lora), init_gate_state(adapted.gate_shapes, mechanisms)

    @jax.jit
    def step(state: Any, lora: Any, opt_state: Any, gates: Any) -> Any:
        factors = channel_factors(gates, mechanisms)
        masks = factors["gradient_a"]
        value, grads, stats = adapted.gradients(
            lambda call: jnp.mean((call(X) - Y) ** 2), state, lora, gate_mask=masks
        )
        updates, opt_state = optimizer.update(grads, opt_state, lora, gate_factors=factors)
        return (
            optax.apply_updates(lora, updates),
            opt_state,
            update_gate_state(gates, stats, mechanisms),
            value,
        )

    losses = []
    for _ in range(15):
        previous = lora["layers"]["1"]["ffn"]["gate_proj"]["b"]
        lora, opt_state, gates, value = step(state, lora, opt_state, gates)
        losses.append(float(value))
    moved = np.abs(np.asarray(lora["layers"]["1"]["ffn"]["gate_proj"]["b"] - previous)).max(axis=0) > 0
    assert moved.sum() == F // 4
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.std(own_factors(gates, mechanisms)["step_scale"]["layers/1/ffn"])) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.to_pure_dict(state)))


def test_rules_that_match_nothing_are_refused() -> None:
    graph, state = nnx.split(Model(nnx.Rngs(0)))
    with pytest.raises(NaloraError, match="'mlp', which matches nothing.*head"):
        adapt_nnx(graph, state, keymap=KEYMAP, lora=LoRAConfig(rules=(LoRARule("mlp"),)))
