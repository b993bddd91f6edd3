"""Files of models whose tower reads packed patches that do not fit: one error with the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nalora_jax import config as cfg
from nalora_jax.data.chat_templates import ImageLayout, SizedImageTokens
from nalora_jax.data.images.patches import PatchProcessor
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.kinds import images as kind
from nalora_jax.loading.adapted import load
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.base import limit_pixels, load_model
from tests import vision

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request, tmp_path_factory) -> Path:
    return vision.make_patch_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one_size(vision_folder) -> Path:
    """A model whose images have one size."""
    return vision_folder("gemma3")


def raw_of(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_layers": [1]}, "vision_config: window_layers: expected no such field"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type: expected "axial", found .yarn'),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: expected a finite number"),
        ({"hidden_size": 36}, r"hidden_size: expected a multiple of 4 num_heads \(16\)"),
        ({"out_hidden_size": 48}, r"out_hidden_size: expected the decoder's width \(32\)"),
        ({"depth": 0}, "depth: expected a whole number from 1"),
        ({"hidden_act": "nosuch"}, "hidden_act"),
        ({"patch_size": [4, 4]}, "patch_size: expected a whole number"),
    ],
    ids=str,
)
def test_fields_of_towers_are_read_or_refused(folder, changes: dict[str, Any], message) -> None:
    raw = raw_of(folder)
    raw["vision_config"] |= changes
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw, images=True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_5_vl", {"fullatt_block_indexes": 1}, "fullatt_block_indexes: expected a list"),
        ("qwen3_vl", {"deepstack_visual_indexes": [3]}, "expected layers below 3, found 3"),
        ("qwen3_vl", {"num_position_embeddings": 24}, "expected a square number, found 24"),
    ],
)
def test_fields_of_one_family_are_checked(tmp_path, family, changes, message) -> None:
    raw = raw_of(vision.make_patch_model(tmp_path, family))
    raw["vision_config"] |= changes
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw, images=True)


@pytest.mark.parametrize("size", [32, 16])
def test_stacks_of_experts_whose_axes_cannot_be_told_apart_are_refused(tmp_path, size) -> None:
    raw = raw_of(vision.make_patch_model(tmp_path, "qwen3_vl_moe"))
    raw["text_config"]["moe_intermediate_size"] = size
    message = "moe_intermediate_size: expected neither hidden_size nor half of it, found"
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw, images=True)


def test_fields_without_effect_are_accepted(folder) -> None:
    """Those of the models' own files, and those that transformers 4 wrote into every config."""
    raw = raw_of(folder)
    config = ModelConfig.from_hf(raw, images=True)
    raw["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 4, "tokens_per_second": 2}
    raw["vision_config"] |= {"torch_dtype": "bfloat16", "problem_type": None, "top_k": 50}
    assert ModelConfig.from_hf(raw, images=True) == config
    raw["vision_config"]["rope_parameters"]["rope_theta"] = 5e3
    assert ModelConfig.from_hf(raw, images=True).vision.tower.rope_theta == 5e3


def write(folder: Path, name: str, change: Mapping[str, Any]) -> None:
    """Changes a JSON file of a folder; of the tokenizer the ids of added tokens."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("preprocessor_config.json", {"image_processor_type": "Mine"}, "expected one of CLIP"),
        ("preprocessor_config.json", {"merge_size": 3}, "expected .*'merge_size': 2.*found"),
        ("preprocessor_config.json", {"patch_size": 8}, "expected .*'patch_size': 4.*found"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}},
            "expected a processor of patches",
        ),
        ("preprocessor_config.json", {"min_pixels": "few"}, "shortest_edge: expected a whole"),
        ("config.json", {"vision_start_token_id": 63}, "a special token with the id 63, as"),
        ("config.json", {"image_token_id": 64}, "expected a token below 64"),
    ],
    ids=str,
)
def test_processors_and_tokens_fit_the_model(tmp_path, name, changes, message) -> None:
    folder = vision.make_patch_model(tmp_path, "qwen2_5_vl")
    write(folder, name, changes)
    with pytest.raises(NaloraError, match=message):
        load_model(str(folder), dtype="float32", images=True)


def test_a_missing_processor_is_named(tmp_path) -> None:
    folder = vision.make_patch_model(tmp_path, "qwen2_5_vl")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(NaloraError, match="preprocessor_config.json: expected the file"):
        load_model(str(folder), dtype="float32", images=True)


def test_images_fit_their_places_in_a_prompt(folder) -> None:
    model = load(str(folder), dtype="float32", images=True)
    generator = Generator(
        model.module, model.variables, model.base.tokenizer, processor=model.base.processor
    )
    image = model.base.processor.prepare(vision.draw_noise(16, 24))
    token = model.base.tokenizer.images.token_id
    for places, images, message in (
        (5, [image], "expected 6 tokens .* for 1 images, found 5"),
        (6, [], "expected 0 tokens .* for 0 images, found 6"),
        (6, [image, image], "expected 12 tokens .* for 2 images, found 6"),
    ):
        with pytest.raises(NaloraError, match=message):
            generator.complete([[9, *[token] * places, 10]], images=[images])


def test_a_template_that_leaves_out_images_is_refused() -> None:
    processor = PatchProcessor(4, 2, 64, 1024, (0.5,) * 3, (0.5,) * 3)
    tokens = SizedImageTokens("<i>", 5, 0, "<i>", processor=processor)
    messages = [{"role": "user", "content": [{"type": "image", "layout": ImageLayout(4)}] * 2}]
    assert tokens.expanded("a<i>b<i>", messages) == "a<i><i><i><i>b<i><i><i><i>"
    with pytest.raises(NaloraError, match="once for each of 2 images, found 1 times"):
        tokens.expanded("a<i>", messages)


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("<image> and <image>?", ["a.png"], "expected an image for every <image>, found fewer"),
        ("<image>?", ["a.png", "a.png"], "1 images more than places"),
        ("?", ["nosuch.png"], "1 images more than places"),
        ("<image>?", ["b.png"], "expected an image .*, found UnidentifiedImageError"),
    ],
)
def test_pictures_of_a_record_fit_its_placeholders(
    folder, tmp_path, content, images, message
) -> None:
    vision.draw_noise(16, 24).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns, "images": images}) + "\n")
    loaded = load_model(str(folder), dtype="float32", images=True)
    data = cfg.DataConfig(str(tmp_path / "data.jsonl"), train_split="train", eval_split="train")
    with pytest.raises(NaloraError, match=f"(?s)data.jsonl.*{message}"):
        kind.vision_sources(data, cfg.VisionConfig("chat"), loaded.tokenizer.images)["train"][0]


def test_plans_of_images_of_any_shape_are_refused(folder) -> None:
    config = ModelConfig.from_hf(raw_of(folder), images=True)
    with pytest.raises(NaloraError, match="expected a model whose images have one size"):
        kind.batch_arrays(cfg.RunConfig(), config, 1)


def test_limits_of_pixels_are_for_images_of_any_shape(folder, one_size, caplog) -> None:
    caplog.set_level("INFO")
    limits = cfg.VisionConfig("chat", max_pixels=400, min_pixels=128)
    limited = limit_pixels(load_model(str(folder), dtype="float32", images=True), limits)
    assert (limited.processor.min_pixels, limited.processor.max_pixels) == (128, 400)
    assert limited.tokenizer.images.layouts([(300, 300)]) == [
        ImageLayout(4)
    ]  # 2 by 2, of at most 6
    assert "images have 128 to 400 pixels, at most 6 tokens" in caplog.text
    fixed = load_model(str(one_size), dtype="float32", images=True)
    assert limit_pixels(fixed, cfg.VisionConfig("chat", max_pixels=400)) is fixed
    with pytest.raises(NaloraError, match="--vision.min-pixels: expected 0: images of this model"):
        limit_pixels(fixed, limits)


def test_a_processor_of_patches_does_not_serve_images_of_one_size(one_size, tmp_path) -> None:
    folder = vision.make_patch_model(tmp_path, "qwen2_5_vl")
    copied = json.loads((folder / "preprocessor_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in one_size.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "preprocessor_config.json").write_text(json.dumps(copied))
    with pytest.raises(NaloraError, match="expected a processor of images of one size"):
        load_model(str(other), dtype="float32", images=True)
