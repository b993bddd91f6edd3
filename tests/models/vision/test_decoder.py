"""Vision-language models against transformers: logits of texts with images, through the models' own
processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from nalora_jax.data.forms import Parts
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.weights.base import load_model
from nalora_jax.weights.model_files import LoadedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
CASES = (("llava", {}), ("llava", WHOLE | {"multimodal_projector_bias": False}), ("gemma3", {}))


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    """Three images of different sizes."""
    rng = np.random.default_rng(0)
    sizes = ((20, 31), (40, 18), (16, 16))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in sizes]


def chats(*counts: int) -> list[list[dict[str, Any]]]:
    """A conversation for each number of images, of different lengths."""
    rows = []
    for number, count in enumerate(counts):
        parts: list[dict[str, str]] = [{"type": "image"}] * count
        parts = [*parts, {"type": "text", "text": "What colour is this" + " square" * (4 * number)}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "the red circle."}]}
        rows.append([{"role": "user", "content": Parts(parts)}, answer])
    return rows


def ours(
    loaded: LoadedModel, rows: list[list[dict[str, Any]]], pictures: list[list[Any]]
) -> tuple[np.ndarray, Any]:
    """Padded token ids and float32 logits of conversations with their pictures."""
    ids = [
        loaded.tokenizer.encode(loaded.tokenizer.render_chat(row), special=False) for row in rows
    ]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    segments = np.zeros_like(tokens)
    assert loaded.processor is not None
    pixels = np.zeros((len(ids), max(map(len, pictures)), 16, 16, 3), np.uint8)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        for j, picture in enumerate(pictures[i]):
            pixels[i, j] = loaded.processor(picture)["pixels"]
    model, processor = decoder_for(loaded.config), loaded.processor

    @jax.jit
    def logits(
        variables: Any, tokens: jax.Array, segments: jax.Array, pixels: jax.Array
    ) -> jax.Array:
        features = model.apply(variables, processor.normalise(pixels), method="encode_images")
        hidden = model.apply(variables, tokens, segment_ids=segments, features=features)
        return model.apply(variables, hidden, method="unembed")

    return tokens, np.asarray(logits({"params": loaded.params}, tokens, segments, pixels))


def theirs(
    folder: Path, rows: list[list[dict[str, Any]]], pictures: list[list[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """The same by transformers: its processor's tokens and pixels, its logits."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    filled = []
    for row, images in zip(rows, pictures, strict=True):
        left = iter(images)
        user = [
            {**part, "image": next(left)} if part["type"] == "image" else part
            for part in row[0]["content"]
        ]
        filled.append([{"role": "user", "content": user}, *row[1:]])
    inputs = processor.apply_chat_template(
        filled,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        return inputs["input_ids"].numpy(), model(**inputs).logits.numpy()


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_logits_are_transformers_own(
    vision_folder, pictures, family: str, settings: dict[str, Any]
) -> None:
    """Two conversations with one and two images of different sizes, padded, through both sides' own
    processors."""
    folder = vision_folder(family, **settings)
    rows, images = chats(2, 1), [pictures[:2], pictures[2:]]
    loaded = load_model(str(folder), dtype="float32", images=True)
    tokens, logits = ours(loaded, rows, images)
    expected_tokens, expected = theirs(folder, rows, images)
    np.testing.assert_array_equal(tokens, expected_tokens)
    real = expected_tokens != 0
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-5)
    other, moved = ours(loaded, rows, [[pictures[1], pictures[0]], pictures[2:]])
    np.testing.assert_array_equal(other, tokens)
    assert np.abs(moved[0] - logits[0])[real[0]].max() > 0.01  # the images' order is seen


def test_the_text_model_of_a_multimodal_folder_loads_alone(vision_folder) -> None:
    loaded = load_model(str(vision_folder("llava")), dtype="float32")
    assert loaded.config.vision is None
    assert set(loaded.params) == {"embed", "layers", "final_norm", "lm_head"}
    assert loaded.tokenizer.images is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vision_feature_layer": 9}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"image_token_index": 4096}, "image_token_index"),
        ({"projector_hidden_act": "nosuch"}, "projector_hidden_act"),
        ({"vision_config": {"model_type": "bert"}}, "vision_config"),
        ({"text_config": {"model_type": []}}, "text_config"),
        (
            {"model_type": "qwen2_vl"},
            "vision-language model: one of llava, .*, qwen2_5_vl, .*, found 'qwen2_vl'",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    vision_folder, changes: dict[str, Any], field: str
) -> None:
    raw = json.loads((vision_folder("llava") / "config.json").read_text()) | changes
    with pytest.raises(NaloraError, match=field):
        ModelConfig.from_hf(raw, images=True)
