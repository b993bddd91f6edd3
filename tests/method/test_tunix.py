"""Tunix's models and its `PeftTrainer` as they are, with LoRA and with NA-LoRA (needs
``google-tunix``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from nalora_jax import adapt, export_adapter, merge_nnx, nalora
from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.method.transform import gate_state
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve

# Tunix 0.1.7 calls what newer Flax and JAX deprecate.
pytestmark = [
    pytest.mark.tunix,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("their_broadcasting"),
]
LAYERS, D, F, VOCAB, HEADS, KV, WIDTH, RANK = 2, 32, 64, 50, 4, 2, 8, 4
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (4, 16)).astype(np.int32)


@pytest.fixture
def their_broadcasting() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def llama() -> tuple[Any, str, Any]:
    from tunix.models.llama3 import model

    config = model.ModelConfig(
        LAYERS, VOCAB, D, F, HEADS, WIDTH, KV, 10_000, 1e-5, weight_tying=True
    )
    return with_weights(model.Llama3(config, rngs=nnx.Rngs(0))), "silu", model.Einsum


def gemma() -> tuple[Any, str, Any]:
    from tunix.models.gemma import model

    large = model.ModelConfig.gemma_2b()
    sizes = {
        "num_embed": VOCAB,
        "embed_dim": D,
        "hidden_dim": F,
        "num_heads": HEADS,
        "head_dim": WIDTH,
    }
    config = replace(
        large, num_layers=LAYERS, attention_types=large.attention_types[:LAYERS], **sizes
    )
    return with_weights(model.Gemma(config, rngs=nnx.Rngs(0))), "gelu_new", model.Einsum


ATTENTION = {
    llama: ("q_proj", "k_proj", "v_proj", "o_proj"),
    gemma: ("q_einsum", "kv_einsum", "attn_vec_einsum"),
}


def with_weights(model: Any) -> Any:
    """Tunix starts FFN kernels at zero, to be loaded over."""
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear):
            kernel = jax.random.normal(jax.random.key(i), module.kernel[...].shape)
            module.kernel[...] = kernel / np.sqrt(kernel.shape[0])
    return model


def model_input(_: Any) -> dict[str, Any]:
    batch, length = TOKENS.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.ones(TOKENS.shape, bool)
    return {
        "input_tokens": TOKENS,
        "input_mask": mask,
        "positions": positions,
        "attention_mask": causal,
    }


def logits(model: Any) -> jax.Array:
    given = model_input(None)
    return model(given["input_tokens"], given["positions"], None, given["attention_mask"])[0]


@pytest.mark.parametrize("rules", [(), ("curvature_cap:warmup=2",)], ids=["lora", "default"])
@pytest.mark.parametrize("family", [llama, gemma])
def test_the_trainer_of_tunix_trains_an_adapted_model(
    family: Any, rules: Any, tmp_path: Path
) -> None:
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    model, activation, einsum = family()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    layers, gates = {"mlp/|_proj|_einsum": RANK}, {"gate_proj": activation}
    adapted, mechanisms = adapt(model, layers, gates, rules=rules, classes={einsum: "einsum_str"})
    np.testing.assert_array_equal(logits(adapted), logits(model))
    flat = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
    names = {"/".join(map(str, path[2:-2])) for path, _ in flat if path[-1] == "a"}
    assert names == {f"attn/{name}" for name in ATTENTION[family]} | {
        f"mlp/{name}_proj" for name in ("gate", "up", "down")
    }
    optimizer = nalora(optax.adamw(1e-2), mechanisms)
    trainer = PeftTrainer(adapted, optimizer, TrainingConfig(eval_every_n_steps=1000, max_steps=8))
    trainer = trainer.with_gen_model_input_fn(model_input)
    start = float(loss(adapted))
    data = [TrainingInput(input_tokens=TOKENS, input_mask=np.ones(TOKENS.shape, bool))] * 8
    trainer.train(data)
    assert float(loss(adapted)) < start - 0.05
    state = gate_state(nnx.as_pure(trainer.optimizer.opt_state))
    assert state is not None
    if rules:
        assert int(state.count) == 8
        assert all(float(jnp.max(leaf)) > 0 for leaf in jax.tree.leaves(state.memory))
    after = trees.flatten(nnx.to_pure_dict(nnx.state(adapted)))
    for path, leaf in trees.flatten(before).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    np.testing.assert_allclose(logits(merge_nnx(adapted)), logits(adapted), rtol=1e-3, atol=1e-4)
    if family is llama:
        check_export(adapted, tmp_path)


def loss(model: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(model)[:, :-1], TOKENS[:, 1:]
    ).mean()


def check_export(adapted: Any, folder: Path) -> None:
    """Writes PEFT's files of a Llama's adapters, and compares their tensors with the model's."""
    flat = trees.flatten(nnx.to_pure_dict(nnx.state(adapted, nnx.LoRAParam)))
    leaves: dict[str, list[Any]] = {}
    for layer in range(LAYERS):
        for path, leaf in flat.items():
            match path.replace("/mlp/", "/ffn/").split("/"):
                case ["layers", number, block, name, "lora", "a" | "b" as factor] if (
                    int(number) == layer
                ):
                    leaves.setdefault(f"layers/{block}/{name}/{factor}", []).append(leaf)
    lora = trees.unflatten({path: np.stack(of_layers) for path, of_layers in leaves.items()})
    hf = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": F}
    hf |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV}
    config = ModelConfig.from_hf(hf | {"head_dim": WIDTH, "tie_word_embeddings": True})
    spec = resolve(LoRAConfig(rules=(LoRARule("", RANK),)), projection_shapes(config), LAYERS)
    export_adapter(lora, spec, config, folder / "adapter", base_model_name="tiny/llama")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == LAYERS * 7 * 2
    for theirs, ours in (("self_attn.q_proj", "attn/q_proj"), ("mlp.gate_proj", "mlp/gate_proj")):
        written = tensors[f"base_model.model.model.layers.1.{theirs}.lora_B.weight"]
        np.testing.assert_allclose(
            written, np.asarray(flat[f"layers/1/{ours}/lora/b"]).T, rtol=1e-6
        )
        assert np.abs(written).max() > 0
