"""Layers that are not what their shapes say: what is adapted merges to the same model, the rest is refused by name."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nalora_jax import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.integrations import adapt_linen, adapt_nnx
from nalora_jax.integrations.layers import Contraction, arrangements

D = 8
X = np.random.default_rng(0).standard_normal((3, 5, D), np.float32)
ALL = LoRAConfig(rules=(LoRARule(".", 2),))
# What a layer may compute from its input, its kernel and its bias, and whether an adapter on it can be merged.
SOUND = {
    "product": lambda x, w, b: x @ w,
    "bias": lambda x, w, b: x @ w + b,
    "transposed": lambda x, w, b: x @ w.T + b,
}
UNSOUND = {
    "factor": (lambda x, w, b: 2.0 * (x @ w), r"it computes 2 \* x @ "),
    "activation": (lambda x, w, b: jax.nn.silu(x @ w + b), r"it does not compute x @ .*\(an activation"),
    "residual": (lambda x, w, b: x + x @ w, "it does not compute x @ "),
    "scaled bias": (lambda x, w, b: x @ w + 2.0 * b, "it does not compute x @ "),
}


class LinenLayer(nn.Module):
    """A user's own, with any name for its square kernel."""

    function: Any
    name_of_kernel: str = "kernel"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(self.name_of_kernel, nn.initializers.normal(0.3), (D, D))
        bias = self.param("b", nn.initializers.normal(0.3), (D,))
        return self.function(x, kernel, jnp.broadcast_to(bias, x.shape))


class LinenModel(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.tanh(self.layer(x))


class NNXLayer(nnx.Module):
    def __init__(self, function: Any, name: str = "w") -> None:
        setattr(self, name, nnx.Param(0.3 * jax.random.normal(jax.random.key(1), (D, D))))
        self.b = nnx.Param(0.3 * jax.random.normal(jax.random.key(2), (D,)))
        self.function, self.name = function, name

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x, getattr(self, self.name)[...], jnp.broadcast_to(self.b[...], x.shape))


class NNXModel(nnx.Module):
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.layer(x))


def moved(adapted: Any) -> Any:
    """Adapters whose B is not zero."""
    lora = adapted.init(jax.random.key(3))
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), lora
    )


def linen(layer: nn.Module, x: Any = X, lora: LoRAConfig = ALL) -> Any:
    model = LinenModel(layer)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    adapted = adapt_linen(model, variables, (x,), lora=lora)
    return adapted, variables, model.apply


def own_nnx(layer: Any, lora: LoRAConfig = ALL) -> Any:
    graph, state = nnx.split(NNXModel(layer))
    return adapt_nnx(graph, state, lora=lora), state, lambda state, x: nnx.merge(graph, state)(x)


def assert_merges(adapted: Any, variables: Any, apply: Any, x: Any = X) -> None:
    lora = moved(adapted)
    want = jax.jit(adapted.apply)(variables, lora, x)
    assert np.abs(want - apply(variables, x)).max() > 0.05
    np.testing.assert_allclose(apply(adapted.merge(variables, lora), x), want, atol=1e-5)


@pytest.mark.parametrize("name", ["kernel", "w"])
@pytest.mark.parametrize("kind", SOUND)
def test_a_product_is_adapted_whatever_its_parameter_is_called_and_however_it_is_stored(
    kind: str, name: str
) -> None:
    assert_merges(*linen(LinenLayer(SOUND[kind], name)))
    assert_merges(*own_nnx(NNXLayer(SOUND[kind], name)))


@pytest.mark.parametrize("kind", UNSOUND)
def test_what_only_resembles_a_product_is_refused_with_the_reason(kind: str) -> None:
    function, reason = UNSOUND[kind]
    for make in (lambda: linen(LinenLayer(function)), lambda: own_nnx(NNXLayer(function))):
        with pytest.raises(
            NaloraError, match=rf"layer: expected a layer that computes x @ kernel \+ bias.*{reason}"
        ):
            make()


def test_a_kernel_of_outputs_by_inputs_is_adapted() -> None:
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("weight", nn.initializers.normal(0.3), (5, D)).T

    adapted, variables, apply = linen(Wide())
    assert adapted.targets[0].projection.dense == Contraction("weight", (D,), (5,), transposed=True)
    assert_merges(adapted, variables, apply)


def test_nnx_linear_general_is_adapted() -> None:
    layer = nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=nnx.Rngs(0))
    adapted, state, apply = own_nnx(layer)
    lora = trees.flatten(moved(adapted))
    assert (lora["layer/a"].shape, lora["layer/b"].shape) == ((8, 2), (2, 6))
    assert_merges(adapted, state, apply, X.reshape(3, 5, 2, 4))


def test_a_class_made_from_nnx_linear_is_judged_by_what_it_computes() -> None:
    class Doubled(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return 2.0 * super().__call__(x)

    with pytest.raises(NaloraError, match=r"it computes 2 \* x @ kernel"):
        own_nnx(Doubled(D, D, use_bias=False, rngs=nnx.Rngs(0)))


def test_a_layer_of_another_kind_is_named_where_it_is_all_that_a_rule_finds() -> None:
    with pytest.raises(
        NaloraError, match=r"layer: .*no product of its input \[3, 5, 8\] with one parameter \(bias"
    ):
        linen(nn.Conv(4, (3,), padding="VALID"))
    embedding = NNXModel(nnx.Embed(10, D, rngs=nnx.Rngs(0)))
    with pytest.raises(NaloraError, match="layer: .*it could not be run on its own"):
        adapt_nnx(*nnx.split(embedding), lora=ALL)


def test_embeddings_beside_dense_layers_are_left_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return nn.Dense(4, name="out")(nn.Embed(10, D, name="embed")(tokens))

    tokens = jnp.arange(6)
    variables = Model().init(jax.random.key(0), tokens)
    adapted = adapt_linen(Model(), variables, (tokens,), lora=ALL)
    assert [target.path for target in adapted.targets] == ["out"]
    assert "finds embed, which is left as it is: its input is not an array of real numbers" in caplog.text


def test_a_kernel_that_is_read_elsewhere_too_is_found_by_merging() -> None:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = nn.Dense(D, use_bias=False, name="layer")
            return layer(x) + x @ layer.variables["params"]["kernel"]

    variables = Tied().init(jax.random.key(0), X)
    adapted = adapt_linen(Tied(), variables, (X,), lora=ALL)
    with pytest.raises(
        NaloraError, match="merge: expected the adapted model's result.*also used outside of the layer"
    ):
        adapted.merge(variables, moved(adapted))


def test_a_layer_at_two_places_of_an_nnx_model_is_refused() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.one = nnx.Linear(D, D, rngs=nnx.Rngs(0))
            self.two = self.one

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.two(self.one(x))

    with pytest.raises(NaloraError, match="stands at two places of the model"):
        adapt_nnx(*nnx.split(Twice()), lora=ALL)


def test_an_nnx_layer_that_a_call_does_not_reach_is_an_error() -> None:
    class Bypassed(NNXModel):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    graph, state = nnx.split(Bypassed(nnx.Linear(D, D, rngs=nnx.Rngs(0))))
    adapted = adapt_nnx(graph, state, lora=ALL)
    with pytest.raises(NaloraError, match="layer: expected a call of this layer, found none"):
        adapted.apply(state, moved(adapted), X)


class Stateful(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(self.layer(x)))


@pytest.mark.parametrize("jit", [False, True])
def test_state_that_an_nnx_call_changes_is_carried_or_refused(jit: bool) -> None:
    model = Stateful()
    graph, state = nnx.split(nnx.clone(model))  # what is split shares its numbers with the model
    adapted = adapt_nnx(graph, state, lora=ALL)
    lora = adapted.init(jax.random.key(0))
    compiled = jax.jit if jit else lambda function: function
    with pytest.raises(NaloraError, match=r"norm/mean \(BatchStat\).*return_state=True"):
        compiled(adapted.apply)(state, lora, X)
    carry = compiled(lambda state: adapted.apply(state, lora, X, return_state=True))
    for _ in range(2):  # the counter and the averages go on as in the user's own model
        want = model(X)
        got, state = carry(state)
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert int(state["dropout"]["rngs"]["count"].get_value()) == 2
    np.testing.assert_allclose(state["norm"]["mean"].get_value(), model.norm.mean[...], atol=1e-6)
    loss = lambda call: (lambda out: (jnp.sum(out[0]), out[1]))(call(X, return_state=True))  # noqa: E731
    (_, after), grads, _ = adapted.gradients(loss, state, lora, has_aux=True)
    assert float(jnp.abs(grads["layer"]["b"]).max()) > 0
    assert int(after["dropout"]["rngs"]["count"].get_value()) == 3


def test_a_model_in_evaluation_changes_nothing_and_is_served() -> None:
    model = Stateful()
    model.eval()
    graph, state = nnx.split(model)
    adapted = adapt_nnx(graph, state, lora=ALL)
    lora = moved(adapted)
    served = nnx.merge(graph, adapted.merge(state, lora, X))
    np.testing.assert_allclose(served(X), adapted.apply(state, lora, X), atol=1e-5)


def test_shapes_alone_may_mean_several_products() -> None:
    found = arrangements({"kernel": (4, 4), "bias": (4,)}, (2, 4), (2, 4))
    assert [one.transposed for one in found] == [False, True]
    assert arrangements({"kernel": (4, 4)}, (2, 3), (2, 4)) == []
