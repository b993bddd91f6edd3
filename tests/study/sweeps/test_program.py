"""The step of several runs against the steps of the same runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.assembly.start import start_from
from nalora_jax.common import trees
from nalora_jax.config import (
    AdaLoRAConfig,
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.kinds.record import run_kind
from nalora_jax.mesh import distributed, sharding
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.accounting import Program
from nalora_jax.study.sweeps.stacked_program import SweepProgram, batch_of
from nalora_jax.study.sweeps.values import program_key
from tests import tiny
from tests.param_trees import init_params

BASE = ModelConfig.from_hf(tiny.GROUPED)
CONFIG = RunConfig(
    steps=20,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", 4), LoRARule("attn/(q|v)_proj", 2))),
    mechanisms=("soft:warmup=1,power=2,permute=3", "curvature_cap:warmup=1"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    compute=ComputeConfig(dtype="float32", probe_stride=1, implementation="xla"),
)
ROWS, SEQ = 4, 16


def _batch(seed: int) -> dict[str, np.ndarray]:
    return {name: value[None] for name, value in tiny.packed_batch(seed, ROWS, SEQ).items()}


def _assembled(
    configs: Sequence[RunConfig], base: ModelConfig = BASE, mesh: Any = None
) -> list[Assembly]:
    mesh = mesh or tiny.one_device()
    params = init_params(base, jax.random.key(1))
    params = jax.device_put(params, sharding.shardings(params, mesh, sharding.PARAM_RULES))
    return [
        assemble(config, base, params, mesh, **run_kind(config).parts(config)) for config in configs
    ]


def _solo(run: Assembly, steps: int, batches: Any = None) -> Any:
    """The adapters and the last metrics of a run's steps, alone; donates its state."""
    state, params, batches = run.state, run.view(run.params), batches or _batch
    for i in range(steps):
        batch = distributed.make_global_batch(
            batches(100 * run.config.seed + i), run.mesh, rows_axis=1
        )
        state, metrics = run.step(params, state, batch)
    return jax.device_get(state.lora), jax.device_get(metrics)


def _together(
    runs: Sequence[Assembly], steps: int, batches: Any = None
) -> tuple[SweepProgram, Any]:
    """The states and the last metrics of all runs after some steps of one program."""
    program, batches = SweepProgram(runs), batches or _batch
    states = program.begin([run.state for run in runs])
    for i in range(steps):
        batch = batch_of([batches(100 * run.config.seed + i) for run in runs], program.mesh)
        states, metrics = program.step(states, batch, [True] * len(runs))
    return program, (states, jax.device_get(metrics))


def _difference(one: Any, other: Any) -> float:
    """The largest difference of any array, over that array's largest value."""
    ratios = jax.tree.map(lambda x, y: np.max(np.abs(x - y)) / np.max(np.abs(y)), one, other)
    return float(max(jax.tree.leaves(ratios)))


def _started(run: Assembly) -> Assembly:
    """The run with random initial adapters of its own, which lower its kernels, as LoRA-GA's do."""
    rng = np.random.default_rng(run.config.seed)
    start = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype), run.state.lora
    )
    return start_from(run, start)


def test_runs_of_one_program_equal_their_solo_runs() -> None:
    """They differ in all that may differ: rates, schedule, decay, betas, clip, seed, alpha, rank,
    rules, kernels."""
    rules = (LoRARule("ffn/(gate|up|down)_proj", 2, 5.0), LoRARule("attn/(q|v)_proj", 2))
    numbers = {"weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "clip_norm": 0.3, "warmup_steps": 4}
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="linear", **numbers)
    mechanisms = "soft:warmup=3,power=1.5,decay=0.9", "curvature_cap:warmup=2,tau=0.05"
    changes = {"lora": LoRAConfig(rules=rules), "mechanisms": mechanisms, "optimizer": optimizer}
    changes |= {"train": TrainConfig(log_every=3, patience=2), "output": "runs/other"}
    runs = [
        _started(run) for run in _assembled([CONFIG, replace(CONFIG, seed=1, steps=30, **changes)])
    ]
    assert len({program_key(run.config, run.spec) for run in runs}) == 1
    program, (states, metrics) = _together(runs, 20)
    lora, alone = _solo(runs[1], 20)
    state = program.state_of(states, 1)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, runs[1].state)
    assert _difference(jax.device_get(state.lora), lora) < 1e-4
    assert metrics["loss"][1] == pytest.approx(float(alone["loss"]), rel=1e-4)
    padding = trees.flatten(jax.device_get(states.lora))["layers/ffn/gate_proj/a"][1, :, :, 2:]
    assert np.all(padding == 0)
    assert program._spec.target("layers/ffn/gate_proj").rank == 4


# SGD: Adam's first updates divide rounding errors by gradients of the same size.
FOUR = [
    replace(
        CONFIG,
        seed=seed,
        steps=4,
        optimizer=OptimizerConfig("sgd", 0.1 * (seed + 1), clip_norm=0.0),
    )
    for seed in range(4)
]


def test_runs_on_a_mesh_equal_those_on_one_device() -> None:
    """Collectives of the step join the two devices of a run, never devices of two runs."""
    program, (states, _) = _together(_assembled(FOUR), 2)
    on_one_device = [jax.device_get(program.state_of(states, index).lora) for index in range(4)]
    mesh = distributed.make_mesh(MeshConfig(run=4, data=1, fsdp=2, tensor=1))
    program, (states, _) = _together(_assembled(FOUR, mesh=mesh), 2)
    for index, lora in enumerate(on_one_device):
        assert _difference(jax.device_get(program.state_of(states, index).lora), lora) < 1e-4
    batch = batch_of([_batch(index) for index in range(4)], mesh)
    collectives = Program(program.lower(states, batch).compile().as_text()).collectives
    assert max(collective.devices for collective in collectives) == 2


def _variant(seed: int, rank: int = 2, **changes: Any) -> RunConfig:
    """A run of three steps whose rate depends on its seed."""
    lora = LoRAConfig(rules=(LoRARule("ffn", rank), LoRARule("q_proj", 2)))
    optimizer = OptimizerConfig("sgd", 0.1 * (seed + 1), clip_norm=0.0)
    return replace(
        CONFIG, **{"seed": seed, "steps": 3, "lora": lora, "optimizer": optimizer} | changes
    )


def test_experts_of_several_runs_are_one_grouped_matmul() -> None:
    """Runs of a mixture of experts with different ranks."""
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "tie_word_embeddings": False}
    base = ModelConfig.from_hf(tiny.GROUPED | experts | sizes)
    _assert_like_solo(_assembled([_variant(0, 2), _variant(1, 4)], base))


def _assert_like_solo(runs: Sequence[Assembly], batches: Any = None) -> None:
    """Compares the last run of a program with its solo run; all of them share the code of the
    step."""
    program, (states, metrics) = _together(runs, 3, batches)
    lora, alone = _solo(runs[-1], 3, batches)
    assert _difference(jax.device_get(program.state_of(states, len(runs) - 1).lora), lora) < 1e-4
    assert metrics["loss"][-1] == pytest.approx(float(alone["loss"]), rel=1e-4)


def test_runs_of_preference_pairs_with_magnitudes_and_zero_a_equal_their_solo_runs() -> None:
    lora = LoRAConfig(rules=(LoRARule("ffn", 2),), dora=True, init="zero_a", plus_ratio=2.0)
    settings = {"lora": lora, "preference": PreferenceConfig("dpo"), "mechanisms": ("hard",)}
    configs = [
        _variant(0, **settings),
        _variant(1, **settings | {"lora": replace(lora, plus_ratio=3.0)}),
    ]
    _assert_like_solo(
        _assembled(configs),
        lambda seed: _batch(seed) | {"pairs": np.ones((1, ROWS, 1), np.float32)},
    )


def test_adalora_allocates_each_runs_ranks_as_in_its_solo_run() -> None:
    adalora = AdaLoRAConfig(target_rank=1, warmup_share=0.0, final_share=0.3, interval=1)
    settings: dict[str, Any] = {"adalora": adalora, "mechanisms": ()}
    lora = LoRAConfig(rules=(LoRARule("ffn/gate_proj", 2),), dropout=0.1)
    rates = [OptimizerConfig(learning_rate=rate, warmup_share=0.0) for rate in (1e-2, 2e-2)]
    configs = [_variant(seed, lora=lora, optimizer=rates[seed], **settings) for seed in range(2)]
    _assert_like_solo(_assembled(configs))
