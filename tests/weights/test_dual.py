"""Dual encoders: folders loaded tensor by tensor, adapters in PEFT's format, and what is refused."""

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
from nalora_jax.layout.distributed import make_mesh
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import DualEncoder, init_lora
from nalora_jax.models.vision.families import compose, read_encoder
from nalora_jax.weights.dual import LoadedDual, load_dual, load_encoder
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export

TEXTS = ["a photo of a red square", "a green circle"]


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((20, 30, 3), (16, 16, 3))
    ]


@pytest.mark.parametrize("family", ["clip", "siglip2"])
def test_a_folder_gives_the_logits_of_transformers(dual_folder, family):
    """From pictures and sentences to logits: processor, tokenizer, weights and model at once."""
    folder = dual_folder(family)
    loaded = load_dual(str(folder), dtype="float32")
    batch = loaded.processor.batch(images())
    batch["pixels"] = loaded.processor.normalise(batch["pixels"])
    apply = jax.jit(DualEncoder(loaded.config).apply)
    ours = apply({"params": loaded.params}, batch, loaded.tokenizer(TEXTS))

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


def test_towers_of_two_folders_and_one_of_a_mesh(tower_folders):
    """Two towers that never met get projections; on a mesh every leaf lies where the rules say, with equal numbers."""
    image, text = tower_folders
    one = load_dual(f"{image}+{text}", dtype="float32", seed=3)
    assert one.config.image.n_layers == 3
    assert one.config.image.features == one.config.text.features == 32
    assert one.params["text"]["projection"]["kernel"].shape == (48, 32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    many = load_dual(f"{image}+{text}", dtype="float32", seed=3, mesh=mesh)
    assert many.fingerprint == one.fingerprint
    kernel = many.params["image"]["layers"]["ffn"]["in_proj"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    for path, leaf in trees.flatten(one.params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(many.params)[path], err_msg=path)
    alone = trees.flatten(load_encoder(str(image), dtype="float32").params)
    for path, leaf in alone.items():
        np.testing.assert_array_equal(leaf, trees.flatten(one.params["image"])[path], err_msg=path)
    with pytest.raises(NaloraError, match="image tower"):
        load_dual(f"{text}+{image}", dtype="float32")


def test_what_is_wrong_is_named(dual_folder, tmp_path):
    clip = dual_folder("clip")
    folder = shutil.copytree(clip, tmp_path / "copy")
    whole = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]

    def refused(message: str, source: Any = folder, dtype: str = "float32", **options: Any) -> None:
        with pytest.raises(NaloraError, match=message):
            load_dual(str(source), dtype=dtype, **options)

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in whole.items() if key != name}, folder / "model.safetensors")
    refused(f"no {name}")
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
        refused("expected", source)
    refused("dtype", dtype="int8")
    refused("--vision.image-size: expected a multiple of the patch size, 4, found 10", clip, image_size=10)
    several = dual_folder("siglip2")
    refused("0 for a model that takes images of any shape, found 8", several, image_size=8)


# ---------------------------------------------------------------- adapters in PEFT's format


EVERYTHING = (
    LoRARule("image/layers/0/ffn/in_proj", rank=3, alpha=5.0),
    LoRARule("text/layers/1", rank=0),
    LoRARule("ffn/", rank=2),
    LoRARule("attn/", rank=4),
)


def layers_of(config: DualConfig) -> dict[str, range]:
    return {path: range(depth) for path, depth in config.depths().items()}


def adapted(loaded: LoadedDual, config: LoRAConfig) -> tuple[dict, AdapterSpec]:
    """Adapters that do something: random A and B."""
    spec = resolve(config, loaded.config.projection_shapes(), layers_of(loaded.config))
    lora = init_lora(loaded.config, spec, jax.random.key(0), loaded.params)

    def filled(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith("/b"):
            return leaf
        ranks = spec.target(path.removesuffix("/b")).ranks
        used = np.arange(leaf.shape[1])[None, :, None] < np.array(ranks)[:, None, None]
        return 0.3 * used * jax.random.normal(jax.random.key(len(path)), leaf.shape)

    return trees.map_named(filled, lora), spec


def test_peft_computes_the_same(dual_folder, tmp_path):
    folder = dual_folder("clip")
    loaded = load_dual(str(folder), dtype="float32")
    lora, spec = adapted(loaded, LoRAConfig(rules=EVERYTHING, rslora=True, dora=True))
    adapter, fingerprint = tmp_path / "adapter", loaded.fingerprint
    export_adapter(lora, spec, loaded.config, adapter, base_model_name=str(folder), fingerprint=fingerprint)
    verify_export(adapter, lora, spec, loaded.config, fingerprint=fingerprint)
    rng = np.random.default_rng(0)
    pixels, tokens = rng.standard_normal((2, 16, 16, 3)).astype(np.float32), rng.integers(4, 30, (3, 12))
    tokens[:, -1] = 2
    base = transformers.AutoModel.from_pretrained(folder).eval()
    given = {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)), "input_ids": torch.tensor(tokens)}
    with torch.no_grad(), warnings.catch_warnings():
        # A key that PEFT misses or ignores warns, and is an error; what it says about transformers is not ours.
        warnings.filterwarnings("ignore", category=FutureWarning)
        plain = base(**given).logits_per_image.numpy()
        wrapped = peft.PeftModel.from_pretrained(base, adapter).eval()
        theirs = wrapped(**given).logits_per_image.numpy()
    module = DualEncoder(loaded.config, spec)
    variables = {"params": loaded.params, "lora": lora}
    ours = jax.jit(module.apply)(variables, {"pixels": pixels}, {"tokens": tokens})
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)
    assert np.abs(plain - theirs).max() > 1e-2


def test_what_was_trained_as_a_whole_lies_beside(dual_folder, tmp_path):
    folder = dual_folder("vision-text-dual-encoder")
    loaded = load_dual(str(folder), dtype="float32")
    config = compose(loaded.config.image, loaded.config.text, 24)
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn", 2),)), config.projection_shapes(), layers_of(config))
    lora = init_lora(config, spec, jax.random.key(0), loaded.params)
    np.testing.assert_array_equal(
        lora["image"]["projection"]["kernel"], loaded.params["image"]["projection"]["kernel"]
    )
    lora["logit_scale"] = lora["logit_scale"] + 0.5
    export_adapter(lora, spec, config, tmp_path / "adapter", base_model_name="two towers")
    back, _ = import_adapter(tmp_path / "adapter", config)
    for path, leaf in trees.flatten(lora).items():
        np.testing.assert_array_equal(leaf, trees.flatten(back)[path], err_msg=path)
    (tmp_path / "adapter" / "trained.safetensors").unlink()
    with pytest.raises(NaloraError, match="trained.safetensors: expected a complete safetensors file"):
        import_adapter(tmp_path / "adapter", config)


def test_both_projections_of_a_gated_tower_are_one_module(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = sizes | {"model_type": "dinov2", "use_swiglu_ffn": True, "image_size": 16, "patch_size": 4}
    text = sizes | {"model_type": "bert", "vocab_size": 64, "max_position_embeddings": 12}
    config = compose(read_encoder(gated), read_encoder(text), 16)
    spec = resolve(
        LoRAConfig(rules=(LoRARule("image/.*ffn/", 2),)), config.projection_shapes(), layers_of(config)
    )
    lora = init_lora(config, spec, jax.random.key(0))
    lora = trees.map_named(lambda path, leaf: leaf + path.endswith("/b"), lora)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="pair")
    verify_export(tmp_path / "a", lora, spec, config)
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    assert names["base_model.model.vision_model.encoder.layer.1.mlp.weights_in.lora_A.weight"].shape == (
        4,
        32,
    )


def test_what_peft_would_drop_silently_is_refused(dual_folder, tmp_path):
    loaded = load_dual(str(dual_folder("clip")), dtype="float32")
    lora, spec = adapted(loaded, LoRAConfig(rules=(LoRARule("ffn", 2),)))
    export_adapter(lora, spec, loaded.config, tmp_path / "a", base_model_name="clip", fingerprint="one")
    with pytest.raises(NaloraError, match="an adapter of the base model two"):
        import_adapter(tmp_path / "a", loaded.config, fingerprint="two")
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"target_modules": settings["target_modules"][1:]}, "to cover"),
        ({"target_modules": ["fc1", "fc2", "q_proj"]}, "every module that target_modules names"),
        ({"r": 3}, "shape"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(NaloraError, match=message):
            import_adapter(tmp_path / "a", loaded.config)
