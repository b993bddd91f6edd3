"""Plans of sweeps: meshes, hours, and the program of many runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nalora_jax.cli.planning.models import CONFIGS
from nalora_jax.cli.planning.program import step_and_arguments
from nalora_jax.cli.planning.sweep import (
    SweepPlan,
    describe_sweep,
    estimate_sweep,
)
from nalora_jax.config import MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.figures import of_compiled
from nalora_jax.layout.layouts import preferred
from nalora_jax.layout.machines import topology
from nalora_jax.layout.sweep_layouts import fitting_sweep, meshes
from nalora_jax.models.config import ModelConfig
from tests import tiny

LLAMA = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])


def _planned(config: RunConfig, base: Any, where: Any, seq: int, runs: int) -> SweepPlan:
    """A plan of one second a step, without a compiler."""
    mesh = MeshConfig(data=1, fsdp=2, tensor=1, run=2, runs_per_device=2)
    rows = config.train.batch_size
    return SweepPlan(config.model, where, runs, mesh, "full", rows, seq, 1e9, 1.0, 0.1, ())


def test_meshes_go_from_the_smallest_groups_to_the_largest() -> None:
    config = RunConfig(train=TrainConfig(batch_size=4))
    found = list(meshes(config, LLAMA, 16, 8))
    shapes = [(mesh.run, mesh.fsdp, mesh.tensor, mesh.runs_per_device) for mesh in found]
    assert shapes[:4] == [(8, 2, 1, 1), (4, 4, 1, 2), (4, 4, 1, 1), (2, 4, 2, 4)]
    assert shapes[-1] == (1, 4, 4, 1)


def fastest(
    config: RunConfig, base: ModelConfig, machine: str, seq: int, runs: int
) -> tuple[str, MeshConfig]:
    """The policy and the mesh of the fastest layout by estimates."""
    layouts = fitting_sweep(config, base, topology(machine), seq, runs)
    layout = preferred(list(layouts))
    return layout.remat, layouts[layout]


def test_every_run_has_a_device_and_saves_as_much_as_fits() -> None:
    config = RunConfig(train=TrainConfig(batch_size=1))
    remat, mesh = fastest(config, LLAMA, "v6e:16x16", 4096, runs=256)
    assert (remat, mesh.run, mesh.runs_per_device) == ("dots", 256, 1)
    remat, mesh = fastest(config, LLAMA, "v6e:16x16", 8192, runs=256)
    assert (remat, mesh.run) == ("attention", 256)
    asked = replace(config, compute=replace(config.compute, remat="full"))
    assert fastest(asked, LLAMA, "v6e:16x16", 4096, runs=256)[0] == "full"


def test_experts_get_one_device_a_run_or_all_of_them() -> None:
    mixtral = ModelConfig.from_hf(CONFIGS["mixtral-8x7b"])
    config = RunConfig(train=TrainConfig(batch_size=8))
    groups = {mesh.run for mesh in meshes(config, mixtral, 8, 8)}
    assert groups == {1, 8}


def test_a_run_stays_within_a_slice() -> None:
    config = RunConfig(train=TrainConfig(batch_size=8))
    assert {mesh.run for mesh in meshes(config, LLAMA, 8, 8, slices=2)} == {8, 4, 2}


def test_a_sweep_that_fits_in_no_layout_is_refused_with_the_smallest() -> None:
    config = RunConfig(train=TrainConfig(batch_size=1), mesh=MeshConfig(run=4, runs_per_device=1))
    with pytest.raises(
        NaloraError, match=r"--sweep: expected runs that fit in 16\.40 GB a chip, found 1\d\.\d\d GB"
    ):
        fitting_sweep(config, LLAMA, topology("v5e:2x2"), 4096, 4)


def test_groups_that_cannot_share_a_run_are_refused() -> None:
    config = RunConfig(train=TrainConfig(batch_size=1), mesh=MeshConfig(run=1))
    with pytest.raises(NaloraError, match="--mesh.run: expected groups of devices that can share"):
        fitting_sweep(config, LLAMA, topology("v6e:4x4"), 128, 4)


def test_a_sweep_is_estimated_without_a_compiler() -> None:
    config = RunConfig(train=TrainConfig(batch_size=1))
    plan = estimate_sweep(config, LLAMA, topology("v6e:16x16"), 4096, 512)
    assert (plan.programs, plan.remat, plan.collectives) == (2, "dots", None)
    # Compiled with the TPU's compiler: 0.207 s and 71.8% for a program.
    assert (plan.seconds, plan.mfu) == pytest.approx((0.207, 0.718), rel=0.05)
    assert "by estimates, not compiled" in "\n".join(describe_sweep(plan))


def test_hours_count_every_program_of_a_sweep() -> None:
    plan = _planned(RunConfig(), LLAMA, topology("v6e:2x2"), 128, runs=9)
    assert (plan.together, plan.programs) == (4, 3)
    assert plan.hours(1200) == pytest.approx(3 * 1200 * plan.seconds / 3600)
    text = "\n".join(describe_sweep(plan, steps=1200, price=2.0))
    assert f"{plan.hours(1200) * 4 * 2:,.2f} at 2 a chip and hour" in text


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
