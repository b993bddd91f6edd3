"""Adapters around users' models: the programs of docs/own_models.md, every kind of layer, and
errors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special

from nalora_jax import adapt, merge_nnx, nalora, token_weights
from nalora_jax.errors import NaloraError
from nalora_jax.method.adapt import LoRAFactor
from nalora_jax.method.transform import gate_state

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_models.md").read_text(encoding="utf-8")
PAGE += (ROOT / "nalora_jax" / "method" / "README.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"```python title=\"(\w+)\.py\"\n(.*?)```", PAGE, re.DOTALL))
# The page shows the optimizer and the training step once, in the Linen program.
_STEP = re.search(r"^optimizer = .*?(?=^merged)", PROGRAMS["own_linen"], re.MULTILINE | re.DOTALL)
assert _STEP is not None
PROGRAMS["own_block"] += _STEP[0]
D, F = 8, 12


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        ("own_linen", "delta"),
        ("own_nnx", "curvature_cap"),
        ("own_block", "homogeneity"),
        ("own_loop", "curvature_cap"),
    ],
)
def test_the_programs_of_the_page_train(program: str, rule: str) -> None:
    text = PROGRAMS[program].replace('("curvature_cap",)', f'("{rule}:warmup=3",)')
    space: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):
        exec(compile(text.replace("range(30)", "range(6)"), program, "exec"), space)
    state = gate_state(space.get("opt_state") or nnx.as_pure(space["optimizer"].opt_state))
    assert state is not None
    assert int(state.count) == 6
    ((label, blocks),) = state.memory.items()
    ((_, averages),) = blocks.items()
    assert all(float(jnp.max(value)) > 0 for value in averages.values()), label
    assert float(space["value"]) < 2.0  # about 2 before the first step
    merged = expected = space["x"]
    if program == "own_linen":
        merged = space["model"].apply(space["merged"], space["x"])
        expected = space["adapted"].apply(space["variables"], space["lora"], space["x"])
    elif program == "own_nnx":
        merged, expected = space["merged"](space["x"]), space["adapted"](space["x"])
    np.testing.assert_allclose(merged, expected, atol=1e-5)


class Block(nn.Module):
    """A gated block of 3 layers in Linen."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        hidden = nn.silu(nn.Dense(F, name="gate")(x)) * nn.Dense(F, name="up")(x)
        return x + nn.Dense(D, name="down")(hidden)


class Layers(nn.Module):
    """Three blocks: scanned and rematerialized, or one after the other."""

    scanned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def body(block: nn.Module, x: Any, _: Any) -> tuple[Any, None]:
            return block(x), None

        if self.scanned:
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(nn.remat(Block)(name="blocks"), x, None)[0]
        for i in range(3):
            x = Block(name=f"block_{i}")(x)
        return x


X = jax.random.normal(jax.random.key(0), (2, 5, D))
NAMES = ("delta", "curvature_cap", "homogeneity", "soft")  # statistics of all sources


@cache
def linen(model: nn.Module, rules: Any = NAMES) -> tuple[Any, Any, Any]:
    variables = jax.jit(model.init)(jax.random.key(1), X)
    adapted, _ = adapt(
        model, {"": 2}, {"gate": "silu"}, rules=rules, variables=variables, example=(X,)
    )
    lora = jax.jit(adapted.init)(jax.random.key(2))
    rng = np.random.default_rng(3)

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        return (
            jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
            if path[-1].key == "b"
            else leaf
        )

    return adapted, variables, jax.tree_util.tree_map_with_path(fill, lora)


def gradients(adapted: Any, variables: Any, lora: Any) -> Any:
    return jax.jit(jax.grad(lambda lora: jnp.sum(jnp.sin(adapted.apply(variables, lora, X)))))(lora)


def test_the_gradient_of_the_taps_is_the_statistics() -> None:
    """Against float64, with padding; the cotangent of z by a difference of the loss."""
    adapted, variables, lora = linen(Block())
    weights = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0.5]])
    with token_weights(weights):
        measured = gradients(adapted, variables, lora)["gate"]["taps"]
    taps = {name: np.asarray(value, np.float64) for name, value in measured.items()}
    gate, leaf, w = variables["params"]["gate"], lora["gate"], np.asarray(weights).reshape(-1, 1)
    x = np.asarray(X, np.float64).reshape(-1, D)
    base = x @ np.asarray(gate["kernel"], np.float64) + np.asarray(gate["bias"])[None]
    dz = 2.0 * (x @ np.asarray(leaf["a"], np.float64)) @ leaf["b"]
    z, rho, moved = base + dz, special.expit(base), special.expit(base + dz)
    drho, selection = rho * (1 - rho), (moved - rho) * (base + dz)
    assert taps["tokens"] == taps["probe_tokens"] == 7.5
    expected = {
        "slope": np.abs(moved + z * moved * (1 - moved)),
        "excess": np.abs(selection - base * drho * dz),
        "response": np.abs((rho + base * drho) * dz),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(taps[name], (w * value).sum(0), rtol=1e-4, err_msg=name)

    def loss(bias: jax.Array) -> jax.Array:
        shifted = {**variables["params"], "gate": {**gate, "bias": bias}}
        return jnp.sum(jnp.sin(adapted.apply({"params": shifted}, lora, X)))

    of_one = jax.grad(lambda z, token: _loss_of(z, token, variables, lora))
    of_token = jax.jit(jax.vmap(of_one, in_axes=(None, 0)))(jnp.zeros(F), jnp.arange(10))
    np.testing.assert_allclose(
        of_token.sum(0), jax.jit(jax.grad(loss))(gate["bias"]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        taps["delta_squared"], (w * np.asarray(of_token) ** 2).sum(0), rtol=1e-4
    )


def _loss_of(shift: jax.Array, token: jax.Array, variables: Any, lora: Any) -> jax.Array:
    """Returns the loss of the block with z of one token shifted, computed without the library."""
    params, x = variables["params"], X.reshape(-1, D)

    def dense(name: str, x: jax.Array) -> jax.Array:
        p, leaf = params[name], lora[name]
        return x @ p["kernel"] + p["bias"][None] + 2.0 * (x @ leaf["a"]) @ leaf["b"]

    z = dense("gate", x) + jnp.where(jnp.arange(10)[:, None] == token, shift[None], 0.0)
    return jnp.sum(jnp.sin(x + dense("down", jax.nn.silu(z) * dense("up", x))))


def test_scanned_and_rematerialized_layers_are_the_unrolled_ones() -> None:
    scanned, variables, lora = linen(Layers(True))
    assert lora["blocks"]["gate"]["taps"]["occupancy"].shape == (3, 4, F)
    unrolled, _, _ = linen(Layers(False))
    apart = lambda tree: {f"block_{i}": jax.tree.map(lambda v: v[i], tree) for i in range(3)}  # noqa: B023, E731
    theirs = gradients(
        unrolled, {"params": apart(variables["params"]["blocks"])}, apart(lora["blocks"])
    )
    ours = apart(gradients(scanned, variables, lora)["blocks"])
    # In float32, with other fusions: the largest relative difference is 1.4e-4 with JAX 0.12.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, theirs)


def test_the_inner_optimizer_sees_adapters_only() -> None:
    """Without a rule, and with factors of 1, updates are those of the inner optimizer to the
    bit."""
    adapted, variables, lora = linen(Block(), ("squared:warmup=5",))
    grads = gradients(adapted, variables, lora)
    bare = lambda tree: {name: {key: leaf[key] for key in "ab"} for name, leaf in tree.items()}  # noqa: E731
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    want, _ = jax.jit(inner.update)(bare(grads), inner.init(bare(lora)), bare(lora))
    optimizer = nalora(inner, adapted.mechanisms)
    found, state = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(lora), lora)
    jax.tree.map(np.testing.assert_array_equal, bare(found), want)
    assert not any(jnp.any(tap) for tap in found["gate"]["taps"].values())
    assert len(jax.tree.leaves(state[0])) == len(jax.tree.leaves(inner.init(bare(lora))))


# ---------------------------------------------------------------- kinds of layers


class Transposed(nn.Module):
    """A layer of the user's own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x @ self.param("w", nn.initializers.lecun_normal(), (F, x.shape[-1])).T


class Heads(nn.Module):
    """Attention-like layers: several axes, and an einsum."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.DenseGeneral((2, 2), name="split")(x)
        x = nn.Einsum((2, 2, D), "btnh,nhd->btd", name="join")(x)
        x = nn.DenseGeneral(D, axis=(-1,), name="last")(x)
        return jnp.tanh(Transposed(name="own")(x))


class TunixEinsum(nnx.Module):
    """As Tunix has it: keys and values of one kernel, the new axis first."""

    def __init__(self, text: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.text, self.w = text, nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x: Any) -> Any:
        return jnp.einsum(self.text, x, self.w[...])


class KeysAndValues(nnx.Module):
    """Layers of NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kv = TunixEinsum("BSD,CKDH->CBSKH", (2, 3, D, 4), rngs)
        self.join = nnx.LinearGeneral((3, 4), D, axis=(-2, -1), rngs=rngs)
        self.gates = nnx.List([nnx.Linear(D, F, rngs=rngs)])
        self.gates.append(nnx.Einsum("bsd,df->bsf", (D, F), (F,), rngs=rngs))

    def __call__(self, x: Any) -> Any:
        keys, values = self.kv(x)
        x = self.join(keys * values)
        return nnx.silu(self.gates[0](x)) * self.gates[1](x)


def test_every_class_of_linen_layers_is_adapted_and_merged() -> None:
    classes = {Transposed: "...i,oi->...o"}
    model = Heads()
    variables = jax.jit(model.init)(jax.random.key(1), X)
    options: dict[str, Any] = {"variables": variables, "example": (X,), "classes": classes}
    adapted, _ = adapt(model, {"": 2}, {"own": "relu"}, **options)
    assert [p.path for p in adapted.projections] == ["join", "last", "own", "split"]

    @jax.jit
    def run(variables: Any) -> list[jax.Array]:
        lora = jax.tree.map(lambda leaf: leaf + 0.1, adapted.init(jax.random.key(2)))
        merged = adapted.merge(variables, lora)
        return [
            adapted.apply(variables, lora, X),
            model.apply(merged, X),
            model.apply(variables, X),
        ]

    found, merged, plain = run(variables)
    np.testing.assert_allclose(found, merged, atol=1e-5)
    assert float(jnp.abs(merged - plain).max()) > 1e-2


def test_every_class_of_nnx_layers_is_adapted_and_merged() -> None:
    model = KeysAndValues(nnx.Rngs(0))
    adapted, mechanisms = adapt(model, {"": 2}, {"gates/0": "silu"}, classes={TunixEinsum: "text"})
    np.testing.assert_array_equal(adapted(X), model(X))  # a fresh adapter is the identity
    factors = nnx.state(adapted, LoRAFactor)
    nnx.update(adapted, jax.tree.map(lambda leaf: leaf + 0.1, factors))
    merged = merge_nnx(adapted)
    assert type(merged.kv) is TunixEinsum
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    np.testing.assert_allclose(merged(X), adapted(X), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(merged(X) - model(X)).max()) > 1e-2
    assert mechanisms.activation == "silu"
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))  # the user's model stays as it was


# ---------------------------------------------------------------- errors


class Fused(nn.Module):
    """Gate and up projection in one layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate, up = jnp.split(nn.Dense(2 * F, name="gate_up")(x), 2, axis=-1)
        return nn.Dense(D, name="down")(nn.silu(gate) * up)


class Shared(nnx.Module):
    """One layer at two places."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = self.first

    def __call__(self, x: Any) -> Any:
        return self.second(self.first(x))


class Sum(nn.Module):
    """One layer with two kernels."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernels = [self.param(name, nn.initializers.ones, (D, D)) for name in ("first", "second")]
        return x @ sum(kernels)


SUM = {"model": nn.Sequential([Sum()]), "classes": {Sum: "...i,io->...o"}}


@pytest.mark.parametrize(
    ("layers", "gates", "options", "message"),
    [
        ({"query": 2}, {"gate": "silu"}, {}, "layers: 'query': expected a part of one of the paths down, gate, up"),
        ({"down": 2}, {"gate": "silu"}, {}, "gates: 'gate': expected a part of one of the paths down, found no match"),
        ({"": 2}, {}, {}, "gates: expected a pattern and an activation"),
        ({"": 2}, {"gate": "swosh"}, {}, "activation: expected one of .*silu.*swosh"),
        ({"": 99}, {"gate": "silu"}, {}, "rank from 0 to 8, the smaller side of"),
        ({"": 2}, {"gate": "silu"}, {"alpha": 0.0}, "alpha: expected a number above 0, found 0.0"),
        ({"": 2}, {"gate": "silu"}, {"classes": {nn.Dense: "...i,io"}}, "expected an einsum of the input and"),
        ({"": 2}, {"gate": "silu"}, {"variables": None}, "variables=.*expected the variables of the Linen module"),
        ({"": 2}, {"gate": "silu"}, {"model": Fused()}, "gates: gate_up: expected a layer with 12 outputs.*found 24"),
        ({"": 2}, {"first": "silu"}, {"model": Shared(nnx.Rngs(0))}, "first: expected a layer with one place"),
        ({"": 2}, {"gate": "quick_gelu"}, {}, "gates: gate: expected 'silu', which the model applies"),
        ({"": 2}, {"blocks/gate": "relu"}, {"model": Layers(True)}, "gates: blocks/gate: expected 'silu'"),
        ({"": 2}, {"": "silu"}, SUM, "layers_0: expected one parameter with 2 axes.*found first, second"),
        ({"": 2}, {"": "silu"}, {"model": {}}, "adapt: expected a module of flax.linen or flax.nnx, found dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_named(
    layers: Any, gates: Any, options: Any, message: str
) -> None:
    model = options.get("model", Block())
    given: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        variables = jax.eval_shape(model.init, jax.random.key(1), X)
        given = {"variables": variables, "example": (X,)}
    given |= {name: value for name, value in options.items() if name != "model"}
    with pytest.raises(NaloraError, match=message):
        adapt(model, layers, gates, **given)


def spelled_gelu(x: Any) -> Any:
    return 0.5 * x * (1 + jax.scipy.special.erf(x.astype(jnp.float32) / np.sqrt(2)))


@pytest.mark.parametrize(
    ("function", "accepted", "refused"),
    [
        (nn.silu, {"silu"}, {"gelu", "relu", "relu2", "identity"}),
        (nn.gelu, {"gelu", "gelu_tanh"}, {"silu", "relu"}),
        (spelled_gelu, {"gelu", "gelu_tanh"}, {"quick_gelu"}),
        (lambda x: jnp.where(x > 0, x, 0), {"relu"}, {"silu"}),
        # Unknown functions pass: a bounded ReLU, a sum with another value.
        (jax.nn.relu6, {"relu", "silu"}, set()),
        (lambda x: nn.silu(x + X[..., :1]), {"relu", "silu"}, set()),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_activation_of_a_gate_is_read_from_the_model(
    function: Any, accepted: set[str], refused: set[str], dtype: Any
) -> None:
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return function(nn.Dense(F, dtype=dtype, name="gate")(x))

    variables = jax.eval_shape(Gated().init, jax.random.key(1), X)
    options: dict[str, Any] = {"variables": variables, "example": (X,)}
    for name in accepted:
        adapt(Gated(), {"": 2}, {"gate": name}, **options)
    for name in refused:
        with pytest.raises(NaloraError, match=f"gates: gate: .*found '{name}'"):
            adapt(Gated(), {"": 2}, {"gate": name}, **options)


def test_merging_refuses_adapters_that_were_trained_without_nalora() -> None:
    message = "lora: .*/taps/.*expected zeros, which `nalora` keeps.*wrap the optimizer"
    adapted, variables, lora = linen(Block())
    optimizer = optax.adamw(1e-2)
    updates, _ = optimizer.update(gradients(adapted, variables, lora), optimizer.init(lora), lora)
    with pytest.raises(NaloraError, match=message):
        adapted.merge(variables, optax.apply_updates(lora, updates))
    model = nnx.Sequential(nnx.Linear(D, D, rngs=nnx.Rngs(0)))
    model, _ = adapt(model, {"": 2}, {"": "silu"})
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    of_lora = nnx.DiffState(0, nnx.LoRAParam)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(X)), argnums=of_lora)(model))
    with pytest.raises(NaloraError, match=message):
        merge_nnx(model)


def test_a_call_that_misses_a_layer_and_weights_of_another_shape_are_refused() -> None:
    adapted, variables, lora = linen(Block())
    shape = r"token_weights: expected shape \(2, 5\)"
    with token_weights(jnp.ones((2, 4))), pytest.raises(NaloraError, match=shape):
        gradients(adapted, variables, lora)

    class Empty(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x

    with pytest.raises(NaloraError, match="down: expected a call, as with the example, found none"):
        type(adapted)(Empty(), adapted.projections, adapted.mechanisms).apply(variables, lora, X)
