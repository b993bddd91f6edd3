"""`nalora verify` of servers whose base is quantized: in transformers and PEFT, with activations as
they are and in fp8, and in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
import xllamacpp
from safetensors.torch import load_file

from nalora_jax.__main__ import main
from nalora_jax.config import LoRARule
from nalora_jax.loading.adapted import load
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.gguf_export import write_adapter_gguf
from nalora_jax.weights.keymaps import keymap_for
from tests import tiny
from tests.cli.test_verify import serving
from tests.weights import in_peft
from tests.weights.gguf_files import add_shape, finish
from tests.weights.quantized_folders import FORMATS, SIZES, Tensors, write_quantized
from tests.weights.test_gguf_llama_cpp import server_params

WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
WORDS = ["<end>", "<unk>", *(f"t{i}" for i in range(2, 48))]
# Prompts of four tokens.
TEXTS = ["t3 t4 t5 t6", "t20 t9 t11 t2", "t7 t7 t19 t23", "t12 t5 t25 t8", "t16 t2 t21 t4"]
PROMPTS = np.array([[int(word[1:]) for word in text.split()] for text in TEXTS])
RULES = (LoRARule("", 4),)


@pytest.fixture(scope="module", params=["fp8 in blocks", "compressed int4", "NVFP4", "GPTQ"])
def quantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensors]:
    """A folder with a quantized base and an adapter of it, and the base's floats by the reference."""
    folder = tmp_path_factory.mktemp("quantized")
    floats = write_quantized(folder / "base", *FORMATS[request.param])
    write_words(folder / "base")
    tiny.make_adapter(folder / "adapter", folder / "base", RULES, shift=0.1)
    return folder, floats


def write_words(base: Path) -> None:
    """Writes a tokenizer that splits at spaces."""
    tiny.word_tokenizer(WORDS).backend.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def theirs(floats: Tensors, adapter: Path | None, *, activations: str) -> list[dict[int, float]]:
    """The 20 likeliest tokens after each prompt, by transformers and PEFT.

    Args:
      floats: the base.
      adapter: in PEFT's files, or None.
      activations: "fp8": inputs of projections are rounded, with a scale for each token, as vLLM's
        kernels of fp8 bases do.
    """
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.load_state_dict({name: weight.float() for name, weight in floats.items()})
    for name, module in model.named_modules():
        if activations == "fp8" and name.endswith("_proj"):
            module.register_forward_pre_hook(_round_inputs)
    if adapter is not None:
        model = in_peft.load(model, adapter)
    logits = in_peft.logits(model, PROMPTS)[:, -1]
    values = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    return [{int(token): float(row[token]) for token in np.argsort(-row)[:20]} for row in values]


def _round_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("activations", ["floats", "fp8"])
def test_the_adapter_of_a_quantized_base_is_told_from_its_base(quantized, activations, capsys):
    folder, floats = quantized
    outputs = {
        "base": theirs(floats, None, activations=activations),
        "mine": theirs(floats, folder / "adapter", activations=activations),
    }
    with serving({"base": None, "mine": "base"}, outputs) as url:
        command = ["verify", url, "--adapter", str(folder / "adapter"), "--texts", *TEXTS]
        assert main(command) == 0
        assert "served: " in capsys.readouterr().out
        outputs["mine"] = outputs["base"]
        with pytest.raises(SystemExit, match="1"):
            main(command)
        assert "ignored: " in capsys.readouterr().out


def write_q8_0(base: Path, path: Path) -> Path:
    """Writes a base with int8 in groups of 32 as a GGUF file: its codes and scales are Q8_0's."""
    raw = json.loads((base / "config.json").read_text())
    stored = load_file(base / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, raw)
    writer.add_rope_dimension_count(raw["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_add_bos_token(False)
    config = ModelConfig.from_hf(raw)
    theirs = keymap_for(config, "hf")
    by_slots = {tensor.slots: tensor for tensor in theirs.tensors}
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in keymap_for(config, "gguf").tensors:
        name = by_slots[tensor.slots].name
        if name in stored:
            weight = stored[name].float().numpy()
            writer.add_tensor(tensor.name, np.ascontiguousarray(weight))
            continue
        module = name.removesuffix("weight")
        # int32 [out, in / 4] -> codes plus 128, one a byte
        codes = stored[f"{module}weight_packed"].numpy().view(np.uint8).astype(np.int16) - 128
        scales = stored[f"{module}weight_scale"].numpy().astype(np.float16)
        rows, columns = codes.shape
        ordered = [
            np.asarray(tensor.transform.back(array.T), array.dtype) for array in (codes, scales)
        ]
        blocks = np.concatenate(
            [
                ordered[1].reshape(rows, -1, 1).view(np.uint8),
                ordered[0].astype(np.int8).reshape(rows, columns // 32, 32).view(np.uint8),
            ],
            axis=-1,
        )
        writer.add_tensor(tensor.name, blocks.reshape(rows, -1), raw_dtype=kind)
    return finish(writer, path)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(1.0, "served: "), (0.0, "ignored: "), (0.5, "served wrongly: with about 0.5 times")],
)
def test_llama_cpp_serves_a_quantized_folder_s_adapter(scale, verdict, tmp_path, capsys):
    """Its kernels of Q8_0 quantize activations, too."""
    base = tmp_path / "base"
    write_quantized(base, *FORMATS["compressed int8 packed"], WIDE)
    write_words(base)
    adapter = tiny.make_adapter(tmp_path / "adapter", base, RULES, shift=0.05)
    model = load(adapter, dtype="float32")
    params = server_params(write_q8_0(base, tmp_path / "base.gguf"))
    lora = write_adapter_gguf(tmp_path / "lora.gguf", model.base.config, model.lora, model.spec)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), scale)]
    server = xllamacpp.Server(params)
    command = ["verify", server.listening_address, "--adapter", str(adapter), "--texts", *TEXTS]
    if scale == 1.0:
        assert main(command) == 0
    else:
        with pytest.raises(SystemExit, match="1"):
            main(command)
    out = capsys.readouterr().out
    assert verdict in out
