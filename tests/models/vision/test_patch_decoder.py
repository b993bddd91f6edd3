"""Models whose tower reads packed patches against transformers: pixels, coordinates and logits of
texts with images of several shapes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from nalora_jax.data.images.patches import PatchProcessor
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.weights.encoders import _keymap
from nalora_jax.weights.hf import ResolvedSource, open_tensors
from nalora_jax.weights.tensors import load_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, START, END = 5, 6, 7  # token ids
TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
FAMILIES = {
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
}
PROCESSOR = PatchProcessor(4, 2, 64, 1024, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SHAPES = ((20, 31), (40, 18), (9, 70), (8, 8))  # height and width of the pictures


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in SHAPES]


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path) -> tuple[Any, ModelConfig, Any]:
    """A tiny random model of transformers, and its config and weights here."""
    family = request.param
    kinds = transformers.CONFIG_MAPPING
    config = kinds[family](
        text_config=TEXT | {"rope_parameters": SECTIONS},
        vision_config=TOWER | FAMILIES[family],
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        theirs = transformers.AutoModelForImageTextToText.from_config(config).eval()
        for leaf in theirs.parameters():
            wide = leaf.shape[-1] ** -0.5 if leaf.ndim > 1 else 0.2
            leaf.copy_(torch.randn(leaf.shape) * wide + (leaf if leaf.ndim == 1 else 0))
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_hf(config.to_dict(), images=True)
    source = open_tensors(ResolvedSource("hf", tmp_path, str(tmp_path)))
    params = load_params(param_shapes(ours), source, _keymap(ours), dtype="float32")
    return theirs, ours, params


def texts(prepared: list[Any]) -> list[list[int]]:
    """Token ids of a text with two images, one without images, and one that ends in an image."""

    def image(number: int) -> list[int]:
        tokens = PROCESSOR.tokens_of_prepared(prepared[number])
        return [START, *[IMAGE] * tokens, END]

    return [
        [9, 10, *image(0), 11, *image(1), 12, 13],
        [14, 15, 16],
        [17, *image(2), 18, 19, *image(3)],
    ]


def reference(model: Any, ids: list[int], prepared: list[Any]) -> np.ndarray:
    """The logits of one text by transformers, ``[seq, vocab]``."""
    inputs = {"input_ids": torch.tensor([ids])}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if prepared:
        pixels = [np.asarray(PROCESSOR.normalise(image.pixels)) for image in prepared]
        # [patches, p, p, channels] -> [patches, channels, frames, p, p]
        flat = np.concatenate(pixels).reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2)
        flat = np.repeat(flat[:, :, None], 2, axis=2).reshape(len(flat), -1)
        inputs["pixel_values"] = torch.tensor(flat)
        inputs["image_grid_thw"] = torch.tensor([(1, *image.grid) for image in prepared])
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


def test_logits_of_packed_rows_are_transformers_own(model, pictures) -> None:
    """Two rows, one of them with two texts, with four pictures of different shapes."""
    theirs, config, params = model
    prepared = [PROCESSOR.prepare(picture) for picture in pictures]
    first, second, third = texts(prepared)
    rows = [[(first, prepared[:2]), (second, [])], [(second, []), (third, prepared[2:])]]
    length = max(sum(len(ids) for ids, _ in row) for row in rows) + 3
    tokens = np.zeros((2, length), np.int32)
    segments = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        start = 0
        for segment, (ids, _) in enumerate(row):
            tokens[number, start : start + len(ids)] = ids
            segments[number, start : start + len(ids)] = segment + 1
            start += len(ids)
    images = [prepared[:2], prepared[2:]]
    places = PROCESSOR.rounded(PROCESSOR.places(images))
    batch = PROCESSOR.arrays(images, places)
    module = decoder_for(config, numerics=Numerics())

    @jax.jit
    def logits(params: Any) -> jax.Array:
        variables = {"params": params}
        features = module.apply(variables, *PROCESSOR.inputs(batch), method="encode_images")
        hidden = module.apply(variables, tokens, segment_ids=segments, features=features)
        return module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(params))
    for number, row in enumerate(rows):
        start = 0
        for ids, of_text in row:
            expected = reference(theirs, ids, of_text)
            actual = ours[number, start : start + len(ids)]
            np.testing.assert_allclose(actual, expected, atol=2e-5)
            start += len(ids)


def test_pixels_are_those_of_transformers_processor() -> None:
    """Pillow's backend, on 60 shapes: the same sizes, and floats to 1e-6."""
    kind = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
    settings = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    theirs = kind(**settings, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 90, 2))
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        expected = theirs(picture, return_tensors="np")
        image = PROCESSOR.prepare(picture)
        assert (1, *image.grid) == tuple(expected["image_grid_thw"][0])
        ours = np.asarray(PROCESSOR.normalise(image.pixels)).reshape(-1, 4, 4, 3)
        pixels = expected["pixel_values"].reshape(-1, 3, 2, 4, 4)
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), pixels[:, :, 0], atol=2e-6)
        assert PROCESSOR.tokens_of(height, width) == PROCESSOR.tokens_of_prepared(image)


def test_a_picture_that_is_too_thin_is_refused() -> None:
    with pytest.raises(NaloraError, match="at most 200 times"):
        PROCESSOR.fitted(1, 201)
