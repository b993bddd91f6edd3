"""Tables that are trained as a whole (PEFT's modules_to_save): against PEFT both ways, merged, and trained."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    PreferenceConfig,
    RunConfig,
    check,
)
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head, WholeHead, trained_cross_entropy
from nalora_jax.train.program import assemble
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.array([[1, 5, 9, 30, 7, 11, 2, 40], [3, 3, 8, 21, 44, 6, 17, 9]])


def wrap(model: Any, **config: Any) -> Any:
    """The model in PEFT, everything that is trained random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], **config
        )
        wrapped = peft.get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(config: ModelConfig, params: Any, lora: Any, spec: Any) -> np.ndarray:
    return np.asarray(tiny.logits_of(Decoder(config, spec), {"params": params, "lora": lora}, TOKENS))


def load_in_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def save(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


MODES = {
    "both, untied": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both, tied": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding, tied": (True, {"modules_to_save": ["embed_tokens"]}),
    "embedding, kept tied": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "head, untied": (False, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("mode", MODES)
def test_peft_s_files_mean_the_same_here_and_ours_the_same_there(tiny_model, params_of, tmp_path, mode):
    tied, settings = MODES[mode]
    model, config = tiny_model("llama", tie_word_embeddings=tied)
    params = params_of(model, config)
    plain = torch_logits(model)
    wrapped = wrap(model, **settings)
    expected = torch_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.1
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    np.testing.assert_allclose(our_logits(config, params, lora, spec), expected, rtol=1e-4, atol=1e-4)

    export_adapter(lora, spec, config, tmp_path / "ours", base_model_name="base")
    assert verify_export(tmp_path / "ours", lora, spec, config) == 0.0
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == list(spec.saved)
    again, _ = tiny_model("llama", tie_word_embeddings=tied)
    np.testing.assert_allclose(
        torch_logits(load_in_peft(again, tmp_path / "ours")), expected, rtol=1e-4, atol=1e-4
    )


def test_a_changed_table_or_a_missing_one_is_found(tiny_model, tmp_path):
    model, config = tiny_model("llama", tie_word_embeddings=False)
    folder = save(wrap(model, modules_to_save=["embed_tokens", "lm_head"]), tmp_path / "a")
    lora, spec = import_adapter(folder, config)
    leaves = trees.flatten(lora)
    leaves["lm_head/kernel"] = leaves["lm_head/kernel"] + 1e-3
    export_adapter(trees.unflatten(leaves), spec, config, tmp_path / "b", base_model_name="base")
    with pytest.raises(NaloraError, match="lm_head: expected the adapter that was exported"):
        verify_export(tmp_path / "b", lora, spec, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight"
    for change, said in (
        (
            lambda t: {name: value for name, value in t.items() if name != key},
            "expected the trained lm_head",
        ),
        (lambda t: t | {key: np.pad(t[key], ((0, 2), (0, 0)))}, "an adapter with new tokens needs a base"),
    ):
        save_file(change(tensors), folder / "adapter_model.safetensors")
        with pytest.raises(NaloraError, match=said):
            import_adapter(folder, config)


def test_where_there_is_no_place_for_tables_they_are_refused(tiny_model, tmp_path):
    model, config = tiny_model("llama")
    lora, spec = import_adapter(save(wrap(model, modules_to_save=["embed_tokens"]), tmp_path / "a"), config)
    with pytest.raises(NaloraError, match="--for vllm: expected an adapter of projections alone"):
        export_adapter(lora, spec, config, tmp_path / "v", base_model_name="base", target="vllm")
    saved = LoRAConfig(modules_to_save=("lm_head",))
    for flag, changes in (
        ("--lora.init", {"lora": LoRAConfig(init="pissa", modules_to_save=("lm_head",))}),
        ("--vision.task", {"lora": saved, "vision": replace(RunConfig().vision, task="classify")}),
        ("--preference.loss", {"lora": saved, "preference": PreferenceConfig("dpo")}),
    ):
        with pytest.raises(NaloraError, match=f"{flag}: expected .* with --lora.modules-to-save"):
            check(replace(RunConfig(), **changes))


def test_the_head_s_gradient_is_autodiff_s():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 10, 16))
    kernel = jax.random.normal(keys[1], (16, 40))
    targets = jax.random.randint(keys[2], (3, 10), 0, 40)
    weights = jax.random.uniform(keys[3], (3, 10)) * (jax.random.uniform(keys[3], (3, 10)) > 0.3)
    head = Head(softcap=4.0, scale=0.7)

    def plain(hidden, kernel):
        logits = 4.0 * jnp.tanh(0.7 * hidden @ kernel / 4.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -2 * jnp.sum(weights * picked)

    expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, kernel)
    for chunk, shards in ((0, 1), (8, 1), (3, 3)):

        def ours(hidden, kernel, chunk=chunk, shards=shards):
            return 2 * trained_cross_entropy(
                hidden, WholeHead(kernel), targets, weights, head, Numerics(), chunk=chunk, shards=shards
            )

        found, back = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, kernel)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), back, gradients)


def test_a_step_trains_the_tables_by_their_gradient(tiny_model, params_of):
    model, config = tiny_model("llama")
    params = jax.tree.map(jnp.asarray, params_of(model, config))
    lora = LoRAConfig(rules=(LoRARule("ffn", 2),), modules_to_save=("embed_tokens", "lm_head"))
    settings = RunConfig(
        steps=4, lora=lora, compute=ComputeConfig(dtype="float32"), mesh=MeshConfig(1, 1, 1)
    )
    batch = {
        "tokens": TOKENS[None, :, :-1],
        "targets": TOKENS[None, :, 1:],
        "loss_weights": np.ones((1, 2, 7), np.float32),
        "segment_ids": np.ones((1, 2, 7), np.int32),
        "positions": np.tile(np.arange(7, dtype=np.int32), (1, 2, 1)),
    }

    def plain(lora):
        module = Decoder(config, assembly.spec)
        hidden = module.apply({"params": params, "lora": lora}, TOKENS[:, :-1])
        logits = hidden @ lora["lm_head"]["kernel"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    results = []
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2)):
        devices = distributed.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor])
        placed = jax.device_put(params, distributed.shardings(params, devices, distributed.PARAM_RULES))
        assembly = assemble(settings, config, placed, devices)
        start = jax.device_get(assembly.state.lora)
        np.testing.assert_array_equal(start["embed"]["embedding"], params["embed"]["embedding"])
        value, gradients = jax.jit(jax.value_and_grad(plain))(start)
        state, metrics = assembly.step(
            assembly.view(placed),
            assembly.state,
            distributed.make_global_batch(batch, devices, rows_axis=1),
        )
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        results.append(jax.device_get(state.lora))
        moved = trees.flatten(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), results[-1], start))
        assert moved["embed/embedding"] > 0
        assert moved["lm_head/kernel"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)
