"""Adapters of dual encoders in PEFT's format, loaded by PEFT itself."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import DualEncoder, init_lora
from nalora_jax.models.vision.families import compose
from nalora_jax.weights.dual import LoadedDual, load_dual
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export

EVERYTHING = (
    LoRARule("image/layers/0/ffn/in_proj", rank=3, alpha=5.0),
    LoRARule("text/layers/1", rank=0),
    LoRARule("ffn/", rank=2),
    LoRARule("attn/", rank=4),
)
CASES = {
    "clip": LoRAConfig(rules=EVERYTHING),
    "clip, rsLoRA, the image tower only": LoRAConfig(rules=(LoRARule("image/.*ffn", 2),), rslora=True),
    "siglip": LoRAConfig(rules=EVERYTHING),
    "siglip, DoRA, the text tower only": LoRAConfig(rules=(LoRARule("text/", 3),), dora=True),
}


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


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(dual_folder, tmp_path, case) -> None:
    folder = dual_folder(case.partition(",")[0])
    loaded = load_dual(str(folder), dtype="float32")
    lora, spec = adapted(loaded, CASES[case])
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
    ours = module.apply({"params": loaded.params, "lora": lora}, {"pixels": pixels}, {"tokens": tokens})
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)
    assert np.abs(plain - theirs).max() > 1e-2


def test_what_was_trained_as_a_whole_lies_beside(dual_folder, tmp_path) -> None:
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


def test_what_peft_would_drop_silently_is_refused(dual_folder, tmp_path) -> None:
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
