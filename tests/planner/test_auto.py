"""Layouts of training runs, accepted by a compiled step and by the first step on (simulated)
devices."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import nalora_jax
from nalora_jax.config import MeshConfig
from nalora_jax.mesh import distributed
from nalora_jax.planner import choice
from nalora_jax.planner.figures import measure_compiled
from nalora_jax.planner.machines import CHIPS, Topology
from nalora_jax.train import run as run_module
from tests import tiny


class Chosen(Exception):
    """Ends a run after its first step."""


def test_too_little_memory_leads_to_the_next_layout_and_each_step_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The device has no memory for the first layout's weights, nor for the second's program."""
    where = Topology("eight simulated chips", CHIPS["v6e"], "v6e", (2, 4))
    meshes, large, built = [], iter([1e12]), run_module.build_placed

    def build(inputs: Any, placed: Any, *others: Any, **options: Any) -> Any:
        meshes.append(placed.mesh)
        if len(meshes) == 1:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"
            )
        return built(inputs, placed, *others, **options)

    def figures(program: Any) -> Any:
        return replace(measure_compiled(program), temporary=next(large, 0.0))

    def first_step(run: Any) -> None:
        assembly, batches = run.job.assembly, run.job.data.batches()
        batch = distributed.make_global_batch(next(batches), assembly.mesh, rows_axis=1)
        batches.close()
        assembly.step(assembly.view(assembly.params), assembly.state, batch)
        raise Chosen

    monkeypatch.setattr(choice, "describe_machine", lambda _: where)
    monkeypatch.setattr(run_module, "build_placed", build)
    monkeypatch.setattr(run_module, "evaluate_base", first_step)
    monkeypatch.setattr(choice, "measure_compiled", figures)
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path / "cache"))
    config = tiny.make_config(tmp_path, mesh=MeshConfig(), steps=1, mechanisms=())
    config = replace(config, compute=replace(config.compute, remat="dots"))
    with jax.log_compiles(), caplog.at_level(logging.INFO), pytest.raises(Chosen):
        nalora_jax.run(config)
    assert len(set(meshes)) == 3
    compiled = [
        text for text in caplog.messages if "Finished XLA compilation of jit(train_step)" in text
    ]
    assert len(compiled) == 2, caplog.messages  # training finds the accepted one compiled
    (line,) = [text for text in caplog.messages if "instead of" in text]
    assert "(out of memory); " in line
