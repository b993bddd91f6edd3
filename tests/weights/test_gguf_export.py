from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import BUILT_IN
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.base import load_model
from nalora_jax.weights.gguf_export import (
    verify_adapter_gguf,
    write_adapter_gguf,
)
from nalora_jax.weights.merge import merged_tensors
from nalora_jax.weights.peft import export_adapter
from tests import tiny

TARGETS = {
    "ffn/gate_proj": ((4, 2), (8.0, 8.0)),
    "ffn/down_proj": ((0, 4), (1.0, 5.0)),
    "attn/q_proj": ((3, 1), (1.5, 3.5)),
    "attn/k_proj": ((4, 4), (8.0, 8.0)),
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]


def random_params(config: ModelConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return unflatten({p: rng.standard_normal(s, np.float32) * 0.3 for p, s in param_shapes(config).items()})


def write_base(path: Path, config: ModelConfig, params: dict[str, Any]) -> Path:
    """A base as llama.cpp's converter would write it, with metadata of several types."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([2, 3, 3, *[1] * 29])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0].content }}")
    tiny.write_gguf(writer, config, params)
    return path


@pytest.fixture
def base(tmp_path, random_lora):
    config = ModelConfig.from_hf(LLAMA)
    params = random_params(config)
    lora, spec = random_lora(config, TARGETS)
    return config, params, lora, spec, write_base(tmp_path / "base.gguf", config, params)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "qwen3_moe"])
def test_adapter_file_is_the_difference_of_merged_and_base(family, tiny_model, random_lora, tmp_path):
    """By llama.cpp's rule: W + alpha / rank * B A, with the rank of each tensor, in llama.cpp's row order."""
    _, config = tiny_model(family)
    targets = {name: (ranks + ranks[:1], alphas + alphas[:1]) for name, (ranks, alphas) in TARGETS.items()}
    lora, spec = random_lora(config, targets, rslora=True)
    params = random_params(config)

    write_adapter_gguf(tmp_path / "a.gguf", config, lora, spec)

    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == BUILT_IN[family].gguf.architecture
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    before = dict(merged_tensors(config, params, None, AdapterSpec(), source="gguf"))
    adapted = 0
    for name, after in merged_tensors(config, params, lora, spec, source="gguf"):
        a, b = stored.pop(f"{name}.lora_a", None), stored.pop(f"{name}.lora_b", None)
        delta = after - before[name]
        if a is None:
            assert not delta.any(), name
            continue
        adapted += 1
        np.testing.assert_allclose(alpha / a.shape[-2] * (b @ a), delta, atol=1e-5, err_msg=name)
    assert adapted >= 6
    assert not stored


def test_refusals(base, tmp_path, random_lora):
    config, _, lora, spec, source = base
    dora, dora_spec = random_lora(config, TARGETS, dora=True)
    with pytest.raises(NaloraError, match="DoRA"):
        write_adapter_gguf(tmp_path / "m.gguf", config, dora, dora_spec)
    with pytest.raises(NaloraError, match=r"base\.gguf: expected a new file"):
        write_adapter_gguf(source, config, lora, spec)
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


# ---------------------------------------------------------------- the verbs


@pytest.fixture
def adapter(base, tmp_path):
    """The adapter of `base` in PEFT's format."""
    config, _, lora, spec, source = base
    fingerprint = load_model(str(source), dtype="float32").fingerprint
    settings = {"base_model_name": str(source), "fingerprint": fingerprint}
    return export_adapter(lora, spec, config, tmp_path / "peft", **settings)


def test_export_for_llama_cpp_is_the_adapter_file_read_back(base, adapter, tmp_path, capsys):
    config, _, lora, spec, _ = base
    out = tmp_path / "out.gguf"
    assert main(["export", str(adapter), "--for", "gguf", "--output", str(out)]) == 0
    assert "adapter for llama.cpp, read back and compared" in capsys.readouterr().out
    direct = write_adapter_gguf(tmp_path / "direct.gguf", config, lora, spec)
    assert out.read_bytes() == direct.read_bytes()
    for factor in (1.001, np.nan):
        other = {path: leaf * factor for path, leaf in flatten(lora).items()}
        with pytest.raises(NaloraError, match="expected the adapter that was exported"):
            verify_adapter_gguf(out, config, unflatten(other), spec)
