"""A tiny study over images: the runs are those of the training loop, and pairs are pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.common import trees
from nalora_jax.data.images.opened import open_images
from nalora_jax.evaluate.image_evaluation import ClassEvaluator, Encoders, RecordImages
from nalora_jax.kinds import dual
from nalora_jax.models.vision.dual_encoder import DualEncoder
from nalora_jax.study import execution
from nalora_jax.study.planned_runs import Cell, Run
from nalora_jax.study.protocol import Method, read_protocol
from nalora_jax.study.records import Records
from nalora_jax.study.resources import Resources
from tests import tiny
from tests.study.conftest import assert_starts_alone, write_study

PROTOCOL = """
question = "Which method learns colours?"
models = [BASE]
baseline = "lora"
rates = [1e-2]
extend = 0
tuning_seeds = [0]
test_seeds = [1]
evaluate_every = 2

[run]
steps = 4
lora.rules = [{pattern = "ffn", rank = 2}]
train = {batch_size = 8, log_every = 2}
compute = {dtype = "float32", compilation_cache = false}
mesh = {data = 1}

[methods.lora]

[methods.again]
reseed = 1000
"""
TASK = """
[tasks.NAME]
dataset = QUESTIONS
train = "train[:50%]"
validation = "train[50%:75%]"
test = "train[75%:]"
vision = {VISION}
"""
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 200)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of each colour, with captions."""
    return tiny.make_pictures(tmp_path_factory.mktemp("colours"), COLOURS, count=16, size=(18, 18))


def resources_of(folder: Path, towers: tuple[Path, Path], data: Path, **tasks: str) -> Resources:
    """The study of these tasks' settings for images."""
    written = "".join(
        TASK.replace("NAME", name).replace("VISION", of) for name, of in tasks.items()
    )
    base = Path("+".join(map(str, towers)))
    return Resources(read_protocol(write_study(folder, base, data, PROTOCOL + written)))


def run_of(resources: Resources, task: str, method: str = "lora", seed: int = 1) -> Run:
    return Run(
        resources.protocol, "test", Cell(resources.protocol.models[0], task, method), 1e-2, seed
    )


def test_pairs_share_rows_items_and_projections_and_programs_serve_all_seeds(
    tmp_path: Path, tower_folders: tuple[Path, Path], colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = 'task = "contrast", augment = "flip", image_size = 12'
    pairs = resources_of(tmp_path, tower_folders, colours, pairs=vision)
    monkeypatch.setattr(execution, "Resources", lambda *_: pairs)
    assert execution.run_study(pairs.protocol) == 4
    records = list(Records(tmp_path).read().values())
    assert len({one["data"] for one in records}) == 2  # one order per seed
    tests = [one for one in records if one["stage"] == "test"]
    assert len({json.dumps(one["items"]) for one in tests}) == 1
    measured = {"loss", "recall", "image_to_text_recall_5", "text_to_image_recall_1"}
    assert all(set(one["test"]) >= measured for one in tests)
    assert all(one["curve"][-1]["loss"] < one["curve"][0]["loss"] for one in records)
    counts = [one["compilations"] for one in records if one["stage"] == "tune"]
    assert counts[0] > 0
    assert counts[1:] == [0]
    assert_starts_alone(dual, run_of(pairs, "pairs"), pairs)
    alone = Method(settings={"lora": {"rules": [{"pattern": "ffn", "rank": 0}]}})
    changed = replace(pairs.protocol, methods=dict(pairs.protocol.methods) | {"projections": alone})
    monkeypatch.setattr(pairs, "protocol", changed)
    starts = {}
    for method, seed in (("lora", 0), ("lora", 1), ("again", 1), ("projections", 1)):
        run = run_of(pairs, "pairs", method, seed)
        data = pairs.subject(run.config).data(run.config)
        starts[method, seed] = trees.flatten(pairs.start(run, data).lora)
    path, a = "image/projection/kernel", "image/layers/ffn/in_proj/a"
    assert not np.allclose(starts["lora", 0][path], starts["lora", 1][path])
    for method in ("again", "projections"):
        np.testing.assert_array_equal(starts["lora", 1][path], starts[method, 1][path])
    assert set(starts["projections", 1]) == {path, "text/projection/kernel", "logit_scale"}
    assert not np.allclose(starts["lora", 1][a], starts["again", 1][a])


def test_image_tasks_of_one_shape_share_programs_but_not_their_classes(
    tmp_path: Path, tower_folders: tuple[Path, Path], colours: Path
) -> None:
    two = 'task = "classify", shots = 2, classes = ["red", "green", "blue"]'
    four = 'task = "classify", shots = 4, classes = ["blue", "green", "red"]'
    shots = resources_of(tmp_path, tower_folders, colours, two=two, four=four)
    first, second = run_of(shots, "two"), run_of(shots, "four")
    assert shots.assembly(first) is shots.assembly(second)
    subject = shots.subject(first.config)
    assert [len(subject.data(run.config).indices) for run in (first, second)] == [3 * 2, 3 * 4]
    for run in (first, second):
        items, loaded = shots.test_items(run), subject.model(run.config)
        source = open_images(run.config.data, run.config.vision, "train[75%:]")
        labels = source.labels(items.classes)
        encoders = Encoders(DualEncoder(loaded.config), loaded.processor, loaded.tokenizer)
        images = RecordImages(source, np.arange(len(source)))
        alone = ClassEvaluator(encoders, images, labels, items.classes, run.config.vision.templates)
        found = shots.measure_base(run, items)
        assert found["loss"] == pytest.approx(alone.measure(loaded.params, None)["loss"], abs=1e-5)
        tokens = np.asarray(subject.params(run.config, None)["classes"]["tokens"])[:, 0]
        prompts = [run.config.vision.templates[0].format(name) for name in items.classes]
        np.testing.assert_array_equal(tokens, loaded.tokenizer(prompts)["tokens"])
