"""Routing replay: experts that are recorded and taken by another call, against transformers' routers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nalora_jax.models.decoder import Decoder
from nalora_jax.models.replay import ROUTING, recorded_routing, routing_shape
from nalora_jax.models.routing import RouterSpec, choose
from tests.models.test_families import CASES, Pair, build

FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe_lite", "gemma4_text")
# The last case of a family with experts; some of the layers are dense.
BY_FAMILY = {case.family: case for case in CASES if "experts" in case.features}


def tokens_of(pair: Pair, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, pair.config.vocab_size, (2, 9))


def routers(pair: Pair) -> list[torch.nn.Module]:
    """The routers of transformers' model, whose results are logits, weights and experts."""
    names = ("TopKRouter", "TopkRouter", "TextRouter")
    return [module for module in pair.theirs.modules() if type(module).__name__.endswith(names)]


@partial(jax.jit, static_argnums=0)
def recorded(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    _, written = model.apply({"params": params}, tokens, mutable=[ROUTING])
    return recorded_routing(model.config, written[ROUTING])


@partial(jax.jit, static_argnums=0)
def logits_with(model: Decoder, params: Any, tokens: jax.Array, replayed: jax.Array) -> jax.Array:
    hidden = model.apply({"params": params}, tokens, replayed=replayed)
    return model.apply({"params": params}, hidden, method="unembed")


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_experts_are_those_of_transformers_by_layer(family: str) -> None:
    pair = build(BY_FAMILY[family])
    tokens = tokens_of(pair)
    theirs: list[np.ndarray] = []
    hooks = [
        router.register_forward_hook(lambda _, __, result: theirs.append(result[2].numpy()))
        for router in routers(pair)
    ]
    with torch.no_grad():
        pair.theirs(torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    ours = np.asarray(recorded(pair.model, pair.params, tokens))
    layers, top_k = routing_shape(pair.config)
    assert ours.shape == (2, 9, layers, top_k)
    assert len(theirs) == layers
    for layer, chosen in enumerate(theirs):
        expected = np.sort(chosen.reshape(2, 9, top_k))
        np.testing.assert_array_equal(np.sort(ours[:, :, layer]), expected)
    assert len({ours[:, :, layer].tobytes() for layer in range(layers)}) == layers


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_replayed_experts_are_used_with_the_routers_own_weights(family: str) -> None:
    """Random experts in both libraries: the weights are the scores of each layer's own router."""
    case = BY_FAMILY[family]
    pair = build(case)
    tokens = tokens_of(pair)
    layers, top_k = routing_shape(pair.config)
    rng = np.random.default_rng(3)
    replayed = np.argsort(rng.random((2, 9, layers, pair.config.n_experts)))[..., :top_k]
    config = pair.theirs.config

    def force(layer: int, result: Any) -> Any:
        indices = torch.tensor(replayed[:, :, layer].reshape(-1, top_k))
        scores = result[0].sigmoid() if family == "deepseek_v3" else result[0].softmax(-1)
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return result[0], weights * getattr(config, "routed_scaling_factor", 1.0), indices

    hooks = [
        router.register_forward_hook(lambda _, __, result, layer=layer: force(layer, result))
        for layer, router in enumerate(routers(pair))
    ]
    with torch.no_grad():
        expected = pair.theirs(torch.tensor(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    found = logits_with(pair.model, pair.params, tokens, jnp.asarray(replayed, jnp.int16))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    free = pair.logits(tokens, np.ones_like(tokens))
    assert np.abs(np.asarray(free) - expected).max() > 0.01 * np.abs(expected).max()


def test_the_routers_own_choice_replayed_changes_nothing() -> None:
    """For half of the tokens, and for none (-1)."""
    pair = build(BY_FAMILY["deepseek_v3"])
    tokens = tokens_of(pair)
    chosen = np.array(recorded(pair.model, pair.params, tokens))
    none = np.full_like(chosen, -1)
    free = logits_with(pair.model, pair.params, tokens, none)
    np.testing.assert_array_equal(free, pair.logits(tokens, np.ones_like(tokens)))
    chosen[:, ::2] = -1
    replayed = logits_with(pair.model, pair.params, tokens, chosen)
    np.testing.assert_array_equal(replayed, free)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_weights_of_replayed_experts_have_the_gradient_of_their_scores(scores: Any) -> None:
    """Against torch in float64."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6, 8))
    replayed = np.argsort(rng.random((6, 8)))[:, :3]
    towards = rng.normal(size=(6, 3))
    spec = RouterSpec(scores, scale=1.5)

    def ours(x: jax.Array) -> jax.Array:
        weights, chosen = choose(x, 3, spec, replayed=jnp.asarray(replayed))
        np.testing.assert_array_equal(chosen, replayed)
        return jnp.sum(weights * towards)

    x = torch.tensor(logits, requires_grad=True)
    theirs = (x.sigmoid() if scores == "sigmoid" else x.softmax(-1)).gather(
        1, torch.tensor(replayed)
    )
    theirs = 1.5 * theirs / theirs.sum(-1, keepdim=True)
    (theirs * torch.tensor(towards)).sum().backward()
    found = jax.grad(ours)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, x.grad, rtol=1e-4, atol=1e-5)


def test_a_dense_model_has_no_routing() -> None:
    assert routing_shape(build(next(c for c in CASES if c.family == "llama")).config) == (0, 0)
