"""Where native kernels are called in a step, and that a step with them is a step by XLA, to the rounding of bf16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common import trees
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, MeshConfig, OptimizerConfig, RunConfig
from nalora_jax.cpu import native
from nalora_jax.layout import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.ops.storage import STACKS, prepare
from nalora_jax.train.program import assemble
from tests import tiny
from tests.cpu.native.conftest import ENDS
from tests.param_trees import init_params

pytestmark = pytest.mark.usefixtures("kernels")
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
    batch = {name: x[None] for name, x in tiny.packed_batch(seed, 8, 16).items()}
    return distributed.make_global_batch(batch, mesh, rows_axis=1)


def test_kernels_stay_in_their_stacks():
    params = init_params(BASE, jax.random.key(1), jnp.bfloat16)
    prepared = prepare({"params": params}, numerics_for("bfloat16", "cpu"))
    scanned, stacks = prepared["params"], prepared[STACKS]
    paths = {f"{path}/kernel" for path in projection_shapes(BASE)}
    assert {path.removesuffix("/bits") for path in trees.flatten(stacks)} == paths
    for path, leaf in trees.flatten(scanned).items():
        path = path.removesuffix("/bits")
        assert leaf.shape == ((BASE.n_layers,) if path in paths else trees.flatten(params)[path].shape)


def test_a_step_copies_no_kernel():
    assembly, params, mesh = assembled(CONFIG)
    program = assembly.step.lower(assembly.view(params), assembly.state, batch_of(0, mesh))
    text = program.as_text()
    for path, (d_in, d_out) in projection_shapes(BASE).items():
        assert f"tensor<{BASE.n_layers}x{d_in}x{d_out}xui16>" in text, path
        assert f"-> tensor<1x{d_in}x{d_out}xui16>" not in text, path


def steps(count: int = 3) -> Any:
    """Adapters and losses after some steps of a small decoder, from adapters with B nonzero."""
    assembly, params, mesh = assembled(CONFIG)
    rng = np.random.default_rng(3)

    def shaken(path: str, x: jax.Array) -> jax.Array:
        drawn = (rng.normal(size=x.shape) * 0.2).astype(np.float32)
        return jax.device_put(drawn, x.sharding) if path.endswith("/b") else x

    state, losses = assembly.state._replace(lora=trees.map_named(shaken, assembly.state.lora)), []
    for i in range(count):
        state, metrics = assembly.step(assembly.view(params), state, batch_of(i, mesh))
        losses.append(metrics["loss"])
    return jax.device_get((state.lora, losses))


@pytest.mark.parametrize("kernels", ENDS, indirect=True)
def test_three_steps_of_a_model_and_the_same_bits_twice(kernels, monkeypatch):
    called, call = set(), native.call
    monkeypatch.setattr(
        native, "call", lambda name, *x, **options: called.add(name) or call(name, *x, **options)
    )
    assert numerics_for("bfloat16", "cpu").inner == "bfloat16"
    start, (lora, losses) = steps(0)[0], steps()
    gradients = {"attention_gradient", "gate_gradient"}
    assert called == {"products", "attention", "gate", "over_vocabulary"} | gradients
    for one, again in zip(*map(jax.tree.leaves, ((lora, losses), steps())), strict=True):
        np.testing.assert_array_equal(one, again)
    called.clear()
    monkeypatch.setenv("NALORA_NATIVE", "0")
    jax.clear_caches()
    lora_xla, losses_xla = steps()
    assert not called
    np.testing.assert_allclose(losses, losses_xla, rtol=2e-3)
    for path, moved in trees.flatten(jax.tree.map(np.subtract, lora, start)).items():
        want = trees.flatten(jax.tree.map(np.subtract, lora_xla, start))[path]
        # Masks choose channels by thresholds, which roundings may cross: in norm, not element by element.
        assert np.linalg.norm(moved - want) < 0.1 * np.linalg.norm(want), path
