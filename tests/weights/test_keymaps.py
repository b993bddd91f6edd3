"""Key maps: names against llama.cpp's own table, and what a wrong file is told."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import BUILT_IN, supported
from nalora_jax.models.stacks import param_shapes
from nalora_jax.weights.keymaps import ParamSlot, keymap_for
from tests.models.compared import SECTIONS, TEXT_HALVES
from tests.models.family_fields import LATENT
from tests.param_trees import params_from_tensors, split, tensors_from_params
from tests.weights.conftest import COMMON

SIZES = COMMON | {"num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
SIZES |= {"moe_intermediate_size": 12, "sliding_window": None}
GGUF = {name: family.gguf for name, family in BUILT_IN.items() if family.gguf}


def config_of(family: str, **changes) -> ModelConfig:
    raw = {**SIZES, "model_type": family, **changes}
    windowed = ("gemma2", "gemma3_text", "olmo3", "exaone4", "gpt_oss", "granite_swa")
    if family in windowed or family.startswith("gemma4"):
        raw["sliding_window"] = 8
    if family.startswith(("deepseek", "kimi", "glm4_moe_lite", "mistral4", "youtu")):
        raw |= LATENT | {"n_routed_experts": 3, "n_group": 1, "topk_group": 1}
    if family == "gemma4_text":
        raw |= {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 4}
    if family in TEXT_HALVES:
        raw["rope_parameters"] = SECTIONS
    return ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("family", "source"),
    [(family, "hf") for family in sorted(supported())] + [(family, "gguf") for family in GGUF],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_leaf_is_filled_and_goes_back(family, source, tied):
    config = config_of(family, tie_word_embeddings=tied)
    keymap = keymap_for(config, source)
    rng = np.random.default_rng(0)
    tensors = {t.name: rng.normal(size=t.shape).astype(np.float32) for t in keymap.tensors}
    filled = {path: np.zeros(shape, int) for path, shape in param_shapes(config).items()}
    for tensor in keymap.tensors:
        for slot, part in zip(tensor.slots, split(tensor, tensors[tensor.name]), strict=True):
            assert part.shape == filled[slot.path][slot.index].shape
            filled[slot.path][slot.index] += 1
    assert all(np.all(count == 1) for count in filled.values())
    params = params_from_tensors(config, tensors.__getitem__, source)
    back = dict(tensors_from_params(config, params, source))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(back[name], tensor, atol=1e-6)
    assert ("lm_head.weight" in back or "output.weight" in back) != tied


@pytest.mark.parametrize("family", sorted(GGUF))
def test_gguf_names_are_llama_cpps(family):
    """llama.cpp's converter renames transformers' tensors by this table."""
    architecture = GGUF[family].architecture
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    tied = gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[arch]
    config = config_of(family, tie_word_embeddings=tied, attention_bias=True)
    theirs = gguf.get_tensor_name_map(arch, config.n_layers)
    hf, ours = keymap_for(config, "hf"), keymap_for(config, "gguf")
    hf_names = {slot: tensor.name for tensor in hf.tensors for slot in tensor.slots}
    for gguf_name, slot in [
        (tensor.name, slot) for tensor in ours.tensors for slot in tensor.slots
    ]:
        hf_name = hf_names[ParamSlot(slot.path, slot.layer, 0 if "exps" in gguf_name else None)]
        if "exps" in gguf_name:  # the converter stacks the experts before it renames them
            hf_name = hf_name.replace("experts.0.", "experts.")
        # as the converter does before it renames it
        hf_name = hf_name.replace("e_score_correction_bias", "e_score_correction.bias")
        assert theirs.get_name(hf_name, try_suffixes=(".weight", ".bias")) == gguf_name


def test_a_family_without_gguf_names_is_refused_by_name():
    with pytest.raises(NaloraError, match="GGUF: expected one of llama, .*found olmoe"):
        keymap_for(config_of("olmoe"), "gguf")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_text_model_of_a_multimodal_file(prefix):
    keymap = keymap_for(config_of("gemma3_text"), "hf")
    found = {t.name.replace("model.", prefix, 1): t.shape for t in keymap.tensors}
    found |= {
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1, 2),
        "mm_projector.proj.0.weight": (2, 2),
        "lm_head.weight": (48, 16),
    }
    names = keymap.check(found, "folder")
    assert names["model.norm.weight"] == f"{prefix}norm.weight"
    assert len(names) == len(keymap.tensors)


def test_the_layer_that_predicts_further_tokens_is_left_out():
    keymap = keymap_for(config_of("glm4_moe"), "hf")
    assert keymap.is_ignored("model.layers.2.eh_proj.weight")
    assert not keymap.is_ignored("model.layers.1.mlp.gate.weight")
    assert not keymap.is_ignored("model.layers.20.mlp.gate.weight")


UP = "model.layers.{}.mlp.up_proj.{}".format
NEAREST = f"here {UP(0, 'weight')}\\), found the unknown tensor {UP(0, 'bias')}"
# Shapes that a file has besides or instead (None: not), and the message.
WRONG = {
    "missing": ({UP(1, "weight"): None}, f"no {UP(1, 'weight')}"),
    "a bias too many": ({UP(0, "bias"): (24,)}, NEAREST),
    "misshapen": ({"model.norm.weight": (17,)}, r"norm.weight: expected the shape \(16,\)"),
    "twice": ({"language_model.model.norm.weight": (16,)}, "once"),
    "no head": ({"lm_head.weight": None}, "no lm_head.weight"),
}


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named(damage, message):
    keymap = keymap_for(config_of("llama", tie_word_embeddings=False))
    found = {t.name: t.shape for t in keymap.tensors}
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (2,)
    keymap.check(found, "folder")
    with pytest.raises(NaloraError, match=message):
        keymap.check({name: shape for name, shape in (found | damage).items() if shape}, "folder")
