"""What the verbs write for llama.cpp, beside llama.cpp itself (xllamacpp)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import xllamacpp

from nalora_jax.__main__ import main
from nalora_jax.common.trees import map_named
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.loading.adapted import load
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.gguf_export import write_adapter_gguf
from nalora_jax.weights.peft_export import export_adapter
from tests import tiny
from tests.weights.gguf_files import MODEL, WORDS, add_shape, random_params, write_tensors

HF = MODEL | {
    "vocab_size": len(WORDS),
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
}
IDS = list(range(3, 23))


def write_base(path: Path) -> Path:
    """A tiny Llama as llama.cpp's converter would write it."""
    config = ModelConfig.from_hf(HF)
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, HF)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_add_bos_token(False)
    params = map_named(lambda path, leaf: 0.3 * leaf + path.endswith("/scale"), random_params(HF))
    return write_tensors(writer, config, params, path)


def server_params(path: Path) -> Any:
    """Settings of llama.cpp's server in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return params


def llama_cpp(path: Path, lora: Path | None = None) -> np.ndarray:
    """llama.cpp's log-probabilities of the next token after `IDS`, float64 ``[vocab]``."""
    params = server_params(path)
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    asked = {"prompt": IDS, "max_tokens": 1, "logprobs": len(WORDS), "temperature": 1.0, "seed": 0}
    answer = server.handle_completions(asked)
    found = np.full(len(WORDS), np.nan)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


def ours(model: Any) -> np.ndarray:
    logits = tiny.logits_of(model.module, model.variables, np.array([IDS]))
    return np.asarray(jax.nn.log_softmax(logits[0, -1]), np.float64)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A base in a GGUF file, a PEFT adapter of it with ranks and scales of every kind, and both as
    one model."""
    folder = tmp_path_factory.mktemp("adapted")
    base = write_base(folder / "base.gguf")
    model = load(str(base), dtype="float32")
    rules = (LoRARule("layers/0/ffn/gate", 0), LoRARule("ffn", 4, 3.0), LoRARule("", 2))
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(model.base.config), 2)
    lora = init_lora(model.base.config, spec, jax.random.key(0))
    # The gates' part of the effect is small, as in real adapters.
    lora = map_named(lambda path, leaf: (leaf + 0.05) * (0.3 if "gate_proj" in path else 1.0), lora)
    lora = jax.device_get(lora)
    settings = {"base_model_name": str(base), "fingerprint": model.base.fingerprint}
    adapter = export_adapter(lora, spec, model.base.config, folder / "adapter", **settings)
    return base, adapter, load(str(base), adapter=adapter, dtype="float32")


def test_an_exported_adapter_gives_the_same_probabilities_there(adapted, tmp_path, capsys):
    base, adapter, model = adapted
    lora = tmp_path / "lora.gguf"
    assert main(["export", str(adapter), "--for", "gguf", "--output", str(lora)]) == 0
    assert "adapter for llama.cpp, read back and compared" in capsys.readouterr().out
    expected, plain = ours(model), ours(load(str(base), dtype="float32"))
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(llama_cpp(base), plain, atol=2e-3)
    np.testing.assert_allclose(llama_cpp(base, lora), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("served", "scale", "verdict"),
    [
        ("whole", 1.0, "served: "),
        ("", 1.0, "ignored: "),
        ("whole", 0.5, "served wrongly: with about 0.5 times its scale"),
        ("whole", 0.9, "served wrongly: with about 0.9 times its scale"),
        ("without attn/", 1.0, "served wrongly: the modules of ffn alone"),
        ("without gate_proj", 1.0, "served wrongly: without gate_proj"),
    ],
)
def test_a_server_is_asked_what_it_does_with_an_adapter(
    served, scale, verdict, adapted, tmp_path, capsys
):
    base, adapter, model = adapted
    params = server_params(base)
    if served:
        left_out = served.removeprefix("without ")
        lora = map_named(lambda path, leaf: leaf * (left_out not in path), model.lora)
        file = write_adapter_gguf(tmp_path / "served.gguf", model.base.config, lora, model.spec)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), scale)]
    server = xllamacpp.Server(params)
    texts = ["ab a b c", "c d e f", "x y z a"]
    command = ["verify", server.listening_address, "--model", str(base), "--adapter", str(adapter)]
    with contextlib.suppress(SystemExit) if verdict != "served: " else contextlib.nullcontext():
        assert main([*command, "--texts", *texts]) == 0
    assert verdict in capsys.readouterr().out
