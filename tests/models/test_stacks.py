"""Layers of several kinds: their division into stacks, names, and equality with the uniform decoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import layer_numbers, projection_shapes, stacks
from nalora_jax.models.targets import resolve
from tests.models.family_fields import tiny_config
from tests.observed import taps_of
from tests.param_trees import init_params

UNIFORM = tiny_config(
    "gemma3_text", num_hidden_layers=3, head_dim=8, sliding_window=5, sliding_window_pattern=2
)
# The same model with layers of another kind by name only: groups [B] x 2, [A].
MIXED = dataclasses.replace(UNIFORM, kinds=((), (("norm_eps", UNIFORM.norm_eps),)), layer_kinds=(1, 1, 0))


def to_stacks(tree):
    """Distributes the stacked leaves of the uniform model over the stacks of `MIXED`."""
    leaves = {}
    for path, leaf in flatten(tree).items():
        if not path.startswith("layers/"):
            leaves[path] = leaf
            continue
        for stack in stacks(MIXED):
            leaves[path.replace("layers", stack.prefix, 1)] = leaf[np.array(stack.layers)]
    return unflatten(leaves)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((0, 1, 1, 1), [("group0/block0", (0,)), ("group1/block0", (1, 2, 3))]),
        ((0, 0, 0, 1) * 3, [(f"group0/block{i}", (i, i + 4, i + 8)) for i in range(4)]),
        ((2, 0, 1, 0, 1), [("group0/block0", (0,)), ("group1/block0", (1, 3)), ("group1/block1", (2, 4))]),
    ],
)
def test_layers_are_divided_into_the_fewest_compiled_blocks(kinds, expected):
    config = dataclasses.replace(UNIFORM, n_layers=len(kinds), kinds=((),) * 3, layer_kinds=kinds)
    config = dataclasses.replace(config, windows=tuple(range(1, len(kinds) + 1)), rope_index=())
    assert [(s.prefix.removeprefix("layers/"), s.layers) for s in stacks(config)] == expected
    assert all(s.config.windows == tuple(i + 1 for i in s.layers) for s in stacks(config))


def test_a_rematerialized_mixed_decoder_equals_the_uniform_one():
    config = LoRAConfig(rules=(LoRARule("ffn/", 4), LoRARule("attn/[qv]", 2), LoRARule("", 0)))
    spec = resolve(config, projection_shapes(UNIFORM), layer_numbers(UNIFORM))
    mixed_spec = resolve(config, projection_shapes(MIXED), layer_numbers(MIXED))
    params = init_params(UNIFORM, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.02, init_lora(UNIFORM, spec, jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)

    def loss(lora, taps, model, params):
        variables = {"params": params, "lora": lora, "gate_taps": taps}
        hidden = model.apply(variables, tokens)
        return jnp.sum(jnp.square(model.apply(variables, hidden, method="unembed")))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    uniform_model, mixed = Decoder(UNIFORM, spec, remat="full"), Decoder(MIXED, mixed_spec, remat="full")
    theirs = gradient(lora, taps_of(uniform_model), uniform_model, params)
    ours = gradient(to_stacks(lora), taps_of(mixed), mixed, to_stacks(params))
    for mine, uniform in zip(ours, theirs, strict=True):
        expected = flatten(to_stacks(uniform))
        assert flatten(mine).keys() == expected.keys()
        for path, leaf in flatten(mine).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
