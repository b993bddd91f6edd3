from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from nalora_jax.__main__ import main
from nalora_jax.errors import NaloraError
from nalora_jax.loading.base import load_model
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.tokenizer import AddedTokens
from nalora_jax.trees import flatten, unflatten
from nalora_jax.weights.gguf_export import (
    ARCHITECTURES,
    KINDS,
    verify_adapter_gguf,
    write_adapter_gguf,
    write_merged_gguf,
)
from nalora_jax.weights.merge import merge, merged_tensors, write_merged
from nalora_jax.weights.new_tokens import tokenizer_writer, with_added
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


def fields(path: Path) -> dict[str, Any]:
    return {name: (field.types, field.contents()) for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-6), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 2e-2)])
def test_merged_file_loads_as_the_merged_model(kind, error, base, tmp_path):
    config, params, lora, spec, source = base

    write_merged_gguf(tmp_path / "m.gguf", config, params, lora, spec, base=source, kind=kind)

    loaded = load_model(str(tmp_path / "m.gguf"), dtype="float32")
    assert loaded.config == config
    expected = flatten(merge(params, lora, spec))
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_allclose(
            leaf, expected[path], atol=error * np.abs(expected[path]).max(), err_msg=path
        )
    assert loaded.tokenizer.encode("ab a") == load_model(str(source), dtype="float32").tokenizer.encode(
        "ab a"
    )
    before, after = fields(source), fields(tmp_path / "m.gguf")
    own = {"GGUF.kv_count", "general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.items() if k not in own} == {
        k: v for k, v in before.items() if k not in own
    }
    assert after["general.file_type"][1] == KINDS[kind]
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert kinds["blk.0.ffn_gate.weight"] == kind
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    # Rows of 48 do not fill Q8_0's blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if kind == "Q8_0" else kind)


def test_merged_file_in_transformers(base, tmp_path):
    """transformers' own GGUF reader gives the merged weights, rotated rows in their place."""
    transformers = pytest.importorskip("transformers")
    config, params, lora, spec, source = base
    write_merged_gguf(tmp_path / "m.gguf", config, params, lora, spec, base=source, kind="F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in merged_tensors(config, params, lora, spec):
        np.testing.assert_allclose(theirs[name], tensor, atol=1e-6, err_msg=name)


def test_frequency_factors_are_kept(base, tmp_path):
    config, params, _, _, _ = base
    path = tmp_path / "factors.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tiny.write_gguf(writer, config, params, **{"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)})
    write_merged_gguf(tmp_path / "m.gguf", config, params, None, AdapterSpec(), base=path, kind="Q8_0")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["rope_freqs.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(stored["rope_freqs.weight"].data, [1, 1, 4, 8])
    values = dequantize(stored["token_embd.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_allclose(values, params["embed"]["embedding"], atol=0.01)


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
    assert reader.fields["general.architecture"].contents() == ARCHITECTURES[family]
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
    config, params, lora, spec, source = base
    with pytest.raises(NaloraError, match="F32, F16, BF16, Q8_0"):
        write_merged_gguf(tmp_path / "m.gguf", config, params, lora, spec, base=source, kind="Q4_K")
    with pytest.raises(NaloraError, match=r"convert_hf_to_gguf\.py"):
        write_merged_gguf(tmp_path / "m.gguf", config, params, lora, spec, base=tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("not a model, whatever its name says")
    with pytest.raises(NaloraError, match=r"convert_hf_to_gguf\.py"):
        write_merged_gguf(tmp_path / "m.gguf", config, params, lora, spec, base=tmp_path / "text.gguf")
    other = ModelConfig.from_hf(LLAMA | {"intermediate_size": 64})
    with pytest.raises(
        NaloraError, match=r"base\.gguf: blk\.0\.ffn_gate\.weight: expected shape \(64, 32\)"
    ):
        write_merged_gguf(
            tmp_path / "m.gguf", other, random_params(other), None, AdapterSpec(), base=source
        )
    dora, dora_spec = random_lora(config, TARGETS, dora=True)
    with pytest.raises(NaloraError, match="DoRA"):
        write_adapter_gguf(tmp_path / "m.gguf", config, dora, dora_spec)
    with pytest.raises(NaloraError, match=r"base\.gguf: expected a new file"):
        write_adapter_gguf(source, config, lora, spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "text.gguf"]


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


def test_merge_writes_one_gguf_file(base, adapter, tmp_path, capsys):
    config, params, lora, spec, source = base
    out = tmp_path / "out.gguf"
    assert main(["merge", str(adapter), "--gguf", "Q8_0", "--output", str(out)]) == 0
    direct = write_merged_gguf(
        tmp_path / "direct.gguf", config, params, lora, spec, base=source, kind="Q8_0"
    )
    assert out.read_bytes() == direct.read_bytes()
    assert main(["merge", str(adapter), "--gguf", "F16", "--output", str(out)]) == 2
    assert "--output: expected a new file" in capsys.readouterr().err
    assert main(["merge", str(adapter), "--gguf", "F16", "--output", str(tmp_path / "folder")]) == 2
    assert "--output: expected a name that ends in .gguf" in capsys.readouterr().err


def test_a_gguf_file_is_merged_of_a_gguf_base_only(base, tmp_path, capsys):
    config, _, lora, spec, source = base
    folder = tmp_path / "hf"
    loaded = load_model(str(source), dtype="float32")
    write_merged(
        folder,
        config,
        loaded.params,
        None,
        AdapterSpec(),
        hf_config=loaded.hf_config,
        tokenizer=loaded.tokenizer,
    )
    adapter = export_adapter(lora, spec, config, tmp_path / "peft", base_model_name=str(folder))
    assert main(["merge", str(adapter), "--gguf", "F16", "--output", str(tmp_path / "out.gguf")]) == 2
    assert "--gguf: expected a base that comes from a GGUF file" in capsys.readouterr().err


def test_trained_tables_and_new_tokens_go_into_the_file(base, tmp_path):
    """Of a tied base: the file has a head of its own, and a token for every row."""
    _, _, lora, spec, source = base
    loaded = with_added(load_model(str(source), dtype="float32"), AddedTokens(("<out>",), ("<go>",)))
    rows = loaded.config.vocab_size
    assert rows == 34
    rng = np.random.default_rng(1)
    tables = {"embed/embedding": (rows, 32), "lm_head/kernel": (32, rows)}
    leaves = flatten(lora) | {
        path: rng.standard_normal(shape, np.float32) for path, shape in tables.items()
    }
    spec = replace(spec, saved=("embed_tokens", "lm_head"))
    folder = tmp_path / "adapter"
    named = {"base_model_name": str(source), "write_extra": tokenizer_writer(loaded)}
    export_adapter(unflatten(leaves), spec, loaded.config, folder, **named)
    out = tmp_path / "merged.gguf"
    assert main(["merge", str(folder), "--gguf", "F32", "--output", str(out)]) == 0
    merged = load_model(str(out), dtype="float32")
    assert (merged.config.vocab_size, merged.config.tie_embeddings) == (rows, False)
    for path, table in leaves.items():
        if path in tables:
            np.testing.assert_array_equal(flatten(merged.params)[path], table)
    text = "a<go>b<out>"
    assert merged.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    assert [merged.tokenizer.backend.token_to_id(one) for one in ("<go>", "<out>")] == [32, 33]
    assert merged.tokenizer.decode([32, 33]) == "<out>"
