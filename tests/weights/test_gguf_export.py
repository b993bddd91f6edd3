from __future__ import annotations

import gguf
import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import BUILT_IN
from nalora_jax.weights.base import load_model
from nalora_jax.weights.gguf_export import (
    verify_adapter_gguf,
    write_adapter_gguf,
)
from nalora_jax.weights.merge import merge
from nalora_jax.weights.peft import export_adapter
from tests.param_trees import tensors_from_params
from tests.weights.gguf_files import MODEL, random_params, write_model

TARGETS = {
    "ffn/gate_proj": ((4, 2), (8.0, 8.0)),
    "ffn/down_proj": ((0, 4), (1.0, 5.0)),
    "attn/q_proj": ((3, 1), (1.5, 3.5)),
    "attn/k_proj": ((4, 4), (8.0, 8.0)),
}
WIDER = MODEL | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@pytest.fixture
def base(tmp_path, random_lora):
    config = ModelConfig.from_hf(WIDER)
    lora, spec = random_lora(config, TARGETS)
    return config, lora, spec, write_model(tmp_path / "base.gguf", "llama", WIDER, random_params(WIDER))


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_adapter_file_is_the_difference_of_merged_and_base(family, tiny_model, random_lora, tmp_path):
    """By llama.cpp's rule: W + alpha / rank * B A, with the rank of each tensor, in llama.cpp's row order."""
    model, config = tiny_model(family)
    targets = {name: (ranks + ranks[:1], alphas + alphas[:1]) for name, (ranks, alphas) in TARGETS.items()}
    lora, spec = random_lora(config, targets, rslora=True)
    params = random_params(model.config.to_dict())

    write_adapter_gguf(tmp_path / "a.gguf", config, lora, spec)

    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == BUILT_IN[family].gguf.architecture
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    before = dict(tensors_from_params(config, params, "gguf"))
    adapted = 0
    for name, after in tensors_from_params(config, merge(params, lora, spec), "gguf"):
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
    config, lora, spec, source = base
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
    config, lora, spec, source = base
    fingerprint = load_model(str(source), dtype="float32").fingerprint
    settings = {"base_model_name": str(source), "fingerprint": fingerprint}
    return export_adapter(lora, spec, config, tmp_path / "peft", **settings)


def test_export_for_llama_cpp_is_the_adapter_file_read_back(base, adapter, tmp_path, capsys):
    config, lora, spec, _ = base
    out = tmp_path / "out.gguf"
    assert main(["export", str(adapter), "--for", "gguf", "--output", str(out)]) == 0
    assert "adapter for llama.cpp, read back and compared" in capsys.readouterr().out
    direct = write_adapter_gguf(tmp_path / "direct.gguf", config, lora, spec)
    assert out.read_bytes() == direct.read_bytes()
    for factor in (1.001, np.nan):
        other = {path: leaf * factor for path, leaf in flatten(lora).items()}
        with pytest.raises(NaloraError, match="expected the adapter that was exported"):
            verify_adapter_gguf(out, config, unflatten(other), spec)
