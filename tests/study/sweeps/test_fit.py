"""The mesh of a sweep and the number of runs that train together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nalora_jax.config import MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.abstract_step import CONFIGS
from nalora_jax.planner.estimates import Layout
from nalora_jax.planner.machines import topology
from nalora_jax.study.sweeps import fit
from nalora_jax.study.sweeps.fit import Fitting

pytestmark = pytest.mark.usefixtures("memory")

BASE = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])
CONFIG = replace(
    RunConfig(train=TrainConfig(batch_size=4)), data=replace(RunConfig().data, max_length=256)
)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of 32 GB; the tests have eight."""
    monkeypatch.setattr(fit, "device_memory", lambda: 32e9)


def test_each_run_gets_the_fewest_devices_that_hold_the_base() -> None:
    fitting = Fitting.of(CONFIG, BASE, count=6)
    assert (fitting.layout.run, fitting.layout.fsdp) == (4, 2)  # 16 GB of weights on two devices
    assert fitting.layout.runs_per_device == 2
    assert (fitting.capacity, fitting.slots(6), fitting.next(6)) == (8, 8, 6)


def test_more_runs_than_fit_train_after_each_other_in_equal_parts() -> None:
    fitting = Fitting(
        Layout(1, 1, 1, "auto", "auto", run=4, runs_per_device=2), capacity=8, width=1
    )
    assert [fitting.next(left) for left in (20, 13, 6)] == [7, 7, 6]
    assert fitting.slots(7) == 8


def test_runs_of_mixtures_of_experts_get_one_device_each() -> None:
    """The other axes are open: two devices of each of four groups would compute one run."""
    experts = ModelConfig.from_hf(CONFIGS["mixtral-8x7b"])
    message = "--mesh.run: expected one device a run for mixtures.*on 8 devices.*use --mesh.run 8"
    with pytest.raises(NaloraError, match=message):
        Fitting.of(replace(CONFIG, mesh=MeshConfig(run=4)), experts, count=4)


def test_a_mesh_that_splits_rows_is_refused_in_a_sweep() -> None:
    message = "--mesh.context: expected 1 in a sweep, whose rows are whole, found 2"
    with pytest.raises(NaloraError, match=message):
        Fitting.of(replace(CONFIG, mesh=MeshConfig(context=2)), BASE, count=4)


def test_known_chips_get_the_layout_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "describe_machine", lambda _: topology("v6e:2x4"))
    fitting = Fitting.of(CONFIG, BASE, count=16)
    assert (fitting.layout.run, fitting.layout.runs_per_device, fitting.layout.remat) == (
        8,
        1,
        "dots",
    )
    few_tokens = replace(CONFIG, train=TrainConfig(batch_size=1))
    fitting = Fitting.of(few_tokens, BASE, count=16)
    assert (fitting.layout.run, fitting.layout.runs_per_device, fitting.capacity) == (8, 2, 16)
