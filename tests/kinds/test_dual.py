"""A training step of a dual encoder on one device and eight, and its losses against torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    DebugConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from nalora_jax.kinds import dual
from nalora_jax.kinds.dual import sigmoid_contrastive, softmax_contrastive
from nalora_jax.kinds.record import Job
from nalora_jax.mesh import distributed, processes
from nalora_jax.train.run import build_placed
from tests import tiny
from tests.vision import COLOURS


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of each colour, with captions."""
    return tiny.make_pictures(tmp_path_factory.mktemp("colours"), COLOURS, count=20, size=(18, 20))


def config(model: Path, data: Path, target: str, vision: VisionConfig) -> RunConfig:
    splits = {"train_split": "train[:60%]", "eval_split": "train[60%:]", "eval_limit": 20}
    return RunConfig(
        model=str(model),
        steps=8,
        data=DataConfig(str(data), workers=0, select_limit=8, **splits),
        train=TrainConfig(batch_size=8),
        compute=ComputeConfig("float32", stats_stride=1, probe_stride=1),
        vision=vision,
        lora=LoRAConfig(rules=(LoRARule(target, 2),)),
        mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
        mesh=MeshConfig(data=1),
    )


def steps(settings: RunConfig, mesh: Mesh, count: int) -> tuple[Job, Any, list[float]]:
    """A run, its state after some steps, and their losses; the last step takes the first batch
    again."""
    nowhere: Any = None  # the folder is not read
    job = build_placed(dual.open_inputs(settings, None), settings, mesh, nowhere)
    state, params, losses = job.assembly.state, job.assembly.view(job.assembly.params), []
    source = job.data.batches()
    batches = [distributed.make_global_batch(next(source), mesh, rows_axis=1) for _ in range(count)]
    source.close()
    for batch in [*batches, batches[0]]:
        state, metrics = job.assembly.step(params, state, batch)
        losses.append(float(metrics["loss"]))
    return job, state, losses


def test_a_frozen_text_tower_is_encoded_once_and_gives_the_loss_of_an_adapted_one(
    dual_folder, colours
):
    """With adapters on images only, class features are constants of the step: its program has no
    text tower.

    Before any step an adapter changes nothing, so the loss must not depend on who encodes the
    prompts.
    """
    folder, losses = dual_folder("clip", vision={"num_hidden_layers": 3}), []
    vision = VisionConfig(
        "classify", shots=4, augment="none", templates=("a photo of a {}.", "the {} square")
    )
    for tower, inputs in (("image", {"features"}), ("text", {"tokens", "token_weights"})):
        settings = config(folder, colours, f"{tower}/.*ffn", vision)
        job, _, measured = steps(settings, tiny.one_device(), 1)
        assert set(job.assembly.params["classes"]) == inputs
        losses.append(measured[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_both_towers_learn_with_the_mechanisms_on_and_eight_devices_are_one(
    dual_folder, colours
) -> None:
    vision = VisionConfig(
        "contrast", shots=4, augment="none", loss="sigmoid"
    )  # softmax: tests/study
    settings = config(dual_folder("clip"), colours, "ffn|attn/q_proj", vision)
    checked = replace(settings, debug=DebugConfig(check_gates=True))
    _, alone, losses = steps(checked, tiny.one_device(), 3)
    assert losses[-1] < losses[0]
    mesh = distributed.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, together, many = steps(settings, mesh, 3)
    np.testing.assert_allclose(many, losses, rtol=2e-4)
    for path, leaf in trees.flatten(alone.lora).items():
        assert np.abs(leaf).max() > 0, path
        other = processes.fetch(trees.flatten(together.lora)[path])
        np.testing.assert_allclose(other, leaf, rtol=0, atol=5e-4, err_msg=path)


def test_losses_are_those_of_the_papers() -> None:
    rows, scale, bias = 16, 12.0, -3.0
    features = np.random.default_rng(0).standard_normal((2, rows, 32)).astype(np.float32)
    images, texts = features / np.linalg.norm(features, axis=2, keepdims=True)
    # As their papers' own code has it.
    logits = scale * torch.tensor(images) @ torch.tensor(texts).T
    cross = partial(torch.nn.functional.cross_entropy, target=torch.arange(rows), reduction="sum")
    signs = 2 * torch.eye(rows) - 1
    expected = {
        softmax_contrastive: float((cross(logits) + cross(logits.T)) / 2),
        sigmoid_contrastive: float(-torch.nn.functional.logsigmoid(signs * (logits + bias)).sum()),
    }
    for function, loss in expected.items():
        found = function(
            jnp.asarray(images), jnp.asarray(texts), jnp.float32(scale), jnp.float32(bias)
        )
        np.testing.assert_allclose(found, loss, rtol=1e-5)
