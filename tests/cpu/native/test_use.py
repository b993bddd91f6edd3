"""Where native kernels are called in a step, and that a step with them is a step by XLA, to the
rounding of bf16."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly.program import assemble
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from nalora_jax.cpu import attention, cross_entropy, matmul
from nalora_jax.cpu.matmul import Sum, Term, products
from nalora_jax.cpu.native import library
from nalora_jax.mesh import distributed, sharding
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.ops.storage import Bits
from tests import tiny
from tests.param_trees import init_params

pytestmark = pytest.mark.usefixtures("kernels")
BASE = ModelConfig.from_hf(tiny.GROUPED | {"num_hidden_layers": 2})
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", 4), LoRARule("attn/(q|v)_proj", 2))),
    mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=0.0, schedule="constant"),
    compute=ComputeConfig(dtype="bfloat16", probe_stride=1),
)


@functools.cache
def assembled(native: bool) -> tuple[Any, Any, Any]:
    """A small decoder's program, its weights, matrices in bf16, as the program reads them, and its
    batches."""
    mesh = distributed.make_mesh(MeshConfig(), jax.devices()[:1])
    params = init_params(BASE, jax.random.key(1))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    params = jax.device_put(params, sharding.shardings(params, mesh, sharding.PARAM_RULES))
    assembly = assemble(CONFIG, BASE, params, mesh)
    rows = [
        {name: x[None] for name, x in tiny.packed_batch(seed, 8, 16).items()} for seed in range(3)
    ]
    batches = [distributed.make_global_batch(batch, mesh, rows_axis=1) for batch in rows]
    return assembly, assembly.view(params), batches


def test_three_steps_copy_no_kernel_and_are_those_of_xla_and_the_same_bits_twice(monkeypatch):
    called, call = set(), library.call
    for module in (attention, cross_entropy, matmul):
        monkeypatch.setattr(
            module,
            "call",
            lambda name, *x, **options: called.add(name) or call(name, *x, **options),
        )
    assert numerics_for("bfloat16", "cpu").inner == "bfloat16"
    assembly, view, batches = assembled(True)
    text = assembly.step.lower(view, assembly.state, batches[0]).as_text()
    assert called == {"products", "attention", "attention_gradient", "over_vocabulary"}
    for path, (d_in, d_out) in projection_shapes(BASE).items():
        assert f"tensor<{BASE.n_layers}x{d_in}x{d_out}xui16>" in text, path
        assert f"-> tensor<1x{d_in}x{d_out}xui16>" not in text, path
    rng = np.random.default_rng(3)
    # B is nonzero.
    start = trees.map_named(
        lambda path, x: (
            np.float32(rng.normal(size=x.shape) * 0.2) if path.endswith("/b") else np.asarray(x)
        ),
        assembly.state.lora,
    )

    def steps(native: bool) -> tuple[Any, list[Any]]:
        """Adapters and losses after three steps."""
        assembly, view, batches = assembled(native)
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), start, assembly.state.lora
        )
        state = jax.tree.map(jnp.array, assembly.state._replace(lora=placed))  # the step donates it
        losses = []
        for batch in batches:
            state, metrics = assembly.step(view, state, batch)
            losses.append(metrics["loss"])
        return jax.device_get((state.lora, losses))

    lora, losses = steps(True)
    jax.tree.map(np.testing.assert_array_equal, (lora, losses), steps(True))
    called.clear()
    monkeypatch.setenv("NALORA_NATIVE", "0")
    jax.clear_caches()
    lora_xla, losses_xla = steps(False)
    assert not called
    np.testing.assert_allclose(losses, losses_xla, rtol=2e-3)
    for path, moved in trees.flatten(jax.tree.map(np.subtract, lora, start)).items():
        want = trees.flatten(jax.tree.map(np.subtract, lora_xla, start))[path]
        # Masks choose channels by thresholds, which roundings may cross: in norm, not element by
        # element.
        assert np.linalg.norm(moved - want) < 0.1 * np.linalg.norm(want), path


def test_runs_under_vmap_are_one_call_whose_results_equal_those_of_single_runs():
    """With kernels that the runs share, some in stacks, and with kernels of each run."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    kernel, stack = draw(48, 70), Bits(draw(3, 70, 48).view(jnp.uint16), jnp.int32(1))

    def sums(x: jax.Array, hidden: jax.Array, b: jax.Array) -> list[jax.Array]:
        return products(
            Sum([Term(x, kernel), Term(hidden, b)], "bfloat16"),
            Sum([Term(x, stack, True), Term(hidden, b.T, True)]),
            Sum([Term(x, kernel)]),
            Sum([Term(hidden.T, x)]),
        )

    of_runs = draw(5, 20, 48), draw(5, 20, 8), draw(5, 8, 70)
    together, alone = jax.jit(jax.vmap(sums)), jax.jit(sums)
    program = together.lower(*of_runs).as_text()
    assert program.count("stablehlo.custom_call @nalora") == 1
    assert "stablehlo.while" not in program
    singles = [alone(*(x[run] for x in of_runs)) for run in range(5)]
    jax.tree.map(
        np.testing.assert_array_equal,
        together(*of_runs),
        [jnp.stack(x) for x in zip(*singles, strict=True)],
    )
