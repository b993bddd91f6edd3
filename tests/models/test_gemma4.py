"""Gemma 4 with adapters on every projection: gradients against PEFT's, files in both directions, meshes."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import depths, gate_blocks, locate, param_shapes, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.merge import merge, write_merged
from nalora_jax.weights.peft import export_adapter, import_adapter
from nalora_jax.weights.peft_modules import module_layout
from nalora_jax.weights.tensors import load_params
from tests.observed import taps_of
from tests.param_trees import params_from_tensors

# Every feature of the released sizes at once.
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "sliding_window": 6,
    "final_logit_softcapping": 2.0,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
RANK, ALPHA, ROWS, SEQ = 3, 5.0, 8, 16
TOKENS = np.random.default_rng(1).integers(1, 64, (ROWS, SEQ)).astype(np.int32)


class Pair(NamedTuple):
    """The same weights in transformers and here, and adapters for them."""

    theirs: Any
    config: ModelConfig
    params: dict[str, Any]
    lora: dict[str, Any]
    spec: AdapterSpec


@functools.cache
def build() -> Pair:
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model("gemma4_text", **CONFIG)
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            spread = 0.05 if "embed_tokens.weight" in key else 0.2
            tensor.copy_(torch.randn(tensor.shape) * spread + float("norm" in key or "scal" in key))
    config = ModelConfig.from_hf(theirs.config.to_dict())
    state = {key: tensor.numpy().copy() for key, tensor in theirs.state_dict().items()}
    return Pair(theirs, config, params_from_tensors(config, state.__getitem__), *adapters(config))


def adapters(config: ModelConfig) -> tuple[dict[str, Any], AdapterSpec]:
    rng, leaves, layers = np.random.default_rng(0), {}, depths(config)
    for path, (*lead, d_in, d_out) in projection_shapes(config).items():
        leaves[f"{path}/a"] = rng.normal(0, 0.15, (layers[path], *lead, d_in, RANK)).astype(np.float32)
        leaves[f"{path}/b"] = rng.normal(0, 0.15, (layers[path], *lead, RANK, d_out)).astype(np.float32)
    targets = ((path, TargetSpec((RANK,) * n, (ALPHA,) * n)) for path, n in sorted(layers.items()))
    return unflatten(leaves), AdapterSpec(tuple(targets))


def loaded(folder: Any, config: ModelConfig, mesh: MeshConfig) -> Any:
    """The parameters of a folder, read into the shards of a mesh."""
    shapes = unflatten(
        {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(config).items()}
    )
    places = flatten(distributed.shardings(shapes, distributed.make_mesh(mesh), distributed.PARAM_RULES))
    return load_params(
        param_shapes(config),
        SafetensorsFolder(folder),
        keymap_for(config, "hf"),
        dtype="float32",
        shardings=places,
    )


@functools.cache
def measured(mesh: MeshConfig | None = None) -> Any:
    """Loss, gradients of the adapters and gate statistics."""
    _, config, params, lora, spec = build()
    sharding = None if mesh is None else NamedSharding(distributed.make_mesh(mesh), P(BATCH_AXES))
    stats = GateStatsConfig(stride=2, probe_stride=2)
    model = Decoder(
        config, spec, remat="dots", stats=replace(stats, sharding=sharding), activation_sharding=sharding
    )
    tokens = TOKENS
    if sharding is not None:
        params = jax.device_put(
            params, distributed.shardings(params, sharding.mesh, distributed.PARAM_RULES)
        )
        tokens = jax.device_put(tokens, sharding)

    @jax.jit
    def run(lora: Any, params: Any, tokens: Any) -> Any:
        def loss(lora: Any, taps: Any) -> Any:
            variables = {"params": params, "lora": lora, "gate_taps": taps}
            hidden = model.apply(variables, tokens)
            logits = jax.nn.log_softmax(model.apply(variables, hidden, method="unembed")[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

        value, (grads, stats) = jax.value_and_grad(loss, argnums=(0, 1))(lora, taps_of(model))
        return (value, stats), grads

    return jax.device_get(run(lora, params, tokens))


def in_peft(folder: Any, **options: Any) -> Any:
    theirs, config, _, lora, spec = build()
    export_adapter(lora, spec, config, folder, base_model_name="org/base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(theirs, str(folder), **options)


def their_gradients(wrapped: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """PEFT's gradients of Linear modules by our paths."""
    layout, places = module_layout(config), locate(config)
    modules = dict(wrapped.get_base_model().named_modules())
    found: dict[str, dict[int, np.ndarray]] = {}
    for host in layout.modules:
        for layer in range(config.n_layers):
            if (host.parts[0], layer) not in places:
                continue
            path, index = places[host.parts[0], layer]
            module = modules[layout.full_name(layer, host)]
            for ours, factor in (("a", module.lora_A), ("b", module.lora_B)):
                found.setdefault(f"{path}/{ours}", {})[index] = factor["default"].weight.grad.numpy().T
    return {path: np.stack([rows[i] for i in range(len(rows))]) for path, rows in found.items()}


def test_gradients_are_pefts_and_adapter_files_go_both_ways(tmp_path: Any) -> None:
    _, config, params, lora, spec = build()
    wrapped = in_peft(tmp_path / "adapter", is_trainable=True)
    try:
        output = wrapped(
            torch.tensor(TOKENS, dtype=torch.long), labels=torch.tensor(TOKENS, dtype=torch.long)
        )
        output.loss.backward()
        (value, _), gradients = measured()
        assert float(value) == pytest.approx(output.loss.item(), rel=1e-5)
        wanted, found = their_gradients(wrapped, config), flatten(gradients)
        assert {path for path in found if "/experts_ffn/" not in path} == wanted.keys()
        for path, want in wanted.items():
            # Scores are not scaled by the head's size, which amplifies rounding: 1.3e-4 with JAX 0.12.
            assert np.abs(found[path] - want).max() <= 2e-4 * np.abs(want).max(), path
    finally:
        wrapped.unload()
    again, spec_again = import_adapter(tmp_path / "adapter", config)
    assert spec_again == spec
    for path, leaf in flatten(lora).items():
        np.testing.assert_array_equal(flatten(again)[path], leaf, err_msg=path)
    raw = build().theirs.config.to_dict()
    write_merged(tmp_path / "merged", config, params, lora, spec, hf_config=raw, tokenizer=lambda _: None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = merged(torch.tensor(TOKENS, dtype=torch.long)).logits
    assert (logits - output.logits).abs().max() <= 1e-4 * output.logits.abs().max()
    wanted = flatten(merge(params, lora, spec))
    for path, leaf in flatten(loaded(tmp_path / "merged", config, MeshConfig(2, 2, 2))).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1e-6, err_msg=path)


def test_eight_devices_are_one() -> None:
    (value, statistics), gradients = measured(MeshConfig(2, 2, 2))
    (want_value, want_statistics), want_gradients = measured()
    assert float(value) == pytest.approx(float(want_value), rel=1e-5)
    over_shards = jax.tree.map(lambda x: x.sum(axis=1), statistics)
    for found, wanted in ((gradients, want_gradients), (over_shards, want_statistics)):
        found, wanted = flatten(found), flatten(wanted)
        assert found.keys() == wanted.keys()
        for path, want in wanted.items():
            np.testing.assert_allclose(
                found[path], want, atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=path
            )
    assert {path.rpartition("/")[0] for path in flatten(want_statistics)} == gate_blocks(
        build().config
    ).keys()
