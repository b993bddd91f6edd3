"""Layouts of training runs, accepted by a compiled step and by the first step on (simulated) devices."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.cli.planning import auto
from nalora_jax.cli.planning.auto import accepted
from nalora_jax.cli.planning.program import architecture
from nalora_jax.config import ComputeConfig, DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.figures import of_compiled
from nalora_jax.layout.machines import CHIPS, Topology
from tests import tiny

nalora_run = importlib.import_module("nalora_jax.cli.training")
V6E = Topology("eight simulated chips", CHIPS["v6e"], "v6e", (2, 4))
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"


@dataclass(frozen=True)
class State:
    lora: Any


jax.tree_util.register_dataclass(State, data_fields=["lora"], meta_fields=[])


@dataclass(frozen=True)
class Assembly:
    """As much of `nalora_jax.train.program.Assembly` as the search for a layout needs."""

    mesh: Any
    step: Any
    state: State
    params: Any

    def view(self, params: Any) -> Any:
        return params

    def begin(self, lora: Any, seed: int) -> State:
        return State(jax.device_put(lora, NamedSharding(self.mesh, P())))


@dataclass(frozen=True)
class Data:
    closed: list[bool]

    def batches(self) -> Any:
        yield {"tokens": np.ones((1, 8, 4), np.float32)}
        self.closed.append(True)


@dataclass(frozen=True)
class Pieces:
    assembly: Assembly
    data: Data
    config: RunConfig


class Builder:
    """Builds pieces whose step adds up a batch; ``fails`` decides by the mesh whether and where memory is short."""

    def __init__(self, fails: dict[MeshConfig, str]) -> None:
        self.fails, self.meshes = fails, []

    def __call__(self, config: RunConfig) -> Any:
        self.meshes.append(config.mesh)
        where = self.fails.get(config.mesh, "")
        if where == "weights":
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        mesh = distributed.make_mesh(config.mesh)
        step = jax.jit(
            lambda params, state, batch: (State(state.lora + batch["tokens"].sum()), {}), donate_argnums=1
        )
        state = State(jax.device_put(jnp.arange(3.0), NamedSharding(mesh, P())))
        return Pieces(
            Assembly(mesh, _Short(step) if where == "step" else step, state, ()), Data([]), config
        )


class _Short:
    """A step for which the device has no memory."""

    def __init__(self, step: Any) -> None:
        self.lower = step.lower

    def __call__(self, *_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(EXHAUSTED)


@pytest.fixture
def on_chips(monkeypatch):
    monkeypatch.setattr(auto, "of_devices", lambda _: V6E)


CONFIG = RunConfig(
    train=TrainConfig(batch_size=8), data=DataConfig(max_length=512), compute=ComputeConfig(remat="dots")
)
BASE = architecture("llama-3.1-8b")


@pytest.mark.parametrize("where", ["weights", "step"])
def test_too_little_memory_on_the_device_leads_to_the_next_layout(on_chips, caplog, where):
    builder = Builder({MeshConfig(8, 1, 1): where})
    with caplog.at_level(logging.INFO, logger="nalora_jax.layout"):
        pieces: Any = accepted(CONFIG, BASE, builder)
    assert len(builder.meshes) == 2
    assert pieces.config.mesh == builder.meshes[1] != MeshConfig(8, 1, 1)
    np.testing.assert_array_equal(pieces.assembly.state.lora, [0, 1, 2])
    assert "instead of data 8 x fsdp 1 x tensor 1, remat dots (out of memory)" in caplog.text


def test_a_run_compiles_its_step_once_for_each_layout_that_is_tried(
    on_chips, monkeypatch, tmp_path: Path, caplog
):
    """Training finds the accepted one compiled."""
    large = iter([1e12])
    monkeypatch.setattr(
        auto, "of_compiled", lambda program: replace(of_compiled(program), temporary=next(large, 0.0))
    )
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path / "cache"))
    config = tiny.make_config(tmp_path, mesh=MeshConfig(), steps=1)
    config = replace(config, compute=replace(config.compute, remat="dots"))
    with jax.log_compiles(), caplog.at_level(logging.INFO):
        nalora_run.run(config)
    compiled = [
        text for text in caplog.messages if text.startswith("Finished XLA compilation of jit(train_step)")
    ]
    assert len(compiled) == 2, caplog.messages
    assert sum("instead of" in text for text in caplog.messages) == 1
