"""Accuracy and recall against scikit-like counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.opened import open_images
from nalora_jax.evaluate.image_evaluation import (
    ClassEvaluator,
    Encoders,
    RecordImages,
    RetrievalEvaluator,
    own_ranks,
)
from nalora_jax.models.vision.dual_encoder import DualEncoder
from nalora_jax.weights.dual_base import load_dual


def test_ranks_count_what_beats_the_own_one() -> None:
    logits = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(own_ranks(logits), [0, 2, 0])


@pytest.fixture(scope="module")
def scene(dual_folder, tmp_path_factory):
    """A tiny CLIP, and 70 pictures: more than one batch."""
    folder = tmp_path_factory.mktemp("scene")
    rng, rows = np.random.default_rng(0), ["file_name,caption,label"]
    words = ["red", "green", "blue", "dress", "bag"]
    for i in range(70):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{i:02}.png"
        )
        rows.append(f"{i:02}.png,a {words[i % 5]} {words[i % 3]} {words[i % 4]},{words[i % 5]}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    loaded = load_dual(str(dual_folder("clip")), dtype="float32")
    encoders = Encoders(DualEncoder(loaded.config), loaded.processor, loaded.tokenizer)
    source = open_images(DataConfig(dataset=str(folder)), VisionConfig(), "train")
    return loaded, encoders, RecordImages(source, np.arange(70))


def test_accuracy_and_confusion_are_counts(scene) -> None:
    loaded, encoders, images = scene
    classes = images.source.classes()
    labels = images.source.labels(classes)
    templates = ("a photo of the {}", "the {}")
    evaluator = ClassEvaluator(encoders, images, labels, classes, templates)
    found = evaluator.measure(loaded.params, None, samples=True)
    variables = {"params": loaded.params}
    features = encoders.images(variables, images[:])
    prompts = np.stack(
        [encoders.texts(variables, [t.format(c) for c in classes]) for t in templates]
    )
    mean = prompts.mean(axis=0)
    cosines = features @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    predicted = cosines.argmax(axis=1)
    np.testing.assert_allclose(found["accuracy"], (predicted == labels).mean())
    matrix = np.zeros((5, 5), int)
    np.add.at(matrix, (labels, predicted), 1)
    assert found["confusion"] == matrix.tolist()
    assert found["right"] == (predicted == labels).tolist()
    assert len(found["samples"]) == 8


def test_recall_is_of_the_own_caption_both_ways(scene) -> None:
    loaded, encoders, images = scene
    captions = images.source.captions(range(70))
    found = RetrievalEvaluator(encoders, images, captions).measure(
        loaded.params, None, samples=True
    )
    variables = {"params": loaded.params}
    cosines = encoders.images(variables, images) @ encoders.texts(variables, captions).T
    others = ~np.eye(70, dtype=bool)
    for way, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        ahead = matrix - np.diagonal(matrix)[:, None]
        for count in (1, 5):
            # Captions that repeat tie, and others nearly: the rounding of each program decides
            # their order.
            least, most = (((ahead > t) & others).sum(axis=1) < count for t in (-1e-4, 1e-4))
            assert least.mean() - 1e-6 <= found[f"{way}_recall_{count}"] <= most.mean() + 1e-6
    both = [found[f"{way}_recall_1"] for way in ("image_to_text", "text_to_image")]
    np.testing.assert_allclose(found["recall"], np.mean(both))
