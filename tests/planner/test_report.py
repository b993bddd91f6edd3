"""What ``nalora plan`` says of a compiled program and of a sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nalora_jax.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.mesh import distributed
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.abstract_step import architecture, step_and_arguments
from nalora_jax.planner.accounting import Transfer
from nalora_jax.planner.estimates import Layout, estimate
from nalora_jax.planner.figures import Figures, measure_compiled, roofline
from nalora_jax.planner.machines import topology
from nalora_jax.planner.plan_report import (
    Plan,
    RolloutPlan,
    SweepPlan,
    describe_sweep,
    plan_lines,
    plan_sweep,
)
from tests import tiny


def run(rows: int, seq: int, **options: Any) -> RunConfig:
    return RunConfig(train=TrainConfig(batch_size=rows), data=DataConfig(max_length=seq), **options)


def planned(kernels: dict[str, float], **more: Any) -> Plan:
    base, machine = architecture("llama-3.1-8b"), topology("v6e:16x16")
    config = run(256, 4096, mesh=MeshConfig(256, 1, 1))
    layout = Layout(256, 1, 1, "dots", "gather")
    layout = estimate(layout, config, base, adapter_spec(config, base), machine)
    found = Figures(16e9, 12e9, 1e14, 1e11, kernels, (), **more)
    bound = roofline(found, config, base, machine)
    return Plan(config, machine, layout, found, found, bound)


def test_what_waits_in_the_host_s_memory_has_a_roofline_of_its_own():
    moved = (Transfer(True, 1e9, 32.0, True), Transfer(False, 1e9, 32.0, False))
    plan = planned({}, host=32e9, transfers=moved)
    lines = [line for line in plan_lines(plan) if line.startswith("  host")]
    assert lines == [
        "  host        32.00 GB a chip of 180 (32.00 GB out and 32.00 back a step)",
        "  host link   1000 ms overlapped with matmuls, 1000 ms not, at 32 GB/s (jax-ml.github.io/scaling-book/tpus)",
    ]
    assert plan.bound.seconds == 1.0 + 1.0
    assert plan.fits
    assert not planned({}, host=200e9, transfers=moved).fits
    assert not [line for line in plan_lines(planned({})) if line.startswith("  host")]


def test_a_plan_with_rewards_has_update_and_rollout():
    update = planned({})
    rl = RLConfig(rewards=("number",), samples=16, max_new_tokens=1024)
    rollout = RolloutPlan(update.nalora, update.bound, 2, 1e9, 0.0)
    plan = replace(update, config=replace(update.config, rl=rl), rollout=rollout)
    assert plan.seconds == 3 * update.seconds
    assert plan.fits
    assert not replace(plan, rollout=replace(rollout, resident=10e9)).fits
    text = "\n".join(plan_lines(plan))
    assert "for 16 prompts x 16 samples x 1,024 tokens, 2 program(s) after each other" in text
    assert "29.00 GB a chip of 33.6" in text
    assert "between     0 bytes of weights moved" in text
    assert plan.to_dict()["rollout"]["seconds"] == rollout.seconds


def test_a_sweep_is_estimated_without_a_compiler() -> None:
    plan = plan_sweep(
        run(1, 4096), architecture("llama-3.1-8b"), topology("v6e:16x16"), 512, compiles=False
    )
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
    assert measure_compiled(step.lower(*arguments).compile()).collectives == ()
