"""Every reader of strangers' files, each with a folder of good files to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pyarrow as pa
import tokenizers
from PIL import Image
from pyarrow import csv, feather, parquet
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers

from nalora_jax.cli.config_files import load_config
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.chat_text import render_record
from nalora_jax.data.data_files import open_rows
from nalora_jax.data.images.image_files import open_image, read_processor
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer, read_json
from nalora_jax.evaluate.harness import generation_settings
from nalora_jax.evaluate.run_log import read_evaluation, recorded_settings
from nalora_jax.loading.located import locate, run_config
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.vision.families import read_dual
from nalora_jax.report.compare import write_comparison
from nalora_jax.report.html import write_report
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.study_report import status
from nalora_jax.weights.gguf import GGUFFile, hf_config, read_tokenizer
from nalora_jax.weights.hf import ResolvedSource, SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.model_files import open_files
from nalora_jax.weights.peft_import import import_adapter
from nalora_jax.weights.quantized import QuantizedTensors
from nalora_jax.weights.tensors import check_tensors
from tests import tiny
from tests.report.conftest import fake_records, write_run
from tests.weights import gguf_files
from tests.weights.quantized_folders import FORMATS, write_quantized

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHAPE = tiny.HF | {"vocab_size": 48, "rope_scaling": YARN, "eos_token_id": [0, 1]}
CHATML = (
    "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "ab"}]
TEXT = "ab abc \n é 日本"
ROWS = [
    {"prompt": f"question {n}", "completion": f" answer {n}", "label": n % 3} for n in range(40)
]
SETTINGS = """\
model: smollm2-135m-instruct
lora: {rules: [{pattern: "ffn/(gate|up|down)_proj", rank: 4}]}
mechanisms: ["soft:power=2.0,warmup=5", curvature_cap]
optimizer: &rates {learning_rate: 1.0e-3, schedule: cosine}
"""
GENERATION = {
    "until": ["\n", "."],
    "max_gen_toks": 12,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
}
GENERATION |= {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
# The smallest study of the repository, with enough of its records to have a rate chosen.
STUDY = Path(__file__).parents[2] / "studies" / "emoji_alignment"


def write_json(folder: Path, **files: Any) -> None:
    """Writes NAME.json for each name and value."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def write_tokenizer(folder: Path) -> None:
    vocab = {"</s>": 0, "<s>": 1} | {chr(97 + i): i + 2 for i in range(26)} | {"ab": 28, "abc": 29}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], unk_token="</s>"))
    backend.add_special_tokens(["</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+"), "isolated")
    backend.decoder = decoders.Strip(" ", 1, 0)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "add_bos_token": True}
    write_json(
        folder, tokenizer_config=settings, config=SHAPE, generation_config={"eos_token_id": [0, 1]}
    )
    (folder / "chat_template.jinja").write_text(CHATML)


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.encode(tokenizer.render_chat(TALK))


def write_model(folder: Path) -> None:
    tensors = keymap_for(ModelConfig.from_hf(SHAPE), "hf").tensors
    save_file(
        {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in tensors},
        folder / "a.safetensors",
    )
    listed = {"metadata": {}, "weight_map": {tensor.name: "a.safetensors" for tensor in tensors}}
    write_json(folder, config=SHAPE, **{"model.safetensors.index": listed})


def use_model(folder: Path) -> None:
    config, source = (
        ModelConfig.from_hf(read_json(folder / "config.json")),
        SafetensorsFolder(folder),
    )
    if config.n_layers * max(1, config.n_experts) <= 256:
        for name in check_tensors(source, keymap_for(config, "hf")).values():
            source.read(name, tuple(slice(0, size) for size in source.shapes()[name])).sum()


def write_quantized_models(folder: Path) -> None:
    for name in ("fp8 in blocks", "compressed int4 with zeros", "NVFP4", "GPTQ", "AWQ"):
        write_quantized(folder / name.replace(" ", "_"), *FORMATS[name])


def use_quantized_models(folder: Path) -> None:
    for model in sorted(folder.iterdir()):
        files = open_files(ResolvedSource("hf", model, str(model)))
        if files.quantization is None or files.config.n_layers > 256:
            continue
        source = QuantizedTensors(SafetensorsFolder(model), files.quantization)
        for name in check_tensors(source, keymap_for(files.config, "hf")).values():
            source.read(name, tuple(slice(0, size) for size in source.shapes()[name])).sum()


def write_adapter(folder: Path) -> None:
    names = ("gate_proj", "up_proj")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": names,
        "bias": "none",
    }
    settings |= {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "lora_dropout": 0.1,
    }
    settings |= {
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
        "alpha_pattern": {r".*\.gate_proj": 4},
    }
    settings |= {"layers_to_transform": [0, 1], "layers_pattern": ["layers"], "use_dora": False}
    write_json(folder, adapter_config=settings)
    tensors = {}
    for path in (
        f"base_model.model.model.layers.{layer}.mlp.{name}" for layer in range(2) for name in names
    ):
        tensors[f"{path}.lora_A.weight"] = np.ones((2, 16), np.float32)
        tensors[f"{path}.lora_B.weight"] = np.ones((32, 2), np.float32)
    save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"nalora.base_fingerprint": "all:0"}
    )


def use_adapter(folder: Path) -> None:
    import_adapter(
        locate(folder).adapter or folder, ModelConfig.from_hf(SHAPE), fingerprint="all:0"
    )


def write_gguf(folder: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        blocks = gguf.GGMLQuantizationType.Q8_0
        writer.add_chat_template(CHATML)
        writer.add_tensor("blk.0.more.weight", np.ones((32, 34), np.uint8), raw_dtype=blocks)

    raw = gguf_files.MODEL
    gguf_files.write_model(folder / "model.gguf", "llama", raw, gguf_files.random_params(raw), more)


def use_gguf(folder: Path) -> None:
    file = GGUFFile(folder / "model.gguf")
    ModelConfig.from_hf(hf_config(file))
    read_tokenizer(file).encode(TEXT)
    for name, shape in file.shapes().items():
        file.check_readable(name)
        file.read(name, tuple(slice(0, size) for size in shape)).sum()


def write_rows(folder: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    write_json(folder, rows=ROWS)
    csv.write_csv(table, folder / "rows.csv")
    parquet.write_table(table, folder / "rows.parquet", row_group_size=16)
    feather.write_feather(table, folder / "rows.arrow", compression="uncompressed")


def use_rows(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        rows = open_rows(path)
        rows.read(range(min(len(rows), 64)))


def write_chats(folder: Path) -> None:
    more = [{"role": "user", "content": "c", "name": "x"}, {"role": "assistant", "content": "abc"}]
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    talks = [{"messages": talk} for talk in (TALK, columns, [*TALK, *more])]
    write_lines(folder / "data.jsonl", [{"prompt": "a b", "completion": " ab"}, *talks])


def use_chats(folder: Path) -> None:
    lines, tokenizer = open_rows(folder / "data.jsonl"), tiny.word_tokenizer(chat_template=CHATML)
    for index in range(min(len(lines), 8)):
        (record,) = lines.read([index])
        text = render_record(record, DataConfig(loss_on="assistant"), tokenizer, lines.where(index))
        tokenize([text], tokenizer)


def write_settings(folder: Path) -> None:
    (folder / "run.yaml").write_text(SETTINGS)
    write_json(folder, generation=GENERATION)


def use_settings(folder: Path) -> None:
    load_config(folder / "run.yaml")
    generation_settings(read_json(folder / "generation.json"))


def write_images(folder: Path) -> None:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tower |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    images = tower | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    texts = tower | {
        "model_type": "clip_text_model",
        "vocab_size": 64,
        "max_position_embeddings": 16,
    }
    clip = {
        "model_type": "clip",
        "projection_dim": 8,
        "vision_config": images,
        "text_config": texts,
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "resample": 3,
    }
    processor |= {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "rescale_factor": 1 / 255,
    }
    processor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    write_json(folder, config=clip, preprocessor_config=processor)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    )
    for name in ("image.png", "image.jpg"):
        picture.save(folder / name)


def use_images(folder: Path) -> None:
    pictures = [open_image(folder / name) for name in ("image.png", "image.jpg")]
    read_processor(folder).batch(pictures)
    read_dual(read_json(folder / "config.json"), str(folder))


def write_log(folder: Path) -> None:
    """A run's log, without digests, which would find the damage before anything else does."""
    records = list(fake_records(20, layers=2, every=10))
    paired = {
        "difference": 0.1,
        "low": -0.1,
        "high": 0.2,
        "gained": 3,
        "lost": 1,
        "p_value": 0.3,
        "n": 10,
    }
    records[-2]["eval"]["paired"] = paired
    base = {
        "name": "x",
        "file": "x.gguf",
        "format": "GGUF",
        "numbers": "Q4_1",
        "fingerprint": "all:0",
    }
    write_run(folder, [{**records[0], "initial": True}, *records], RunConfig(steps=20), base=base)
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines.insert(4, {"resumed": {"step": 10, "versions": {}, "device": "cpu"}})
    write_lines(log, [{name: line[name] for name in line if name != "sha256"} for line in lines])


def write_folder(folder: Path) -> None:
    """Writes a finished run, and an evaluation before it."""
    write_log(folder)
    write_json(folder, before={"accuracy": 0.4, "loss": 5.1, "n": 400, "right": [True, False]})
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter")


def use_folder(folder: Path) -> None:
    """Reads what other subcommands read of a run."""
    recorded_settings(folder)
    run_config(folder)
    read_evaluation(folder / "before.json")
    use_adapter(folder)


def use_page(folder: Path) -> None:
    """Writes the report and the comparison page without their pictures, which take most of the
    time."""
    with mock.patch("nalora_jax.report.html._draw", return_value=[]):
        write_report(folder)
    with mock.patch("nalora_jax.report.compare._pictures", return_value=()):
        write_comparison([folder], folder / "comparison.html")


def write_study(folder: Path) -> None:
    shutil.copy(STUDY / "protocol.toml", folder)
    lines = (STUDY / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:20]))


@dataclass(frozen=True)
class Parser:
    """A reader of a folder; one of the folder's files is damaged."""

    name: str
    write: Callable[[Path], Any]  # a good folder
    read: Callable[[Path], Any]
    every: int = 1  # a slow reader gets one in so many of a campaign's inputs


PARSERS = (
    Parser("tokenizer", write_tokenizer, use_tokenizer),
    Parser("model", write_model, use_model),
    Parser("quantized models", write_quantized_models, use_quantized_models),
    Parser("adapter", write_adapter, use_adapter),
    Parser("GGUF", write_gguf, use_gguf),
    Parser("rows", write_rows, use_rows),
    Parser("chats", write_chats, use_chats),
    Parser("settings", write_settings, use_settings),
    Parser("images", write_images, use_images),
    Parser("run", write_folder, use_folder),
    Parser("report", write_log, use_page),
    Parser("report with pictures", write_log, write_report, every=50),
    Parser("study", write_study, lambda folder: status(read_protocol(folder))),
)
