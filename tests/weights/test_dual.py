"""Dual encoders: folders loaded tensor by tensor, adapters in PEFT's format, and what is
refused."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.models.targets import resolve
from nalora_jax.models.vision.dual_encoder import DualEncoder, init_dual_lora, init_params
from nalora_jax.models.vision.families import compose, read_encoder
from nalora_jax.models.vision.vision_config import DualConfig
from nalora_jax.weights.dual_base import load_dual
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.peft_export import export_adapter, verify_export
from nalora_jax.weights.peft_import import import_adapter

EVERYTHING = (
    LoRARule("image/layers/0/ffn/in_proj", rank=3, alpha=5.0),
    LoRARule("text/layers/1", rank=0),
    LoRARule("ffn/", rank=2),
    LoRARule("attn/", rank=4),
)


def adapted(config: DualConfig, rules: tuple[LoRARule, ...], params: Any, **variant: Any) -> Any:
    """Adapters that do something, with a random B, and their spec."""
    layers = {path: range(depth) for path, depth in config.depths().items()}
    spec = resolve(LoRAConfig(rules=rules, **variant), config.projection_shapes(), layers)

    def filled(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith("/b"):
            return leaf
        ranks = spec.target(path.removesuffix("/b")).ranks
        used = np.arange(leaf.shape[1])[None, :, None] < np.array(ranks)[:, None, None]
        return 0.3 * used * jax.random.normal(jax.random.key(len(path)), leaf.shape)

    return trees.map_named(filled, init_dual_lora(config, spec, jax.random.key(0), params)), spec


@pytest.mark.parametrize(("family", "length"), [("clip", 8), ("siglip2", 12)])
def test_a_folder_gives_the_logits_of_transformers_and_an_adapter_those_of_peft(
    dual_folder, tmp_path, family, length
):
    """From pictures and sentences to logits: processor, tokenizer, weights, model and adapter at
    once."""
    folder, texts = dual_folder(family), ["a photo of a red square", "a green circle"]
    rng = np.random.default_rng(0)
    sizes = ((20, 30, 3), (16, 16, 3))
    images = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    loaded = load_dual(str(folder), dtype="float32")
    lora, spec = adapted(loaded.config, EVERYTHING, loaded.params, rslora=True, dora=True)
    export_adapter(lora, spec, loaded.config, tmp_path / "adapter", base_model_name=str(folder))
    batch = loaded.processor.batch(images)
    batch["pixels"] = loaded.processor.normalise(batch["pixels"])
    inputs = batch, loaded.tokenizer(texts)
    plain = jax.jit(DualEncoder(loaded.config).apply)({"params": loaded.params}, *inputs)
    variables = {"params": loaded.params, "lora": lora}
    ours = jax.jit(DualEncoder(loaded.config, spec).apply)(variables, *inputs)

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    padding = {"padding": "max_length", "truncation": True, "max_length": length}
    given = {
        **processor(images, return_tensors="pt"),
        **tokenizer(texts, return_tensors="pt", **padding),
    }
    for name in ("token_type_ids", *(("attention_mask",) if family == "siglip2" else ())):
        given.pop(name, None)
    base = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # A key that PEFT misses or ignores warns, and is an error; what it says about transformers
        # is not ours.
        warnings.filterwarnings("ignore", category=FutureWarning)
        np.testing.assert_allclose(plain, base(**given).logits_per_image.numpy(), rtol=0, atol=1e-5)
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        theirs = wrapped(**given).logits_per_image.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)
    assert np.abs(plain - theirs).max() > 1e-2


def test_towers_of_two_folders_and_one_of_a_mesh(tower_folders):
    """Two towers that never met get projections; on a mesh every leaf lies where the rules say,
    with equal numbers."""
    image, text = tower_folders
    one = load_dual(f"{image}+{text}", dtype="float32", seed=3)
    assert one.params["text"]["projection"]["kernel"].shape == (48, 32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    many = load_dual(f"{image}+{text}", dtype="float32", seed=3, mesh=mesh)
    assert many.fingerprint == one.fingerprint
    kernel = many.params["image"]["layers"]["ffn"]["in_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    for path, leaf in trees.flatten(one.params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(many.params)[path], err_msg=path)
    with pytest.raises(NaloraError, match="image tower"):
        load_dual(f"{text}+{image}", dtype="float32")


def test_what_is_wrong_is_named(dual_folder, tmp_path):
    clip = dual_folder("clip")
    folder = shutil.copytree(clip, tmp_path / "copy")
    whole = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]

    def refused(message: str, source: Any = folder, **options: Any) -> None:
        with pytest.raises(NaloraError, match=message):
            load_dual(str(source), dtype="float32", **options)

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(
        {key: value for key, value in whole.items() if key != name}, folder / "model.safetensors"
    )
    refused(f"no {name}")
    save_file(
        whole | {"vision_model.embeddings.position_ids": np.arange(17)},
        folder / "model.safetensors",
    )
    load_dual(str(folder), dtype="float32")  # buffers of older files are known
    for changed, message in (
        ({"model_type": "blip"}, "model_type"),
        ({"text_config": text | {"hidden_act": "gelu_10"}}, "text_config: hidden_act"),
        ({"vision_config": vision | {"patch_size": 5}}, "image_size"),
        ({"vision_config": vision | {"num_attention_heads": 3}}, "hidden_size"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        refused(message)
    refused(
        "--vision.image-size: expected a multiple of the patch size, 4, found 10",
        clip,
        image_size=10,
    )
    (folder / "config.json").write_text(json.dumps(config))
    processor = folder / "preprocessor_config.json"
    settings = json.loads(processor.read_text()) | {"do_resize": False}
    processor.write_text(json.dumps(settings))
    refused("do_resize: expected true, with --vision.image-size, found false", image_size=8)
    several = dual_folder("siglip2")
    refused("0 for a model that takes images of any shape, found 8", several, image_size=8)


def test_what_two_towers_train_is_written_and_read_back(tmp_path):
    """Projections and temperature as a whole, and both projections of a gated block as PEFT's one
    module."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    gated = sizes | {
        "model_type": "dinov2",
        "use_swiglu_ffn": True,
        "image_size": 16,
        "patch_size": 4,
    }
    text = sizes | {"model_type": "bert", "vocab_size": 64, "max_position_embeddings": 12}
    config = compose(read_encoder(gated), read_encoder(text), 16)
    params, folder = init_params(config, jax.random.key(1)), tmp_path / "adapter"
    lora, spec = adapted(config, (LoRARule("image/.*ffn/", 2),), params)
    for side in ("image", "text"):
        starts = (tree[side]["projection"]["kernel"] for tree in (lora, params))
        np.testing.assert_array_equal(*starts)
    lora["logit_scale"] = lora["logit_scale"] + 0.5
    export_adapter(lora, spec, config, folder, base_model_name="two towers")
    verify_export(folder, lora, spec, config)
    module = "base_model.model.vision_model.encoder.layer.1.mlp.weights_in"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"{module}.lora_A.weight"].shape == (4, 32)
    whole = trees.flatten(import_adapter(folder, config)[0])
    for path in config.trained_shapes():
        np.testing.assert_array_equal(whole[path], trees.flatten(lora)[path], err_msg=path)
    file = folder / "trained.safetensors"
    with pytest.raises(NaloraError, match="merge: expected .*found two towers that were joined"):
        write_merged(tmp_path / "m", config, params, lora, spec, hf_config={}, tokenizer=print)
    settings = folder / "adapter_config.json"
    written = settings.read_text()
    settings.write_text(json.dumps(json.loads(written) | {"modules_to_save": ["head"]}))
    with pytest.raises(NaloraError, match="modules_to_save: expected null for image and text enc"):
        import_adapter(folder, config)
    settings.write_text(written)
    trained = file.read_bytes()
    save_file({"logit_scale": np.zeros((), np.float32)}, file)
    with pytest.raises(NaloraError, match="expected a tensor for image/projection.*found nothing"):
        import_adapter(folder, config)
    file.write_bytes(trained[:-1] + b"\x01")
    with pytest.raises(NaloraError, match="trained.safetensors: expected .* the digest"):
        import_adapter(folder, config)
    file.unlink()
    with pytest.raises(
        NaloraError, match="trained.safetensors: expected a complete safetensors file"
    ):
        import_adapter(folder, config)
