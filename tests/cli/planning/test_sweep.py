"""Plans of sweeps: meshes, hours, and the program of many runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nalora_jax.cli.planning.program import CONFIGS, step_and_arguments
from nalora_jax.cli.planning.report import SweepPlan, describe_sweep, plan_sweep
from nalora_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.estimates import Layout
from nalora_jax.layout.figures import of_compiled
from nalora_jax.layout.machines import topology
from nalora_jax.models.config import ModelConfig
from tests import tiny

LLAMA = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])


def run(rows: int, seq: int, **options: Any) -> RunConfig:
    return RunConfig(train=TrainConfig(batch_size=rows), data=DataConfig(max_length=seq), **options)


def test_a_sweep_is_estimated_without_a_compiler() -> None:
    plan = plan_sweep(run(1, 4096), LLAMA, topology("v6e:16x16"), 512, compiles=False)
    assert (plan.programs, plan.layout.remat, plan.collectives) == (2, "dots", None)
    # Compiled with the TPU's compiler: 0.207 s and 71.8% for a program.
    assert (plan.seconds, plan.mfu) == pytest.approx((0.207, 0.718), rel=0.05)
    text = "\n".join(describe_sweep(plan))
    assert (
        "  mesh        run 256 x fsdp 1 x tensor 1, 1 a group, remat dots; 2 program(s) after each other"
        in text
    )
    assert "by estimates, not compiled" in text


def test_hours_count_every_program_of_a_sweep() -> None:
    layout = Layout(1, 2, 1, "full", "auto", run=2, runs_per_device=2)
    plan = SweepPlan(run(1, 128), topology("v6e:2x2"), 9, layout, 1e9, 1.0, 0.1, ())
    assert (layout.together, plan.programs) == (4, 3)
    text = "\n".join(describe_sweep(plan, steps=1200, price=2.0))
    assert f"{3 * 1200 * plan.seconds / 3600 * 4 * 2:,.2f} at 2 a chip and hour" in text


def test_the_planned_program_of_one_run_a_device_has_no_collective() -> None:
    base = replace(ModelConfig.from_hf(tiny.HF), n_layers=1)
    mesh = distributed.make_mesh(MeshConfig(run=8))
    config = run(1, 8, steps=5, optimizer=OptimizerConfig(learning_rate=1e-3))
    step, arguments = step_and_arguments(config, base, mesh, runs=8)
    assert of_compiled(step.lower(*arguments).compile()).collectives == ()
