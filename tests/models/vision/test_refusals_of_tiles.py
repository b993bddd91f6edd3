"""Files of models whose images are in tiles that do not fit: one error with the field. Limits of
pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nalora_jax import config as cfg
from nalora_jax.errors import NaloraError
from nalora_jax.kinds import images as kind
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.base import limit_pixels, load_model
from tests import vision

pytest.importorskip("transformers")
MODEL = "config.json"
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family in vision.PLACED_FAMILIES:
        folders[family] = vision.make_tile_model(tmp_path_factory.mktemp(family), family)
    return folders


TOWER = "vision_config"
SQUARE = vision.SQUARE


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("idefics3", {TOWER: {"use_rope": True}}, "vision_config: use_rope: expected no such"),
        ("llava_next", {TOWER: {"windows": 2}}, "vision_config: windows: expected no such field"),
        ("llava_onevision", {TOWER: {"windows": 2}}, "vision_config: windows: expected no such"),
        ("idefics3", {"scale_factor": 3}, "scale_factor: expected a divisor of 4 patches a side"),
        ("smolvlm", {TOWER: {"image_size": 100}}, "image_size: .*rounding.*found 25 patches"),
        (
            "llava_onevision",
            {"vision_aspect_ratio": "anyres"},
            'vision_aspect_ratio: expected "anyres_max_" and a number, found .anyres',
        ),
        (
            "llava_next",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy: expected 'default' for a tower with a class token",
        ),
        ("mistral3", {TOWER: {"windows": 2}}, "vision_config: windows: expected no such field"),
        ("mistral3", {TOWER: {"hidden_size": 36}}, r"a multiple of 4 num_attention_heads \(16\)"),
        (
            "mistral3",
            {TOWER: {"head_dim": 4}},
            r"head_dim: expected hidden_size / .*\(8\), found 4",
        ),
        ("mistral3", {"vision_feature_layer": -2}, "vision_feature_layer: expected -1"),
        ("lfm2_vl", {TOWER: {"windows": 2}}, "vision_config: windows: expected no such field"),
        ("lfm2_vl", {TOWER: {"vision_use_head": True}}, "vision_use_head: expected false"),
        (
            "lfm2_vl",
            {TOWER: {"num_patches": 24}},
            "num_patches: expected a square number, found 24",
        ),
        ("lfm2_vl", {TOWER: {"hidden_size": 30}}, "hidden_size: expected a multiple of 4 heads"),
        ("llava_next", {"image_grid_pinpoints": 4}, "expected a list of heights and widths"),
        ("llava_next", {"image_grid_pinpoints": [[20, 16]]}, "multiples of 16, .*found .20, 16."),
    ],
    ids=str,
)
def test_fields_of_models_are_read_or_refused(folders, family, changes, message) -> None:
    raw: dict[str, Any] = json.loads((folders[family] / MODEL).read_text())
    for name, value in changes.items():
        raw[name] = raw[name] | value if isinstance(value, dict) else value
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw, images=True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("smolvlm", {"do_resize": False}, "do_resize: expected true: images must have whole tiles"),
        ("smolvlm", {"max_image_size": {"longest_edge": 8}}, "tiles of 16 x 16, .*found 8"),
        (
            "smolvlm",
            {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_pad": False},
            "expected a processor of tiles of the model's family",
        ),
        ("lfm2_vl", {"tile_size": 20}, "tile_size: expected a multiple of 8, found 20"),
        ("lfm2_vl", {"max_tiles": 1}, "max_image_tokens: expected limits .* found .*2 to 1 tiles"),
        ("lfm2_vl", {"encoder_patch_size": 8}, "expected .*'patch_size': 4.*found"),
        ("mistral3", {"do_resize": False}, "do_resize: expected true: images must have whole"),
        ("mistral3", {"patch_size": {"height": 4, "width": 8}}, "patch_size: expected a square"),
        ("llava_onevision", {"size": {"height": 16, "width": 8}}, "size: expected a square"),
        ("llava_next", {"crop_size": {"height": 8, "width": 8}}, "crop_size: expected 16, as size"),
        (
            "llava_next",
            {"image_grid_pinpoints": [[16, 16]]},
            "image_grid_pinpoints: expected the sizes of config.json",
        ),
    ],
    ids=str,
)
def test_processors_fit_the_model(tmp_path, family, changes, message) -> None:
    folder = vision.make_tile_model(tmp_path, family)
    path = folder / PROCESSOR
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(NaloraError, match=message):
        load_model(str(folder), dtype="float32", images=True)


@pytest.mark.parametrize(
    ("family", "pixels", "limited"),
    [
        ("smolvlm", 1000, "at most 1 by 1 tiles of 16 by 16 pixels"),  # below 32 by 32
        ("smolvlm", 1, "at most 1 by 1 tiles of 16 by 16 pixels"),
        ("llava_onevision", 600, "at most 2 tiles of 16 by 16 pixels"),
        ("llava_onevision", 1, "at most 1 tiles of 16 by 16 pixels"),
        ("lfm2_vl", 300, "128 to 300 pixels, at most 4 tokens"),
        ("mistral3", 600, "sides of at most 24 pixels, at most 9 tokens"),
    ],
)
def test_limits_of_pixels_take_fewer_tiles(folders, caplog, family, pixels, limited) -> None:
    caplog.set_level("INFO")
    whole = load_model(str(folders[family]), dtype="float32", images=True)
    model = limit_pixels(whole, cfg.VisionConfig("chat", max_pixels=pixels))
    assert f"images have {limited}" in caplog.text
    tokens: Any = model.tokenizer.images
    (layout,) = tokens.layouts([(300, 310)])
    (unlimited,) = whole.tokenizer.images.layouts([(300, 310)])  # type: ignore[union-attr]
    assert layout.tokens < unlimited.tokens
    assert model.processor.layouts([(300, 310)]) == [layout]  # type: ignore[union-attr]
    if family != "lfm2_vl":
        with pytest.raises(NaloraError, match="--vision.min-pixels: expected 0: .*no lower limit"):
            limit_pixels(whole, cfg.VisionConfig("chat", min_pixels=64))


def test_plans_of_images_in_tiles_are_refused(folders) -> None:
    raw = json.loads((folders["smolvlm"] / MODEL).read_text())
    with pytest.raises(NaloraError, match="expected a model whose images have one size"):
        kind.batch_arrays(cfg.RunConfig(), ModelConfig.from_hf(raw, images=True), 1)


@pytest.mark.parametrize("family", vision.PLACED_FAMILIES)
def test_the_text_model_loads_alone(folders, family) -> None:
    loaded = load_model(str(folders[family]), dtype="float32")
    assert loaded.config.vision is None
    assert set(loaded.params) - {"lm_head"} == {"embed", "layers", "final_norm"}
