"""Weights of the base that are trained themselves, beside transformers and torch's AdamW."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import nalora_jax
from nalora_jax import config as cfg
from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.common import trees
from nalora_jax.errors import Interrupted
from nalora_jax.kinds.model_export import check_files
from nalora_jax.loading.adapted import load
from nalora_jax.mesh.distributed import make_global_batch
from nalora_jax.method.tuned import cast_tuned
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.progress import Progress
from nalora_jax.weights.merge import merged_tensors
from tests import tiny
from tests.param_trees import params_from_tensors
from tests.refused import Call, table_test
from tests.train.test_peft_training import their_loss

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers

STEPS = 10
OPTIMIZER = cfg.OptimizerConfig(
    learning_rate=1e-3, schedule="constant", warmup_share=0, clip_norm=0, weight_decay=0.1, eps=1e-5
)
RULES = cfg.LoRAConfig(rules=(cfg.LoRARule("ffn/gate_proj", 2),))


def their_model(*, tied: bool) -> Any:
    model = tiny.torch_llama()
    # torch gives the padding token's embedding no gradient, also where a text has that token
    model.model.embed_tokens.padding_idx = None
    if tied:
        return model
    settings = model.config.to_dict() | {"tie_word_embeddings": False}
    untied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    untied.load_state_dict(model.state_dict())
    untied.model.embed_tokens.padding_idx = None
    return untied


def our_start(model: Any, tune: tuple[str, ...], **changes: Any) -> tuple[Assembly, ModelConfig]:
    base = ModelConfig.from_hf(model.config.to_dict())
    params = params_from_tensors(base, lambda name: model.get_parameter(name).detach().numpy())
    settings: dict[str, Any] = {
        "lora": RULES,
        "mechanisms": (),
        "optimizer": OPTIMIZER,
        "compute": cfg.ComputeConfig(dtype="float32"),
        "tune": tune,
    }
    config = cfg.RunConfig(**settings | changes)
    return assemble(config, base, jax.tree.map(jnp.asarray, params), tiny.one_device()), base


def batches(count: int) -> list[dict[str, np.ndarray]]:
    return [tiny.whole_batch(seed, (1, 4, 12), share=0.5) for seed in range(count)]


@pytest.mark.parametrize("tied", [True, False])
def test_ten_steps_of_full_tuning_equal_torch(tied):
    model = their_model(tied=tied)
    assembly, base = our_start(model, ("full",))
    state = assembly.state
    theirs = copy.deepcopy(model)
    settings = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs.parameters(), **settings)
    assert not trees.flatten(assembly.params)
    for batch in batches(STEPS):
        state, metrics = assembly.step(assembly.params, state, batch)
        loss = their_loss(theirs, batch)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights, adapters = cast_tuned(assembly.params, state.lora, "float32")
    assert adapters == {}
    for name, ours in merged_tensors(base, weights, None, assembly.spec):
        expected = theirs.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5, err_msg=name)


def test_patterns_train_what_they_name_besides_the_adapters():
    """Layers that are not named keep their bits, also with weight decay."""
    assembly, _ = our_start(their_model(tied=False), ("norm", "layers/1/ffn/up_proj"))
    before = jax.device_get(assembly.state.lora)
    frozen = trees.flatten(assembly.params)
    assert "layers/ffn/up_proj/kernel" not in frozen
    assert "layers/ffn/gate_proj/kernel" in frozen
    state = assembly.state
    for batch in batches(3):
        state, _ = assembly.step(assembly.params, state, batch)
    moved = jax.tree.map(lambda old, new: np.abs(np.asarray(new) - old), before, state.lora)
    leaves = trees.flatten(moved)
    assert leaves["layers/ffn/gate_proj/b"].max() > 0
    assert leaves["tuned/final_norm/scale"].min() > 0
    assert leaves["tuned/layers/attn_norm/scale"].min() > 0
    up = leaves["tuned/layers/ffn/up_proj/kernel"]
    assert up[0].max() == 0
    assert up[1].min() > 0


@pytest.mark.parametrize("tune", [("full",), ("o_proj", "embed")])
def test_selected_weights_have_the_gradients_of_torch(tune):
    """One step of SGD is the gradient; adapters start at zero and change no gradient of weights."""
    model = their_model(tied=True)
    sgd = replace(OPTIMIZER, name="sgd", learning_rate=1.0, weight_decay=0.0)
    assembly, base = our_start(model, tune, optimizer=sgd)
    before, _ = cast_tuned(assembly.params, assembly.state.lora, "float32")
    before = dict(merged_tensors(base, before, None, AdapterSpec()))
    state, _ = assembly.step(assembly.params, assembly.state, batches(1)[0])
    after, _ = cast_tuned(assembly.params, state.lora, "float32")
    their_loss(model, batches(1)[0]).backward()
    moved = set()
    for name, ours in merged_tensors(base, after, None, AdapterSpec()):
        gradient = before[name] - ours
        if not gradient.any():
            continue
        moved.add(name)
        expected = model.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=2e-6, err_msg=name)
    chosen = [name for name, _ in model.named_parameters()]
    if tune != ("full",):
        chosen = [name for name in chosen if "o_proj" in name or "embed" in name]
    assert moved == set(chosen)


def test_shards_train_the_same_weights_and_share_the_memory():
    """12 bytes a parameter between steps: weights and two moments, in float32."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512}
    base = ModelConfig.from_hf(tiny.HF | sizes)
    config = cfg.RunConfig(
        lora=RULES,
        tune=("full",),
        mechanisms=(),
        optimizer=OPTIMIZER,
        compute=cfg.ComputeConfig(dtype="float32"),
    )
    batch = tiny.whole_batch(0, (1, 8, 8), vocab=512)
    results = []
    for mesh in (cfg.MeshConfig(1, 1, 1), cfg.MeshConfig(1, 8, 1)):
        assembly, _ = tiny.assembled(config, base, mesh)
        placed = make_global_batch(batch, assembly.mesh, rows_axis=1)
        arguments = (assembly.params, assembly.state, placed)
        memory = assembly.step.lower(*arguments).compile().memory_analysis()
        parameters = trees.count_elements(assembly.state.lora) / mesh.fsdp
        assert memory.argument_size_in_bytes / parameters < 12.5
        state, metrics = assembly.step(*arguments)
        results.append((jax.device_get(state.lora), float(metrics["loss"])))
    (one, loss), (eight, same) = results
    assert same == pytest.approx(loss, abs=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), one, eight)


@pytest.fixture
def on_one_device(tmp_path):
    with tiny.on_named_devices(tmp_path / "cache"):
        yield


def test_a_run_writes_a_model_for_transformers_and_resumes(tmp_path, on_one_device):
    """A run that is stopped after two of four steps ends with the same model."""
    settings = {"tune": ("full",), "steps": 4, "compute": cfg.ComputeConfig(dtype="float32")}
    config = tiny.make_config(tmp_path, output=str(tmp_path / "whole"), **settings)
    whole = nalora_jax.run(config)
    assert whole.adapter == tmp_path / "whole" / "model"
    parts = replace(config, output=str(tmp_path / "parts"))

    advance = Progress.advance

    def stop_at_2(self: Progress, step: int) -> None:
        advance(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", stop_at_2)
        with pytest.raises(Interrupted):
            nalora_jax.run(parts)
    resumed = nalora_jax.run(replace(parts, resume=True))
    tokens = torch.tensor([[3, 5, 7, 9]])
    logits = []
    for result in (whole, resumed):
        model = transformers.AutoModelForCausalLM.from_pretrained(result.adapter)
        with torch.no_grad():
            logits.append(model(tokens).logits.numpy())
    np.testing.assert_array_equal(*logits)
    for place in (tmp_path / "whole", whole.adapter):
        ours = load(place, dtype="float32")
        found = tiny.logits_of(ours.module, ours.variables, tokens.numpy())
        np.testing.assert_allclose(found, logits[0], rtol=1e-4, atol=1e-5)
    start = load(Path(config.model), dtype="float32")
    assert (
        np.abs(tiny.logits_of(start.module, start.variables, tokens.numpy()) - found).max() > 0.01
    )


EXPERTS = tiny.HF | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def specified(raw: dict[str, Any], *tune: str) -> Call:
    return lambda patch, folder: adapter_spec(cfg.RunConfig(tune=tune), ModelConfig.from_hf(raw))


def other_files(patch: pytest.MonkeyPatch, folder: Path) -> None:
    base = tiny.make_model(folder / "model")
    model = load(base, dtype="float32").base
    tensors = merged_tensors(model.config, model.params, None, AdapterSpec())
    check_files(base, ((name, tensor + 1) for name, tensor in tensors))


REFUSALS: dict[str, tuple[Call, str]] = {
    "a pattern without a match": (
        specified(tiny.HF, "gaet_proj"),
        "--tune: expected every pattern to match something, found 'gaet_proj'",
    ),
    "files that are not the trained weights": (
        other_files,
        "expected the trained weights, found others",
    ),
    "weights of experts": (
        specified(EXPERTS, "ffn/.*(gate|up|down)_proj"),
        "--tune: expected projections, biases, norms, embedding and head of a model of dense text",
    ),
}
test_it_is_refused = table_test(REFUSALS)
