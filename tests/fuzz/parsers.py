"""Every reader of strangers' files, each with a good file to damage."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.chat import render
from nalora_jax.data.files import JsonLines
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer, read_json
from nalora_jax.evaluate.run_log import read_evaluation, recorded_settings
from nalora_jax.models.config import ModelConfig
from nalora_jax.report.compare import write_comparison
from nalora_jax.report.html import write_report
from nalora_jax.train.located import locate, run_config
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.gguf_config import hf_config
from nalora_jax.weights.gguf_tokenizer import read_tokenizer
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.peft import import_adapter
from nalora_jax.weights.tensors import check_tensors
from tests.fuzz import harness, people, studies

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "tie_word_embeddings": True,
    "eos_token_id": [0, 1],
}
CHATML = (
    "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "ab"}]
_TEXT = "ab abc \n é 日本"


@dataclass(frozen=True)
class Parser:
    """A reader, and the file of its folder that is damaged."""

    name: str
    file: str  # "*": any file of the folder, which may also be gone, a folder, or a link
    write: Callable[[Path], None]  # a good folder
    read: Callable[[Path], Any]
    every: int = 1  # a slow reader gets one in so many of a campaign's inputs
    needs: str = ""  # package that it needs, which is not in the extra `test`

    def share(self, inputs: int) -> int:
        """Returns its number of inputs in a campaign; 0 without the package that it needs."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return 0
        return max(inputs // self.every, min(inputs, 4))


def _tokenizer(folder: Path) -> None:
    vocab = {"</s>": 0, "<s>": 1} | {chr(97 + i): i + 2 for i in range(26)} | {"ab": 28, "abc": 29}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": ["a b", "ab c"],
        "unk_token": "</s>",
        "byte_fallback": False,
    }
    added = [{"id": 0, "content": "</s>", "special": True, "normalized": False}]
    added = [one | {"single_word": False, "lstrip": False, "rstrip": False} for one in added]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"\s+|\w+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        "post_processor": None,
    }
    whole = {"version": "1.0", "added_tokens": added, "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {
        "eos_token": "</s>",
        "bos_token": {"content": "<s>"},
        "chat_template": CHATML,
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    (folder / "config.json").write_text(json.dumps(SHAPE))


def _use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode(_TEXT))
    tokenizer.encode(tokenizer.render_chat(TALK))


def _model(folder: Path) -> None:
    _tokenizer(folder)
    config = ModelConfig.from_hf(SHAPE)
    names = sorted(keymap_for(config, "hf").tensors, key=lambda tensor: tensor.name)
    files: dict[str, dict[str, np.ndarray]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, tensor in enumerate(names):
        files["ab"[number % 2] + ".safetensors"][tensor.name] = np.zeros(tensor.shape, np.float32)
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    listed = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def _use_model(folder: Path) -> None:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    source = SafetensorsFolder(folder)
    for name in check_tensors(source, keymap_for(config, "hf")).values():
        source.read(name, tuple(slice(0, size) for size in source.shapes()[name])).sum()


def _use_config(folder: Path) -> None:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    if config.n_layers * max(1, config.n_experts) <= 256:
        keymap_for(config, "hf")


def _adapter(folder: Path) -> None:
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["gate_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {r".*\.gate_proj": 4},
        "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"],
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.1,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for layer in range(2):
        for name in ("gate_proj", "up_proj"):
            key = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{key}.lora_A.weight"] = np.ones((2, 16), np.float32)
            tensors[f"{key}.lora_B.weight"] = np.ones((32, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"nalora.base_fingerprint": "all:0"})


def _use_adapter(folder: Path) -> None:
    locate(folder)
    import_adapter(folder, ModelConfig.from_hf(SHAPE), fingerprint="all:0")


def _gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "context_length"):
        writer.add_uint32(f"llama.{key}", {"block_count": 2, "context_length": 64}.get(key, 32))
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc"])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.add_tensor(
        "blk.0.attn_q.weight", np.ones((32, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _use_gguf(folder: Path) -> None:
    file = GGUFFile(folder / "model.gguf")
    ModelConfig.from_hf(hf_config(file))
    read_tokenizer(file).encode(_TEXT)
    for name, shape in file.shapes().items():
        file.check_readable(name)
        file.read(name, tuple(slice(0, size) for size in shape)).sum()


def _jsonl(folder: Path) -> None:
    _tokenizer(folder)
    records = [
        {"prompt": "a b", "completion": " ab"},
        {"messages": TALK},
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {
            "messages": [
                *TALK,
                {"role": "user", "content": "c", "name": "x"},
                {"role": "assistant", "content": "abc"},
            ]
        },
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")


def _use_jsonl(folder: Path) -> None:
    lines, tokenizer = JsonLines(folder / "data.jsonl"), Tokenizer.from_folder(folder)
    for index in range(min(len(lines), 8)):
        tokenize(
            [
                render(
                    lines.read([index])[0], DataConfig(loss_on="assistant"), tokenizer, lines.where(index)
                )
            ],
            tokenizer,
        )


def _run(folder: Path) -> None:
    scores = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "loss": 2.0, "n": 10}
    samples = [{"prompt": "a", "answer": "b", "expected": "c", "correct": True}]
    paired = {"difference": 0.1, "low": -0.1, "high": 0.2, "gained": 3, "lost": 1, "p_value": 0.3, "n": 10}
    layers = {
        "misalignment": [0.1, 0.2],
        "limit": [0.1, None],
        "importance": [0.3, 0.4],
        "feature": [0.1, 0.1],
    }
    layers |= {
        "occupancy": [[0.1, 0.4, 0.4, 0.1]] * 2,
        "mask_mean": [1.0, 1.1],
        "step_scale_min": [0.9, 0.8],
    }
    layers |= {"step_scale_max": [1.1, 1.2], "responsive": [0.5, 0.5]}
    step = {
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100,
        "tokens_per_second": 9.5,
        "seconds": 2.0,
    }
    step |= {"misalignment": 0.2, "misalignment_limit": 0.1, "layers": layers, "peak_memory": 10**9}
    step |= {"histograms": {"mask": {"edges": [0.5, 1.0, 2.0], "counts": [[1, 5, 2, 0], [0, 8, 0, 0]]}}}
    step |= {"adapters": {"layers/ffn/gate_proj": [0.1, None]}}
    base = {
        "name": "x",
        "file": "x.gguf",
        "format": "GGUF",
        "numbers": "Q4_1",
        "fingerprint": "all:0",
        "copy_of": "o/m",
    }
    lines = [
        {"run": RunConfig(steps=20).to_dict(), "versions": {"jax": "1"}, "device": "cpu", "base": base},
        {"step": 0, "initial": True, "eval": {**scores, "samples": samples}},
        {"step": 0, "eval": scores},
        {"step": 10, **step},
        {"resumed": {"step": 10, "versions": {}, "device": "cpu"}},
        {"step": 20, **step},
        {"step": 20, "eval": scores},
        {"step": 20, "final": True, "eval": {**scores, "paired": paired, "samples": samples}},
        {"done": {"step": 20, "best_step": 20, "seconds": {"preparing": 5.0, "training": 9.5}}},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (folder / "before.json").write_text(json.dumps({**scores, "samples": samples, "right": [True, False]}))
    (folder / "adapter").mkdir(exist_ok=True)
    _adapter(folder / "adapter")


def _use_log(folder: Path) -> None:
    write_report(folder)


def _use_page(folder: Path) -> None:
    """The report and the comparison page, without their pictures, which take most of the time."""
    with mock.patch("nalora_jax.report.html._draw", return_value=[]):
        write_report(folder)
    with mock.patch("nalora_jax.report.compare._pictures", return_value=()):
        write_comparison([folder], folder / "comparison.html")


def _use_run(folder: Path) -> None:
    """Everything that other subcommands read of a finished run."""
    located = locate(folder)
    recorded_settings(folder)
    _use_page(folder)
    read_evaluation(folder / "before.json")
    assert located.adapter is not None
    import_adapter(located.adapter, ModelConfig.from_hf(SHAPE), fingerprint="all:0")


def _use_header(folder: Path) -> None:
    run_config(folder)
    locate(folder)


PARSERS = (
    Parser("safetensors header", "a.safetensors", _model, _use_model),
    Parser("safetensors index", "model.safetensors.index.json", _model, _use_model),
    Parser("config.json", "config.json", _model, _use_config),
    Parser("tokenizer.json", "tokenizer.json", _tokenizer, _use_tokenizer),
    Parser("tokenizer_config.json", "tokenizer_config.json", _tokenizer, _use_tokenizer),
    Parser("generation_config.json", "generation_config.json", _tokenizer, _use_tokenizer),
    Parser("chat template", "chat_template.jinja", _tokenizer, _use_tokenizer),
    Parser("adapter_config.json", "adapter_config.json", _adapter, _use_adapter),
    Parser("adapter tensors", "adapter_model.safetensors", _adapter, _use_adapter),
    Parser("GGUF", "model.gguf", _gguf, _use_gguf),
    Parser("JSONL", "data.jsonl", _jsonl, _use_jsonl),
    Parser(
        "metrics.jsonl in the report", "metrics.jsonl", _run, _use_log, every=50
    ),  # draws its pictures each time
    Parser("metrics.jsonl in the report, without pictures", "metrics.jsonl", _run, _use_page),
    Parser("run folder", "*", _run, _use_run),
    Parser("metrics.jsonl as a run's header", "metrics.jsonl", _run, _use_header),
    Parser("before.json", "before.json", _run, lambda folder: read_evaluation(folder / "before.json")),
    Parser(
        "JSON array",
        "rows.json",
        people.write_json_array,
        lambda folder: people.read_rows(folder, "rows.json"),
    ),
    Parser("CSV", "rows.csv", people.write_csv, lambda folder: people.read_rows(folder, "rows.csv")),
    Parser(
        "Parquet",
        "rows.parquet",
        people.write_parquet,
        lambda folder: people.read_rows(folder, "rows.parquet"),
    ),
    Parser(
        "Arrow", "rows.arrow", people.write_arrow, lambda folder: people.read_rows(folder, "rows.arrow")
    ),
    Parser("YAML settings", "run.yaml", people.write_settings, people.read_settings),
    Parser("PNG", "image.png", people.write_png, lambda folder: people.read_image(folder, "image.png")),
    Parser("JPEG", "image.jpg", people.write_jpeg, lambda folder: people.read_image(folder, "image.jpg")),
    Parser(
        "preprocessor_config.json", "preprocessor_config.json", people.write_processor, people.use_processor
    ),
    Parser("config.json of CLIP", "config.json", people.write_clip, people.read_clip),
    Parser("protocol.toml", "protocol.toml", studies.write_study, studies.use_study),
    Parser("records.jsonl", "records.jsonl", studies.write_study, studies.use_study),
    Parser(
        "harness generation settings", "generation.json", harness.write_generation, harness.use_generation
    ),
    Parser("harness task", "fuzzed.yaml", harness.write_task, harness.use_task, needs="lm_eval"),
)
