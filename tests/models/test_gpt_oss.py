"""gpt-oss with adapters on every projection: gradients against PEFT's, and its chat template."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.peft import export_adapter
from tests.models.family_fields import YARN
from tests.param_trees import params_from_tensors

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": YARN | {"truncate": False},
}
RANK, ALPHA = 3, 5.0


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (1.0 if "embed" in name else 0.3) + float("norm" in name)
            )
    return model


def adapters(config: ModelConfig) -> tuple[dict[str, Any], AdapterSpec]:
    rng, leaves, shapes = np.random.default_rng(0), {}, projection_shapes(config)
    for path, (*lead, d_in, d_out) in shapes.items():
        leaves[f"{path}/a"] = rng.normal(0, 0.3, (config.n_layers, *lead, d_in, RANK)).astype(np.float32)
        leaves[f"{path}/b"] = rng.normal(0, 0.3, (config.n_layers, *lead, RANK, d_out)).astype(np.float32)
    target = TargetSpec((RANK,) * config.n_layers, (ALPHA,) * config.n_layers)
    return unflatten(leaves), AdapterSpec(tuple((path, target) for path in sorted(shapes)))


def their_gradients(wrapped: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """PEFT's gradients by our paths. The stacked parameters have the ranks of gate and up one after the other."""
    found: dict[str, list[np.ndarray]] = {}
    modules, experts = dict(wrapped.get_base_model().named_modules()), config.n_experts

    def gradients(module: Any) -> tuple[np.ndarray, np.ndarray]:
        return tuple(getattr(module, name)["default"].weight.grad.numpy() for name in ("lora_A", "lora_B"))

    for layer in range(config.n_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            a, b = gradients(modules[f"model.layers.{layer}.self_attn.{name}"])
            found.setdefault(f"layers/attn/{name}/a", []).append(a.T)
            found.setdefault(f"layers/attn/{name}/b", []).append(b.T)
        down = modules[f"model.layers.{layer}.mlp.experts"]
        for module, names in ((down, ("down_proj",)), (down.base_layer, ("gate_proj", "up_proj"))):
            a, b = gradients(module)
            a = a.reshape(experts, -1, a.shape[-1]).transpose(0, 2, 1)  # [E, d_in, ranks]
            b = b.reshape(b.shape[0], -1, experts).transpose(2, 1, 0)  # [E, ranks, d_out]
            for i, name in enumerate(names):
                ranks = slice(i * RANK, (i + 1) * RANK)
                found.setdefault(f"layers/ffn/{name}/a", []).append(a[..., ranks])
                found.setdefault(f"layers/ffn/{name}/b", []).append(b[:, ranks, i :: len(names)])
    return {path: np.stack(layers) for path, layers in found.items()}


def test_gradients_of_every_adapter_are_pefts(theirs: Any, tmp_path: Any) -> None:
    config = ModelConfig.from_hf(theirs.config.to_dict())
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = params_from_tensors(config, state.__getitem__)
    lora, spec = adapters(config)
    export_adapter(lora, spec, config, tmp_path / "adapter", base_model_name="org/base")
    tokens = np.random.default_rng(1).integers(1, 64, (2, 24))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"), is_trainable=True)
    loss = wrapped(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    loss.backward()
    want_value = loss.item()
    model = Decoder(config, spec)

    @jax.jit
    @jax.value_and_grad
    def ours(lora: Any) -> jax.Array:
        variables = {"params": params, "lora": lora}
        logits = model.apply(variables, model.apply(variables, tokens), method="unembed")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    value, gradients = ours(lora)
    assert float(value) == pytest.approx(want_value, rel=1e-5)
    wanted, found = their_gradients(wrapped, config), flatten(gradients)
    assert wanted.keys() == found.keys()
    for path, want in wanted.items():
        assert np.abs(found[path] - want).max() <= 1e-4 * np.abs(want).max(), path


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks the weather up.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name", "enum": ["Rome", "Oslo"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "Hello?"}
CHATS: dict[str, tuple[list[dict[str, Any]], bool, list[dict[str, Any]] | None]] = {
    "system": ([{"role": "system", "content": "Be brief."}, ASKED], True, None),
    "thoughts": ([ASKED, {"role": "assistant", "thinking": "greet", "content": "Hi."}, ASKED], True, None),
    "answer": ([ASKED, {"role": "assistant", "thinking": "greet", "content": "Hi."}], False, None),
    "tools": (
        [
            ASKED,
            {"role": "assistant", "thinking": "ask", "tool_calls": [CALL]},
            {"role": "tool", "content": "{}"},
        ],
        True,
        [WEATHER],
    ),
}


@pytest.mark.trl  # whose package contains the released template
@pytest.mark.parametrize("chat", CHATS)
def test_harmony_is_rendered_as_by_transformers(chat: str) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    template = (Path(spec.origin).parent / "chat_templates" / "gptoss.jinja").read_text()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    ours = Tokenizer(backend, None, 0, 0, (0,), chat_template=template, special_tokens=special)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    messages, prompt, tools = CHATS[chat]
    options: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools}
    want = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert ours.render_chat(messages, **options) == want
    assert "<|start|>" in want
