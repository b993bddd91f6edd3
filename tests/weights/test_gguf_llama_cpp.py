"""What the verbs write for llama.cpp, and every number format that is read, beside llama.cpp itself (xllamacpp).

The wheel is no part of the extra `test`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from nalora_jax.__main__ import main
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.train.adapted import load
from nalora_jax.weights.gguf_export import write_adapter_gguf
from nalora_jax.weights.peft import export_adapter
from tests import tiny
from tests.param_trees import tensors_from_params
from tests.weights.gguf_files import MODEL, WORDS, add_shape, finish, random_blocks

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed")

WIDTH = 256  # rows of whole blocks of every format
HF = MODEL | {"vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": 64}
IDS = list(range(3, 23))
QUANTIZED = ("Q2_K", "Q3_K", "IQ1_M", "IQ2_XS", "IQ3_S", "IQ4_NL")


def write_base(path: Path, kind: GGMLQuantizationType | None = None) -> Path:
    """A tiny Llama as llama.cpp's converter would write it; its feed-forward blocks in a format of random blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer)
    add_tensors(writer, ModelConfig.from_hf(HF), kind)
    return finish(writer, path)


def add_metadata(writer: gguf.GGUFWriter) -> None:
    """The sizes of `HF` and a tokenizer."""
    add_shape(writer, HF)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_add_bos_token(False)


def add_tensors(
    writer: gguf.GGUFWriter, config: ModelConfig, kind: GGMLQuantizationType | None = None
) -> None:
    """Random tensors of a model; its feed-forward blocks as random blocks of ``kind``."""
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape, np.float32) for path, shape in param_shapes(config).items()}
    scales = {path: 0.1 if path.endswith("/scale") else 0.2 if "embed" in path else 0.08 for path in leaves}
    params = unflatten(
        {path: scales[path] * leaf + path.endswith("/scale") for path, leaf in leaves.items()}
    )
    for name, tensor in tensors_from_params(config, params, "gguf"):
        if kind is not None and "ffn" in name and tensor.ndim == 2:
            writer.add_tensor(name, random_blocks(kind, len(tensor), WIDTH, 1e-3, rng), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))


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


def adapted(folder: Path) -> tuple[Path, Path]:
    """A base in a GGUF file, and a PEFT adapter of it with ranks and scales of every kind."""
    base = write_base(folder / "base.gguf")
    model = load(str(base), dtype="float32")
    rules = (LoRARule("layers/0/ffn/gate", 0), LoRARule("ffn", 4, 3.0), LoRARule("", 2))
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(model.base.config), 2)
    lora = init_lora(model.base.config, spec, jax.random.key(0))
    lora = jax.device_get(jax.tree.map(lambda leaf: leaf + 0.05, lora))
    settings = {"base_model_name": str(base), "fingerprint": model.base.fingerprint}
    return base, export_adapter(lora, spec, model.base.config, folder / "adapter", **settings)


def test_an_exported_adapter_gives_the_same_probabilities_there(tmp_path):
    base, adapter = adapted(tmp_path)
    lora = tmp_path / "lora.gguf"
    assert main(["export", str(adapter), "--for", "gguf", "--output", str(lora)]) == 0
    expected = ours(load(str(base), adapter=adapter, dtype="float32"))
    plain = ours(load(str(base), dtype="float32"))
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(llama_cpp(base), plain, atol=2e-3)
    np.testing.assert_allclose(llama_cpp(base, lora), expected, atol=2e-3)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_base_is_read_as_llama_cpp_reads_it(tmp_path, name):
    base = write_base(tmp_path / "base.gguf", GGMLQuantizationType[name])
    expected = ours(load(str(base), dtype="float32"))
    # llama.cpp rounds activations to 8 bits for these formats, of weights that are larger than a model's here. A code
    # that is read wrongly changes logits by about their range.
    np.testing.assert_allclose(llama_cpp(base), expected, atol=0.05 * np.ptp(expected))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
OLMO3 = {
    "model_type": "olmo3",
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}},
}
MINISTRAL3 = {
    "model_type": "ministral3",
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7},
}


def add_olmo3(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(3)
    writer.add_sliding_window_pattern([True, False])


def add_ministral3(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_yarn_log_mul(1.0)
    writer.add_attn_temperature_scale(0.7)


@pytest.mark.parametrize(
    ("architecture", "raw", "more"),
    [("olmo2", OLMO3, add_olmo3), ("mistral3", MINISTRAL3, add_ministral3)],
    ids=["olmo3", "ministral3"],
)
def test_windows_and_rotations_of_newer_families_are_llama_cpps(tmp_path, architecture, raw, more):
    """A text longer than the window and the original context."""
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(16.0)
    writer.add_rope_scaling_orig_ctx_len(8)
    more(writer)
    # OLMo's embedding is never tied in llama.cpp.
    config = ModelConfig.from_hf(HF | raw | {"tie_word_embeddings": False})
    add_tensors(writer, config)
    assert load(str(finish(writer, path)), dtype="float32").base.config == config
    np.testing.assert_allclose(llama_cpp(path), ours(load(str(path), dtype="float32")), atol=2e-3)


@pytest.mark.parametrize(
    ("served", "scale", "verdict"),
    [
        ("whole", 1.0, "served: "),
        ("", 1.0, "ignored: "),
        ("whole", 0.5, "served wrongly: with about 0.5 times its scale"),
        ("half", 1.0, "served wrongly: the modules of ffn alone"),
    ],
)
def test_a_server_is_asked_what_it_does_with_an_adapter(served, scale, verdict, tmp_path, capsys):
    base, adapter = adapted(tmp_path)
    params = server_params(base)
    if served:
        model = load(str(base), adapter=adapter, dtype="float32")
        lora = flatten(model.lora)
        if served == "half":
            lora |= {
                path: 0 * leaf for path, leaf in lora.items() if "attn/" in path and path.endswith("/b")
            }
        file = write_adapter_gguf(tmp_path / "served.gguf", model.base.config, unflatten(lora), model.spec)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), scale)]
    server = xllamacpp.Server(params)
    texts = ["ab a b c", "c d e f", "x y z a"]
    command = ["verify", server.listening_address, "--model", str(base), "--adapter", str(adapter)]
    with contextlib.suppress(SystemExit) if verdict != "served: " else contextlib.nullcontext():
        assert main([*command, "--texts", *texts]) == 0
    assert verdict in capsys.readouterr().out
