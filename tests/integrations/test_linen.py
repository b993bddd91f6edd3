"""Linen modules that know nothing of this library: adapted by a keymap and rules, with both mechanisms on."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.integrations import adapt_linen
from nalora_jax.measurement import GateStatsConfig
from nalora_jax.method.ffn import Adapters, GatedFFN
from nalora_jax.method.optimizer import nalora
from nalora_jax.method.state import channel_factors, init_gate_state, own_factors, update_gate_state
from nalora_jax.train.mechanisms import make_mechanisms

D, F, HEADS, VOCAB, LAYERS = 16, 40, 2, 30, 3
RULES = LoRAConfig(rules=(LoRARule("ffn/", 4), LoRARule("attn/(query|out)", 2)))


class MLP(nn.Module):
    """Names as T5 has them; the activation of wi_0 is the gate's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.silu(nn.Dense(F, use_bias=False, name="wi_0")(x)) * nn.Dense(
            F, use_bias=False, name="wi_1"
        )(x)
        return nn.Dense(D, use_bias=False, name="wo")(hidden)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(nn.LayerNorm()(x))
        return x + MLP(name="mlp")(nn.LayerNorm()(x)), None


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        for i in range(LAYERS):
            x, _ = Block(name=f"block_{i}")(x)
        return nn.Dense(VOCAB, name="head")(x)


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, D, name="embed")(tokens)
        block = nn.remat(Block) if self.remat else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(VOCAB, name="head")(x)


UNROLLED = [
    (r"block_(\d+)/mlp/wi_0", r"layers/\1/ffn/gate_proj"),
    (r"block_(\d+)/mlp/wi_1", r"layers/\1/ffn/up_proj"),
    (r"block_(\d+)/mlp/wo", r"layers/\1/ffn/down_proj"),
]
SCANNED = [(pattern.replace(r"block_(\d+)", "blocks"), to.replace(r"\1/", "")) for pattern, to in UNROLLED]
TOKENS = np.random.default_rng(9).integers(0, VOCAB, (4, 12)).astype(np.int32)


def trained_like(lora: Any) -> Any:
    """B away from zero."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), lora
    )


def stacked(unrolled: Any) -> Any:
    """Parameters of `Unrolled` as `Scanned` holds them."""
    params = dict(unrolled["params"])
    blocks = [params.pop(f"block_{i}") for i in range(LAYERS)]
    return {"params": {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def stacked_lora(lora: Any) -> Any:
    """Adapters of `Unrolled` as those of `Scanned`."""
    layers = [lora["layers"][str(i)]["ffn"] for i in range(LAYERS)]
    return {"layers": {"ffn": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


@cache
def variables_of_unrolled() -> Any:
    return jax.jit(Unrolled().init)(jax.random.key(0), TOKENS)


def compiled_gradients(adapted: Any, of: Any) -> Any:
    return jax.jit(partial(adapted.gradients, of))


def loss(call: Any) -> jax.Array:
    logits = call(TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def test_an_mlp_is_the_native_block_on_the_same_weights() -> None:
    """Value, masked gradients and statistics: everything that the mechanisms see."""
    x = jax.random.normal(jax.random.key(0), (2, 10, D))
    weights = jnp.arange(20).reshape(2, 10) % 3 > 0
    variables = jax.jit(MLP().init)(jax.random.key(1), x)
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    rules = LoRAConfig(rules=(LoRARule("_proj", 4, 12.0),))
    every = GateStatsConfig(probe_stride=1)  # a stride counts along all tokens here, along each row there
    adapted = adapt_linen(MLP(), variables, (x,), keymap=list(names.items()), lora=rules, stats=every)
    lora = trained_like(adapted.init(jax.random.key(2)))
    mask = jax.random.uniform(jax.random.key(3), (F,))

    native = GatedFFN(D, F, adapters=Adapters(tuple((name, 4) for name in names.values())), stats=every)
    scales = dict.fromkeys(names.values(), 3.0)
    params = {ours: variables["params"][theirs] for theirs, ours in names.items()}

    def native_loss(lora: Any) -> Any:
        collections = {"params": params, "lora": lora, "gate_mask": {"mask": mask}}
        y, written = native.apply(collections, x, scales, token_weights=weights, mutable=["gate_stats"])
        return jnp.sum(y**2), written["gate_stats"]

    (want, want_stats), want_grads = jax.jit(jax.value_and_grad(native_loss, has_aux=True))(lora)
    gradients = partial(
        compiled_gradients(adapted, lambda call: jnp.sum(call(x) ** 2)),
        variables,
        lora,
        token_weights=weights,
    )
    got, grads, stats = gradients(gate_mask={"": mask})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for path, leaf in trees.flatten(want_grads).items():
        np.testing.assert_allclose(trees.flatten(grads)[path], leaf, rtol=1e-5, atol=2e-5, err_msg=path)
    plain = gradients(gate_mask={"": jnp.ones(F)})[1]
    assert np.abs(plain["gate_proj"]["a"] - grads["gate_proj"]["a"]).max() > 0.1  # the mask did act
    assert sorted(stats[""]) == sorted(want_stats)
    for name in want_stats:
        np.testing.assert_allclose(stats[""][name], want_stats[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_are_the_unrolled_ones(remat: bool) -> None:
    variables = variables_of_unrolled()
    unrolled = adapt_linen(Unrolled(), variables, (TOKENS,), keymap=UNROLLED, lora=LoRAConfig())
    lora = trained_like(unrolled.init(jax.random.key(1)))
    masks = {f"layers/{i}/ffn": jax.random.uniform(jax.random.key(i), (F,)) for i in range(LAYERS)}
    value, grads, stats = compiled_gradients(unrolled, loss)(variables, lora, gate_mask=masks)

    module, packed = Scanned(remat), stacked(variables)
    scanned = adapt_linen(module, packed, (TOKENS,), keymap=SCANNED, lora=LoRAConfig())
    assert scanned.gate_shapes == {"layers/ffn": (LAYERS, F)}
    masks_of_stack = {"layers/ffn": jnp.stack(list(masks.values()))}
    got, got_grads, got_stats = compiled_gradients(scanned, loss)(
        packed, stacked_lora(lora), gate_mask=masks_of_stack
    )
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for path, leaf in trees.flatten(stacked_lora(grads)).items():
        np.testing.assert_allclose(trees.flatten(got_grads)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    for name, sums in got_stats["layers/ffn"].items():
        want = np.stack([stats[f"layers/{i}/ffn"][name] for i in range(LAYERS)])
        np.testing.assert_allclose(sums, want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_attention_of_several_heads_is_adapted_and_merged() -> None:
    variables = variables_of_unrolled()
    adapted = adapt_linen(Unrolled(), variables, (TOKENS,), keymap=UNROLLED, lora=RULES)
    plain, with_adapters = jax.jit(Unrolled().apply), jax.jit(adapted.apply)
    lora = adapted.init(jax.random.key(1))
    assert lora["block_1"]["attn"]["query"]["b"].shape == (2, D)
    assert lora["block_1"]["attn"]["out"]["a"].shape == (D, 2)  # heads x head_dim, flattened
    np.testing.assert_array_equal(with_adapters(variables, lora, TOKENS), plain(variables, TOKENS))
    lora = trained_like(lora)
    merged = adapted.merge(variables, lora)
    want = with_adapters(variables, lora, TOKENS)
    assert np.abs(want - plain(variables, TOKENS)).max() > 0.1
    np.testing.assert_allclose(plain(merged, TOKENS), want, atol=2e-5)


def test_training_moves_the_adapters_alone_and_uses_both_mechanisms() -> None:
    module = Scanned()
    variables = jax.jit(module.init)(jax.random.key(0), TOKENS)
    before = jax.tree.map(np.asarray, variables)
    adapted = adapt_linen(module, variables, (TOKENS,), keymap=SCANNED, lora=RULES)
    lora = adapted.init(jax.random.key(1))
    mechanisms = make_mechanisms(("hard:keep=0.25,warmup=1", "homogeneity"), activation="silu")
    optimizer = nalora(optax.adamw(1e-2), adapted.gates, mechanisms)
    state, gates = optimizer.init(lora), init_gate_state(adapted.gate_shapes, mechanisms)

    @jax.jit
    def step(lora: Any, state: Any, gates: Any) -> Any:
        factors = channel_factors(gates, mechanisms)
        masks = factors["gradient_a"]
        value, grads, stats = adapted.gradients(loss, variables, lora, gate_mask=masks)
        updates, state = optimizer.update(grads, state, lora, gate_factors=factors)
        return (
            optax.apply_updates(lora, updates),
            state,
            update_gate_state(gates, stats, mechanisms),
            value,
            masks,
        )

    losses = []
    for i in range(15):
        previous = lora["layers"]["ffn"]["gate_proj"]["b"]
        lora, state, gates, value, masks = step(lora, state, gates)
        losses.append(float(value))
        moved = np.abs(np.asarray(lora["layers"]["ffn"]["gate_proj"]["b"] - previous)).max(axis=1) > 0
        if i == 0:
            assert moved.all()  # no mask during the warm-up
        else:
            np.testing.assert_array_equal(moved, np.asarray(masks["layers/ffn"]) > 0)
            assert (moved.sum(axis=1) == F // 4).all()
    assert losses[-1] < losses[0] - 0.3
    assert float(jnp.std(own_factors(gates, mechanisms)["step_scale"]["layers/ffn"])) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, variables))


def test_a_users_own_dense_class_under_remat_vmap_and_metadata() -> None:
    class Linear(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return x @ self.param("kernel", init, (x.shape[-1], self.width))

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            mapped = nn.vmap(
                Linear,
                in_axes=None,
                axis_size=3,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                metadata_params={nn.PARTITION_NAME: "expert"},
            )
            z = mapped(8, name="w_gate")(x)
            return nn.remat(nn.Dense)(4, name="w_out")(nn.silu(z))

    x = jax.random.normal(jax.random.key(0), (5, 6))
    variables = jax.jit(Experts().init)(jax.random.key(1), x)
    keymap = [("w_gate", "ffn/in_proj"), ("w_out", "ffn/out_proj")]
    adapted = adapt_linen(
        Experts(), variables, (x,), keymap=keymap, lora=LoRAConfig(rules=(LoRARule("ffn/", 4),))
    )
    lora = trained_like(adapted.init(jax.random.key(2)))
    assert lora["ffn"]["in_proj"]["a"].shape == (3, 6, 4)
    assert adapted.gate_shapes == {"ffn": (3, 8)}
    merged = adapted.merge(variables, lora)
    assert isinstance(merged["params"]["w_gate"]["kernel"], nn.Partitioned)
    ours, theirs = jax.jit(adapted.apply)(variables, lora, x), jax.jit(Experts().apply)(merged, x)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    _, _, stats = compiled_gradients(adapted, lambda call: jnp.sum(call(x) ** 2))(variables, lora)
    np.testing.assert_array_equal(stats["ffn"]["tokens"], [5.0, 5.0, 5.0])


class Twice(nn.Module):
    """A layer that is used in one branch only."""

    @nn.compact
    def __call__(self, x: jax.Array, skip: bool = False) -> jax.Array:
        one, two = nn.Dense(8, name="one"), nn.Dense(8, name="two")
        return one(x) if skip else two(one(x))


@pytest.mark.parametrize(
    ("keymap", "lora", "message"),
    [
        ([("nothing", "ffn/up_proj")], RULES, "keymap.*matches nothing.*block_0/mlp/wi_0"),
        (
            [(r"block_(\d+)/mlp/w.*", r"layers/\1/ffn/gate_proj")],
            RULES,
            "keymap: expected one projection called",
        ),
        (UNROLLED, LoRAConfig(rules=(LoRARule("mlp"),)), "matches nothing.*ffn/gate_proj"),
        (UNROLLED, LoRAConfig(rules=(LoRARule("ffn/", 17),)), r"rank: expected 0 to 16"),
        (UNROLLED, LoRAConfig(rules=(LoRARule("ffn/", 4, -1.0),)), "alpha: expected a number above 0"),
        (UNROLLED, LoRAConfig(rules=(LoRARule("ffn/", 0),)), "at least one adapter"),
        (UNROLLED, LoRAConfig(dora=True), "dora=True"),
        (UNROLLED, LoRAConfig(dropout=0.1), "dropout=0.1"),
        (UNROLLED, LoRAConfig(trainable_token_indices=(5,)), "trainable_token_indices"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(keymap: Any, lora: Any, message: str) -> None:
    shapes = jax.eval_shape(Unrolled().init, jax.random.key(0), TOKENS)
    with pytest.raises(NaloraError, match=message):
        adapt_linen(Unrolled(), shapes, (TOKENS,), keymap=keymap, lora=lora)


def test_an_unknown_activation_is_refused() -> None:
    shapes = jax.eval_shape(Unrolled().init, jax.random.key(0), TOKENS)
    with pytest.raises(NaloraError, match="swoosh"):
        adapt_linen(Unrolled(), shapes, (TOKENS,), keymap=UNROLLED, activation="swoosh")


def test_an_adapter_that_a_call_does_not_reach_is_an_error() -> None:
    x = jnp.ones((2, 8))
    variables = Twice().init(jax.random.key(0), x)
    adapted = adapt_linen(Twice(), variables, (x,), lora=LoRAConfig(rules=(LoRARule(".", 2),)))
    lora = adapted.init(jax.random.key(1))
    adapted.apply(variables, lora, x)
    with pytest.raises(NaloraError, match="two: expected a call.*its adapter did nothing"):
        adapted.apply(variables, lora, x, skip=True)


def test_token_weights_of_another_shape_are_refused() -> None:
    variables = variables_of_unrolled()
    adapted = adapt_linen(Unrolled(), variables, (TOKENS,), keymap=UNROLLED)
    run = partial(compiled_gradients(adapted, loss), variables, adapted.init(jax.random.key(1)))
    with pytest.raises(NaloraError, match=r"token_weights: expected shape \(4, 12\)"):
        run(token_weights=jnp.ones((4, 11)))
    weights = jnp.asarray(np.arange(12) < np.array([12, 5, 7, 1])[:, None])
    stats = run(token_weights=weights)[2]
    assert float(stats["layers/0/ffn"]["tokens"]) == 25


class Fused(nn.Module):
    """Gate and up projection in one layer, whose output is read as two halves."""

    width: int = F

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(nn.Dense(2 * self.width, use_bias=False, name="wi")(x), 2, axis=-1)
        return nn.Dense(D, use_bias=False, name="wo")(nn.silu(gate) * up)


@pytest.mark.parametrize("width", [F, D, D // 2])
@pytest.mark.parametrize("gate", ["ffn/gate_proj", "ffn/in_proj"])
def test_a_layer_that_is_gate_and_up_projection_is_no_gate(width: int, gate: str) -> None:
    x = jnp.ones((2, 3, D))
    variables = Fused(width).init(jax.random.key(0), x)
    rules = LoRAConfig(rules=(LoRARule("ffn/", 4),))
    expected = rf"keymap: wi: expected a gate with as many outputs as wo has inputs, {width}, found {2 * width} outputs"
    for down in ("ffn/down_proj", "elsewhere"):
        with pytest.raises(NaloraError, match=expected):
            adapt_linen(Fused(width), variables, (x,), keymap=[("wi", gate), ("wo", down)], lora=rules)
    plain = adapt_linen(
        Fused(width),
        variables,
        (x,),
        keymap=[("wi", "ffn/gate_up_proj"), ("wo", "ffn/down_proj")],
        lora=rules,
    )
    assert not plain.gates


class Flat(nn.Module):
    """A block whose projections are all in one place, some of them half as wide as its gate."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.Dense(D, name="query")(x)
        hidden = nn.silu(nn.Dense(2 * D, name="gate")(x)) * nn.Dense(2 * D, name="up")(x)
        return nn.Dense(D, name="down")(hidden)


def test_a_gate_twice_as_wide_as_its_input_is_a_gate() -> None:
    x = jnp.ones((2, 3, D))
    keymap = [(name, f"{name}_proj") for name in ("gate", "up", "down")]
    adapted = adapt_linen(
        Flat(),
        Flat().init(jax.random.key(0), x),
        (x,),
        keymap=keymap,
        lora=LoRAConfig(rules=(LoRARule("_proj", 4),)),
    )
    assert adapted.gates
