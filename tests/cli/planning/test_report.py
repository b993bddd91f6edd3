"""What ``nalora plan`` says of a compiled program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.cli.planning.program import architecture
from nalora_jax.cli.planning.report import Plan, RolloutPlan, plan_lines
from nalora_jax.config import DataConfig, MeshConfig, RLConfig, RunConfig, TrainConfig
from nalora_jax.layout.accounting import Transfer
from nalora_jax.layout.estimates import Layout, estimate
from nalora_jax.layout.figures import Figures, roofline
from nalora_jax.layout.machines import topology
from nalora_jax.models.adapters import adapter_spec

ROWS = DataConfig(max_length=4096)


def planned(kernels: dict[str, float], **more: Any) -> Plan:
    base, machine = architecture("llama-3.1-8b"), topology("v6e:16x16")
    config = RunConfig(train=TrainConfig(batch_size=256), data=ROWS, mesh=MeshConfig(256, 1, 1))
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
        "  host link   1000 ms behind products, 1000 ms not, at 32 GB/s (jax-ml.github.io/scaling-book/tpus)",
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
