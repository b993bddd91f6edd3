"""Every family of encoders against transformers: tiny random models, every feature of their configs
on, float32."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from nalora_jax.models.vision.dual_encoder import DualEncoder
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.models.vision.families import read_dual, read_encoder
from nalora_jax.models.vision.vision_config import DualConfig
from tests.param_trees import encoder_params, tensors_from_params

TOLERANCE = 1e-5  # largest absolute difference of features and logits
DUAL = {
    "CLIP: QuickGELU, end token by its id": (
        "clip",
        {"projection_dim": 24, "text": {"eos_token_id": 39}},
    ),
    "CLIP: GELU, end token the largest": (
        "clip",
        {"vision": {"hidden_act": "gelu", "num_hidden_layers": 3}, "text": {"hidden_act": "gelu"}},
    ),
    "SigLIP": ("siglip", {"text": {"projection_size": 32}}),
    "ViT and BERT behind their dense layers": (
        "vision-text-dual-encoder",
        {"vision": {"qkv_bias": False}},
    ),
    "DINOv2 with SwiGLU and layer scale": (
        "vision-text-dual-encoder",
        {"vision": {"model_type": "dinov2", "use_swiglu_ffn": True, "mlp_ratio": 3}},
    ),
}


def inputs(side: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, tokens with an end among them, and which of them are real."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, side, side, 3)).astype(np.float32)
    tokens = rng.integers(4, 38, (4, 10))
    mask = np.arange(10) < np.array([[10], [7], [4], [9]])
    tokens[np.arange(4), mask.sum(1) - 1] = (
        39  # both the largest and the end token of the configs above
    )
    return pixels, np.where(mask, tokens, 0), mask


def opened(folder: Path) -> tuple[DualConfig, dict, transformers.PreTrainedModel]:
    """A dual encoder here, whose parameters give the file's tensors back, and in transformers."""
    config = read_dual(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    params = encoder_params(config, tensors)
    back = dict(tensors_from_params(config, params))
    unused = {"vision_model.embeddings.mask_token"} | {name for name in tensors if "pooler" in name}
    assert tensors.keys() - back.keys() <= unused
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return config, params, model


@pytest.mark.parametrize("case", DUAL)
def test_features_and_logits_are_those_of_transformers(dual_folder, case) -> None:
    family, changes = DUAL[case]
    config, params, model = opened(dual_folder(family, **changes))
    pixels, tokens, mask = inputs()
    attended = torch.tensor(mask.astype(np.int64)) if family != "siglip" else None
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            attention_mask=attended,
        )
    module, variables = DualEncoder(config), {"params": params}
    texts = {"tokens": tokens, "token_weights": mask.astype(np.float32)}

    @jax.jit
    def compared(variables):
        images = module.apply(variables, {"pixels": pixels}, method="encode_image")
        of_texts = module.apply(variables, texts, method="encode_text")
        return images, of_texts, module.apply(variables, images, of_texts, method="logits")

    *features, logits = compared(variables)
    np.testing.assert_allclose(logits, theirs.logits_per_image.numpy(), rtol=0, atol=TOLERANCE)
    assert np.ptp(logits, axis=1).min() > 0.1  # not all the same
    for ours, expected in zip(features, (theirs.image_embeds, theirs.text_embeds), strict=True):
        normal = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
        np.testing.assert_allclose(normal, expected.numpy(), rtol=0, atol=TOLERANCE)


def test_siglip_2_encodes_images_of_different_shapes(dual_folder) -> None:
    config, params, model = opened(dual_folder("siglip2"))
    rng = np.random.default_rng(1)
    shapes = np.array([[4, 4], [2, 7], [5, 3]])
    mask = np.arange(16)[None] < shapes.prod(1)[:, None]
    patches = rng.standard_normal((3, 16, 4 * 4 * 3)).astype(np.float32) * mask[..., None]
    _, tokens, _ = inputs()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(patches),
            pixel_attention_mask=torch.tensor(mask.astype(np.int32)),
            spatial_shapes=torch.tensor(shapes),
        )
    images = {"pixels": patches, "shapes": shapes, "mask": mask}
    logits = jax.jit(DualEncoder(config).apply)({"params": params}, images, {"tokens": tokens})
    np.testing.assert_allclose(logits, theirs.logits_per_image.numpy(), rtol=0, atol=TOLERANCE)


def test_positions_are_resized_for_images_of_another_size(tmp_path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=4,
        mlp_ratio=2,
    )
    model = transformers.Dinov2Model(config).eval()
    ours = read_encoder(config.to_dict())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).standard_normal((2, 20, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    variables = {"params": encoder_params(ours, tensors)}
    for pooled, features in ((True, theirs.pooler_output), (False, theirs.last_hidden_state)):
        found = jax.jit(partial(Encoder(ours).apply, pooled=pooled))(variables, pixels)
        np.testing.assert_allclose(found, features.numpy(), rtol=0, atol=TOLERANCE)
