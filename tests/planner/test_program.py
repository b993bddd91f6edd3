"""The collectives of a run's own training step, compiled for eight devices."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.mesh import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner import plan_report
from nalora_jax.planner.abstract_step import (
    moved_weights,
    rollout_and_arguments,
    step_and_arguments,
)
from nalora_jax.planner.figures import figures
from nalora_jax.planner.machines import topology
from nalora_jax.planner.plan_report import plain_lora_step
from tests import tiny

LAYERS, D, D_FF, VOCAB, RANK = 3, 64, 128, 1024, 4
ROWS = DataConfig(max_length=32)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
}
BASE = ModelConfig.from_hf(
    tiny.HF | SIZES | {"num_attention_heads": 4, "tie_word_embeddings": False}
)


def settings(mesh: MeshConfig, *, chunk: int = 16, quantize: str = "none", **changes) -> RunConfig:
    compute = ComputeConfig("float32", loss_chunk=chunk, remat="full", quantize=quantize)
    lora, train = LoRAConfig(rules=(LoRARule("ffn/", RANK),)), {"train": TrainConfig(batch_size=16)}
    return RunConfig(lora=lora, mesh=mesh, data=ROWS, compute=compute, **train | changes)


def compiled(tmp_path, mesh: MeshConfig, **changes):
    step, arguments = step_and_arguments(
        settings(mesh, **changes), BASE, distributed.make_mesh(mesh)
    )
    return figures(step, arguments, cache=tmp_path)


def test_the_head_is_gathered_once_a_step_and_quantized_kernels_as_codes(tmp_path):
    found = compiled(
        tmp_path, MeshConfig(1, 8, 1), chunk=8, quantize="nf4"
    )  # 8 chunks on each device
    head = [c for c in found.collectives if c.received == pytest.approx(VOCAB * D * 4 * 7 / 8)]
    assert head, "nothing as large as the head is gathered: what does the loss multiply by?"
    assert {c.times for c in head} == {1.0}
    # Whatever else stands in a loop is of one layer, not of the vocabulary.
    in_loops = [c for c in found.collectives if c.times > 1]
    assert max(c.received for c in in_loops) < VOCAB * D * 4 / 8
    assert {c.times for c in in_loops} == {float(LAYERS)}, [
        c for c in in_loops if c.times != LAYERS
    ]
    weights = (4 * D * D - 2 * D * D // 2 + 3 * D * D_FF) * 7 / 8
    gathered = sum(c.total for c in in_loops if c.kind == "all-gather") / LAYERS
    # Once forward and once backward, where the layer is made again from what has been gathered.
    assert 2 * 0.5 * weights <= gathered < 2 * 0.6 * weights


def test_replicated_weights_are_never_moved(tmp_path):
    found = compiled(tmp_path, MeshConfig(8, 1, 1), mechanisms=())
    assert {c.kind for c in found.collectives} == {"all-reduce"}
    assert found.moved() < LAYERS * (D * D_FF) * 4


def test_lora_is_the_same_step_without_what_measures_gates(tmp_path, monkeypatch):
    # Options of the compiler, as there are on TPUs and GPUs: those of a nested function are an
    # error.
    options = {"xla_cpu_enable_fast_min_max": False}
    monkeypatch.setattr(distributed, "compiler_options", lambda mesh: options)
    found = []
    for mechanisms in (("soft", "homogeneity"), ()):
        train = TrainConfig(batch_size=32, accumulate=2)
        config = settings(MeshConfig(2, 4, 1), chunk=0, train=train, mechanisms=mechanisms)
        mesh = distributed.make_mesh(config.mesh)
        step, arguments = step_and_arguments(config, BASE, mesh)
        step = step if mechanisms else plain_lora_step(step, mesh)
        found.append(figures(step, arguments, cache=tmp_path))
    ours, plain = found
    assert plain.flops < ours.flops
    # In the loops over layers nothing is reduced for the statistics.
    reduced = [
        {
            kind: sum(c.total for c in one.collectives if c.kind == kind and c.times >= LAYERS)
            for kind in ("all-reduce", "reduce-scatter")
        }
        for one in found
    ]
    assert reduced[0] == pytest.approx(reduced[1])
    # Once behind them slope and three of four occupancies are, besides a layer's figures for the
    # log.
    once = [sum(c.total for c in one.collectives if c.times < LAYERS) for one in found]
    assert 1.5 < (once[0] - once[1]) / (LAYERS * 4 * D_FF * 4) < 2.5


def test_update_and_rollout_read_the_weights_in_the_same_places(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_report, "devices", lambda _: jax.devices())
    mesh = MeshConfig(2, 2, 2)
    config = settings(
        mesh, rl=RLConfig(rewards=("number",), samples=8, max_new_tokens=12), mechanisms=()
    )
    devices = distributed.make_mesh(mesh)
    step, arguments = step_and_arguments(config, BASE, devices)
    update = figures(step, arguments, cache=tmp_path)
    rollout = plan_report._plan_rollout(config, BASE, topology("v6e:2x4"), update, arguments)
    assert rollout.moved == 0
    assert rollout.resident > 0
    _, drawn, _ = rollout_and_arguments(config, BASE, devices)
    assert drawn[1].tokens.shape == (
        4,
        24,
    )  # two prompts, each on two shards, which draw four samples each
    head = 2.0 * 4 * D * VOCAB / 2  # flops of the logits of a shard's samples
    assert rollout.figures.flops > 12 * head  # the loop counts as often as the limit says
    elsewhere = replace(rollout.figures, inputs=("PartitionSpec()",) * len(rollout.figures.inputs))
    assert moved_weights(update, arguments, elsewhere, drawn) > 4 * D * VOCAB
