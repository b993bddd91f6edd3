"""Plans of sweeps and studies: meshes, hours, and the program of many runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nalora_jax import distributed
from nalora_jax.config import MeshConfig, RunConfig, TrainConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.plan import sweep as sweeps
from nalora_jax.plan.figures import Figures, of_compiled
from nalora_jax.plan.machines import topology
from nalora_jax.plan.models import CONFIGS
from nalora_jax.plan.program import step_and_arguments
from nalora_jax.plan.roofline import Roofline
from nalora_jax.plan.sweep import SweepPlan, describe_study, describe_sweep, plan_study
from nalora_jax.study.protocol import read_protocol
from tests import tiny

LLAMA = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])
STUDY = Path(__file__).parents[2] / "studies" / "llama_8b_commonsense"


def _planned(config: RunConfig, base: Any, where: Any, seq: int, runs: int) -> SweepPlan:
    """A plan of one second a step, without a compiler."""
    bound = Roofline(1.0, 0.5, 0.0, 0.0, 1e12, 1e13)
    found = Figures(1e9, 1e9, 1e12, 1e9, {}, ())
    mesh = MeshConfig(data=1, fsdp=2, tensor=1, run=2, runs_per_device=2)
    return SweepPlan(config.model, where, runs, mesh, config.train.batch_size, seq, found, bound)


def test_meshes_go_from_the_smallest_groups_to_the_largest() -> None:
    config = RunConfig(train=TrainConfig(batch_size=4))
    meshes = list(sweeps._meshes(config, LLAMA, 16, 8))
    shapes = [(mesh.run, mesh.fsdp, mesh.tensor, mesh.runs_per_device) for mesh in meshes]
    assert shapes[:4] == [(8, 2, 1, 1), (4, 4, 1, 2), (4, 4, 1, 1), (2, 4, 2, 4)]
    assert shapes[-1] == (1, 4, 4, 1)


def test_hours_count_every_program_of_a_sweep() -> None:
    plan = _planned(RunConfig(), LLAMA, topology("v6e:2x2"), 128, runs=9)
    assert (plan.together, plan.programs) == (4, 3)
    assert plan.hours(1200) == pytest.approx(3 * 1200 * plan.bound.seconds / 3600)
    text = "\n".join(describe_sweep(plan, steps=1200, price=2.0))
    assert f"{plan.hours(1200) * 4 * 2:,.0f} at 2 a chip and hour" in text


def test_the_plan_of_a_study_has_its_tuning_and_its_test_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "plan_sweep", _planned)
    protocol = read_protocol(STUDY)
    plan = plan_study(protocol, LLAMA, topology("v6e:4x4"))
    assert len(plan.parts) == 10
    assert {part.runs for part in plan.parts.values()} == {8, 6}
    assert plan.hours == pytest.approx(
        10 * 2 * 1000 * plan.parts["commonsense lora tune"].bound.seconds / 3600
    )
    assert "in all at least" in "\n".join(describe_study(plan, price=2.7))


def test_the_planned_program_of_one_run_a_device_has_no_collective() -> None:
    base = replace(ModelConfig.from_hf(tiny.HF), n_layers=1)
    mesh = distributed.make_mesh(MeshConfig(run=8))
    config = RunConfig(
        steps=5,
        train=TrainConfig(batch_size=1),
        optimizer=replace(RunConfig().optimizer, learning_rate=1e-3),
    )
    step, arguments = step_and_arguments(config, base, mesh, seq=8, runs=8)
    assert of_compiled(step.lower(*arguments).compile()).collectives == ()
