"""What calls the native kernels computes what XLA computes, to the rounding of bf16, and so does a whole step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from nalora_jax.cpu import native
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.generate import Generator
from nalora_jax.layout import distributed
from nalora_jax.method import activations
from nalora_jax.method.ffn import gated_product
from nalora_jax.method.low_rank import Adapter, Dense, adapted_dense, parallel_dense
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.ops.attention import AttentionConfig, Keys, attention
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for
from nalora_jax.ops.losses import Head, cross_entropy
from nalora_jax.ops.storage import STACKS, matmul, prepare
from nalora_jax.train.program import assemble
from tests import tiny
from tests.cpu.native.conftest import ENDS, KINDS
from tests.param_trees import init_params

pytestmark = pytest.mark.usefixtures("kernels")
CPU = Numerics("bfloat16", "float32", "bfloat16", "bfloat16", platform=Platform("cpu"))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native kernels that were asked for since the test began."""
    names: list[str] = []
    call = native.call

    def recorded(function: str, *arguments: Any, **attributes: Any) -> Any:
        names.append(function)
        return call(function, *arguments, **attributes)

    monkeypatch.setattr(native, "call", recorded)
    return names


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> Callable[..., tuple[Any, Any]]:
    """A function's results with the native kernels, which must have been called, and without."""

    def run(function: Callable[[], Any], *, expected: bool = True) -> tuple[Any, Any]:
        with monkeypatch.context() as context:
            with_kernels = jax.device_get(function())
            count = len(called)
            jax.clear_caches()
            context.setenv("NALORA_NATIVE", "0")
            without = jax.device_get(function())
        assert len(called) == count
        assert (count > 0) == expected
        return with_kernels, without

    return run


def close(one: Any, other: Any, share: float = 2**-7) -> None:
    """Equal but for bf16's rounding."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= share * max(np.abs(y).max(), 1e-6)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    # Not `jnp.asarray`, which compiles a program for every shape.
    return [jax.device_put(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(64, 96), (96, 64)])
def test_adapted_products(widths: tuple[int, int], result: str, both: Any) -> None:
    d_in, d_out = widths
    x, kernel, a, b, mask = draw(0, (2, 40, d_in), (d_in, d_out), (d_in, 6), (6, d_out), (d_out,))

    def run() -> Any:
        @jax.jit
        def value_and_gradients(*given: jax.Array) -> Any:
            numerics, weights = replace(CPU, result=result), jnp.abs(mask)
            y, back = jax.vjp(
                lambda x, a, b: adapted_dense(x, Dense(kernel, Adapter(a, b, 0.5, weights)), numerics).y,
                *given,
            )
            return y, back(jnp.sin(y))

        return value_and_gradients(x, a, b)

    close(*both(run))


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
def test_frozen_products(result: str, both: Any) -> None:
    x, kernel = draw(0, (2, 40, 64), (64, 96))

    def run() -> Any:
        @jax.jit
        def value_and_gradient(x: jax.Array) -> Any:
            y, back = jax.vjp(
                lambda x: matmul(x, kernel.astype(jnp.bfloat16), replace(CPU, result=result)), x
            )
            return y, back(jnp.sin(y))

        y, (dx,) = value_and_gradient(x)
        assert (y.dtype, dx.dtype) == (result, jnp.float32)
        return y, dx

    close(*both(run))


def in_stack(kernel: jax.Array) -> native.Slice:
    stack = jnp.stack([0 * kernel, kernel]).astype(jnp.bfloat16)
    return native.Slice(jax.lax.bitcast_convert_type(stack, jnp.uint16), jnp.asarray(1))


def test_layers_side_by_side_are_each_layer_alone(both: Any) -> None:
    """Of three: with an adapter and a mask, with an adapter, and with none; the last two read from a stack."""
    x, w1, w2, w3, a1, b1, a2, b2, mask = draw(
        5, (2, 40, 64), (64, 96), (64, 32), (64, 64), (64, 6), (6, 96), (64, 3), (3, 32), (96,)
    )
    numerics, mask = replace(CPU, result="bfloat16"), jnp.abs(mask)
    kernels = w1, in_stack(w2), in_stack(w3)

    def results(together: bool) -> Any:
        def ys(x: jax.Array, a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array) -> list[jax.Array]:
            parts = [
                Dense(kernels[0], Adapter(a1, b1, 0.5, mask)),
                Dense(kernels[1], Adapter(a2, b2, 2.0)),
                Dense(kernels[2]),
            ]
            if together:
                return [made.y for made in parallel_dense(x, parts, numerics)]
            return [adapted_dense(x, part, numerics).y for part in parts]

        @jax.jit
        def run(*given: jax.Array) -> Any:
            values, back = jax.vjp(ys, *given)
            return values, back([jnp.sin(y) for y in values])

        return run(x, a1, b1, a2, b2)

    with_kernels = jax.device_get(results(True))
    close(with_kernels, both(lambda: results(False))[1], share=2**-6)


def test_kernels_stay_in_their_stacks() -> None:
    params = init_params(BASE, jax.random.key(1), jnp.bfloat16)
    prepared = prepare({"params": params}, numerics_for("bfloat16", "cpu"))
    scanned, stacks = prepared["params"], prepared[STACKS]
    paths = {f"{path}/kernel" for path in projection_shapes(BASE)}
    assert {path.removesuffix("/bits") for path in trees.flatten(stacks)} == paths
    for path, leaf in trees.flatten(scanned).items():
        path = path.removesuffix("/bits")
        assert leaf.shape == ((BASE.n_layers,) if path in paths else trees.flatten(params)[path].shape)


def test_a_step_copies_no_kernel() -> None:
    text = lowered(CONFIG)
    for path, (d_in, d_out) in projection_shapes(BASE).items():
        assert f"tensor<{BASE.n_layers}x{d_in}x{d_out}xui16>" in text, path
        assert f"-> tensor<1x{d_in}x{d_out}xui16>" not in text, path


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_attention(softcap: float, both: Any) -> None:
    q, k, v = draw(1, (2, 70, 4, 16), (2, 70, 2, 16), (2, 70, 2, 16))
    positions = jnp.asarray(np.r_[np.arange(30), np.arange(40)][None])
    segments = jnp.asarray(np.r_[np.full(30, 1), np.full(40, 2)][None])
    config = AttentionConfig(0.25, softcap)

    def run() -> Any:
        @jax.jit
        def value_and_gradients(*given: jax.Array) -> Any:
            out, back = jax.vjp(
                lambda q, k, v: attention(q, Keys(k, v, positions, segments), 25, config, CPU), *given
            )
            return out, back(jnp.sin(out))

        return value_and_gradients(q, k, v)

    close(*both(run))


@pytest.mark.parametrize(
    ("compact", "transposed", "viewed"),  # every pair of two values
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_cross_entropy(compact: bool, transposed: bool, viewed: bool, both: Any) -> None:
    """Rows along the sequence are for meshes that split the batch, and stay XLA's."""
    (hidden,) = draw(2, (2, 30, 32))
    table = draw(3, (700, 32) if transposed else (32, 700))[0].astype(jnp.bfloat16)
    if viewed:
        part, name = ("embed", "embedding") if transposed else ("lm_head", "kernel")
        table = prepare({"params": {part: {name: table}}}, CPU)["params"][part][name]
    targets = np.random.default_rng(0).integers(0, 700, (2, 30), np.int32)
    weights = (np.random.default_rng(1).uniform(size=(2, 30)) < 0.6).astype(np.float32)
    head = Head(transposed, softcap=9.0, scale=0.3)

    def run() -> Any:
        loss = lambda h: cross_entropy(h, table, targets, weights, head, CPU, compact=compact)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(hidden), jax.jit(loss)(hidden)

    # XLA's own loss multiplies natively, too.
    close(*both(run))


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "quick_gelu", "gelu", "mish"])
def test_products_of_gates(name: str, both: Any) -> None:
    """The last two are no logistic functions, and stay XLA's."""
    z, u, g = (3 * x.astype(jnp.bfloat16) for x in draw(4, *[(3, 7, 33)] * 3))
    activation = activations.get(name)

    def run() -> Any:
        @jax.jit
        def value_and_gradients(*given: jax.Array) -> Any:
            out, back = jax.vjp(lambda z, u: gated_product(z, u, activation, CPU)[0], *given)
            return out, back(g)

        return value_and_gradients(z, u)

    with_kernels, without = both(run, expected=activation.logistic is not None)
    close(with_kernels, without)


BASE = ModelConfig.from_hf(tiny.GROUPED | {"num_hidden_layers": 3})
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", 4), LoRARule("attn/(q|v)_proj", 2))),
    mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=0.0, schedule="constant"),
    compute=ComputeConfig(dtype="bfloat16", probe_stride=1),
)


@functools.cache
@jax.jit
def initial() -> Any:
    """The small decoder's weights, matrices in bf16."""
    params = init_params(BASE, jax.random.key(1))
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)


def assembled(config: RunConfig) -> tuple[Any, Any, Any]:
    """A small decoder, its weights, and their mesh."""
    mesh = distributed.make_mesh(MeshConfig(), jax.devices()[:1])
    params = initial()
    params = jax.device_put(params, distributed.shardings(params, mesh, distributed.PARAM_RULES))
    return assemble(config, BASE, params, mesh), params, mesh


def batch_of(seed: int, mesh: Any) -> Any:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 96, (1, 8, 17)).astype(np.int32)
    batch = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "loss_weights": (rng.uniform(size=(1, 8, 16)) < 0.7).astype(np.float32),
        "segment_ids": np.ones((1, 8, 16), np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (1, 8, 16)),
    }
    return distributed.make_global_batch(batch, mesh, rows_axis=1)


def lowered(config: RunConfig) -> str:
    """The program of a step, as XLA gets it."""
    assembly, params, mesh = assembled(config)
    return assembly.step.lower(assembly.view(params), assembly.state, batch_of(0, mesh)).as_text()


def steps(config: RunConfig, count: int = 3) -> Any:
    """Adapters and losses after some steps of a small decoder, from adapters with B nonzero."""
    assembly, params, mesh = assembled(config)
    rng = np.random.default_rng(3)

    def shaken(path: str, x: jax.Array) -> jax.Array:
        return (
            jax.device_put((rng.normal(size=x.shape) * 0.2).astype(np.float32), x.sharding)
            if path.endswith("/b")
            else x
        )

    state, losses = assembly.state._replace(lora=trees.map_named(shaken, assembly.state.lora)), []
    for i in range(count):
        state, metrics = assembly.step(assembly.view(params), state, batch_of(i, mesh))
        losses.append(metrics["loss"])
    return jax.device_get((state.lora, losses))


@pytest.mark.parametrize("kernels", ENDS, indirect=True)
def test_three_steps_of_a_model_and_the_same_bits_twice(both: Any) -> None:
    assert numerics_for("bfloat16", "cpu").inner == "bfloat16"
    (lora, losses), (lora_xla, losses_xla) = both(lambda: steps(CONFIG))
    for one, again in zip(*map(jax.tree.leaves, ((lora, losses), steps(CONFIG))), strict=True):
        np.testing.assert_array_equal(one, again)
    np.testing.assert_allclose(losses, losses_xla, rtol=2e-3)
    start = steps(CONFIG, 0)[0]
    for path, moved in trees.flatten(jax.tree.map(np.subtract, lora, start)).items():
        want = trees.flatten(jax.tree.map(np.subtract, lora_xla, start))[path]
        # Masks choose channels by thresholds, which roundings may cross: in norm, not element by element.
        assert np.linalg.norm(moved - want) < 0.1 * np.linalg.norm(want), path


def test_rematerialisation_changes_roundings_at_most() -> None:
    """What is made again is made by the same kernels."""
    kept, *others = (
        steps(replace(CONFIG, compute=replace(CONFIG.compute, remat=remat)), 1)
        for remat in ("none", "dots")
    )
    for other in others:
        for one, same in zip(*map(jax.tree.leaves, (kept, other)), strict=True):
            np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ENDS, indirect=True)
def test_generated_text(kernels: str, both: Any) -> None:
    """Products of few rows, where they are native; the widest margins leave no tie."""
    rows = 1 if kernels == KINDS[0] else 5
    params = jax.tree.map(lambda x: 4 * x, initial())
    numerics = numerics_for("bfloat16", "cpu")
    prompts = np.random.default_rng(rows).integers(0, 96, (rows, 9)).tolist()
    words = tokenizers.models.WordLevel({str(i): i for i in range(96)}, unk_token="0")
    tokenizer = Tokenizer(tokenizers.Tokenizer(words), bos_id=None, eos_id=0, pad_id=0, eos_ids=(0,))

    def made() -> list[tuple[int, ...]]:
        jax.clear_caches()
        generator = Generator(Decoder(BASE, numerics=numerics), {"params": params}, tokenizer)
        return [tuple(text.ids) for text in generator.complete(prompts, max_new_tokens=6, stop_ids=())]

    with_kernels, without = both(made)
    assert with_kernels == without
    assert all(len(set(ids)) > 1 for ids in with_kernels)
