"""Folders of dual encoders, loaded tensor by tensor: parity end to end, and everything that is wrong by name."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from nalora_jax.common import trees
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import make_mesh
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.weights.dual import load_dual, load_encoder

TEXTS = ["a photo of a red square", "a green circle"]


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((20, 30, 3), (16, 16, 3))
    ]


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "vision-text-dual-encoder"])
def test_a_folder_gives_the_logits_of_transformers(dual_folder, family) -> None:
    """From pictures and sentences to logits: processor, tokenizer, weights and model at once."""
    folder = dual_folder(family)
    loaded = load_dual(str(folder), dtype="float32")
    batch = loaded.processor.batch(images())
    batch["pixels"] = loaded.processor.normalise(batch["pixels"])
    ours = DualEncoder(loaded.config).apply({"params": loaded.params}, batch, loaded.tokenizer(TEXTS))

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    fixed = family.startswith("siglip")
    texts = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=12 if fixed else 8, return_tensors="pt"
    )
    given = {**processor(images(), return_tensors="pt"), **texts}
    for name in ("token_type_ids", *(("attention_mask",) if fixed else ())):
        given.pop(name, None)
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(folder).eval()(**given).logits_per_image
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_towers_of_two_folders_and_one_of_a_mesh(tower_folders) -> None:
    """Two towers that never met get projections; on a mesh every leaf lies where the rules say, with equal numbers."""
    image, text = tower_folders
    one = load_dual(f"{image}+{text}", dtype="float32", seed=3)
    assert one.config.image.n_layers == 3
    assert one.config.image.features == one.config.text.features == 32
    assert one.params["text"]["projection"]["kernel"].shape == (48, 32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    many = load_dual(f"{image}+{text}", dtype="float32", seed=3, mesh=mesh)
    another = load_dual(f"{image}+{text}", dtype="float32", seed=4)
    assert many.fingerprint == one.fingerprint != another.fingerprint
    kernel = many.params["image"]["layers"]["ffn"]["in_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    for path, leaf in trees.flatten(one.params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(many.params)[path], err_msg=path)
    seen = load_encoder(str(image), dtype="float32")
    pixels = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
    given = torch.tensor(pixels.transpose(0, 3, 1, 2))
    with torch.no_grad():
        theirs = transformers.ViTModel.from_pretrained(image).eval()(given).last_hidden_state[:, 0]
    ours = Encoder(seen.config).apply({"params": seen.params}, pixels)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
    with pytest.raises(NaloraError, match="image tower"):
        load_dual(f"{text}+{image}", dtype="float32")


def test_what_is_wrong_is_named(dual_folder, tmp_path) -> None:
    clip = dual_folder("clip")
    folder = shutil.copytree(clip, tmp_path / "copy")
    whole = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]

    def refused(message: str, source: Any = folder, dtype: str = "float32", **options: Any) -> None:
        with pytest.raises(NaloraError, match=message):
            load_dual(str(source), dtype=dtype, **options)

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    for change, message in (
        ({name: None}, f"no {name}"),
        ({name: whole[name].T.copy()}, "the shape"),
        ({"vision_model.extra.weight": whole[name]}, "unknown tensor"),
        ({"logit_scale": whole[name]}, "the shape"),
    ):
        tensors = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(tensors, folder / "model.safetensors")
        refused(message)
    save_file(whole | {"vision_model.embeddings.position_ids": np.arange(17)}, folder / "model.safetensors")
    load_dual(str(folder), dtype="float32")  # buffers of older files are known
    for changed, message in (
        ({"model_type": "blip"}, "model_type"),
        ({"text_config": text | {"hidden_act": "gelu_10"}}, "text_config: hidden_act"),
        ({"vision_config": vision | {"patch_size": 5}}, "image_size"),
        ({"vision_config": vision | {"num_attention_heads": 3}}, "hidden_size"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        refused(message)
    for source in ("", "nothing-of-that-name", tmp_path):
        refused("", source)
    refused("dtype", dtype="int8")
    refused("--vision.image-size: expected a multiple of the patch size, 4, found 10", clip, image_size=10)
    several = dual_folder("siglip2")
    refused("0 for a model that takes images of any shape, found 8", several, image_size=8)
