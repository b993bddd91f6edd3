"""Every reader of strangers' files, each with a good file to damage."""

import contextlib
import importlib.util
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from nalora_jax.data.chat import render_record
from nalora_jax.data.files import open_rows
from nalora_jax.data.images.files import open_image, read_processor
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer, read_json
from nalora_jax.evaluate.harness import generation_settings, run_harness
from nalora_jax.evaluate.run_log import read_evaluation, recorded_settings
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.vision.families import read_dual
from nalora_jax.report.compare import write_comparison
from nalora_jax.report.html import write_report
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.report import status
from nalora_jax.train.located import locate, run_config
from nalora_jax.weights.gguf import GGUFFile, hf_config, read_tokenizer
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.peft import import_adapter
from nalora_jax.weights.tensors import check_tensors
from tests import tiny
from tests.report.conftest import fake_records, write_run
from tests.weights import gguf_files

SHAPE = tiny.HF | {
    "vocab_size": 48,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
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
    write: Callable[[Path], Any]  # a good folder
    read: Callable[[Path], Any]
    every: int = 1  # a slow reader gets one in so many of a campaign's inputs
    needs: str = ""  # package that it needs, which is not in the extra `test`

    def share(self, inputs):
        """Returns its number of inputs in a campaign; 0 without the package that it needs."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return 0
        return max(inputs // self.every, min(inputs, 4))


def _write_json(folder, **files):
    """Writes NAME.json for each name and value."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def _write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


# -------------------------------------------------------------------- models


def _tokenizer(folder):
    vocab = {"</s>": 0, "<s>": 1} | {chr(97 + i): i + 2 for i in range(26)} | {"ab": 28, "abc": 29}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], unk_token="</s>"))
    backend.add_special_tokens(["</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+"), "isolated")
    backend.decoder = decoders.Strip(" ", 1, 0)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "add_bos_token": True}
    _write_json(folder, tokenizer_config=settings | {"chat_template": CHATML}, config=SHAPE)
    _write_json(folder, generation_config={"eos_token_id": [0, 1]})
    (folder / "chat_template.jinja").write_text(CHATML)


def _use_tokenizer(folder):
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.decode(tokenizer.encode(_TEXT))
    tokenizer.encode(tokenizer.render_chat(TALK))


def _model(folder):
    _tokenizer(folder)
    tensors = sorted(keymap_for(ModelConfig.from_hf(SHAPE), "hf").tensors, key=lambda tensor: tensor.name)
    files = {"a.safetensors": tensors[::2], "b.safetensors": tensors[1::2]}
    for name, held in files.items():
        save_file({tensor.name: np.zeros(tensor.shape, np.float32) for tensor in held}, folder / name)
    listed = {tensor.name: name for name, held in files.items() for tensor in held}
    _write_json(folder, **{"model.safetensors.index": {"metadata": {}, "weight_map": listed}})


def _use_model(folder):
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    source = SafetensorsFolder(folder)
    for name in check_tensors(source, keymap_for(config, "hf")).values():
        source.read(name, tuple(slice(0, size) for size in source.shapes()[name])).sum()


def _use_config(folder):
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    if config.n_layers * max(1, config.n_experts) <= 256:
        keymap_for(config, "hf")


def _adapter(folder):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj"]}
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "lora_dropout": 0.1}
    settings |= {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {r".*\.gate_proj": 4}}
    settings |= {"layers_to_transform": [0, 1], "layers_pattern": ["layers"], "bias": "none"}
    _write_json(folder, adapter_config=settings | {"use_rslora": False, "use_dora": False})
    tensors = {}
    for layer, name in itertools.product(range(2), ("gate_proj", "up_proj")):
        key = f"base_model.model.model.layers.{layer}.mlp.{name}"
        tensors[f"{key}.lora_A.weight"] = np.ones((2, 16), np.float32)
        tensors[f"{key}.lora_B.weight"] = np.ones((32, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"nalora.base_fingerprint": "all:0"})


def _use_adapter(folder):
    locate(folder)
    import_adapter(folder, ModelConfig.from_hf(SHAPE), fingerprint="all:0")


def _gguf(folder):
    def more(writer):
        blocks = gguf.GGMLQuantizationType.Q8_0
        writer.add_chat_template(CHATML)
        writer.add_tensor("blk.0.more.weight", np.ones((32, 34), np.uint8), raw_dtype=blocks)

    raw = gguf_files.MODEL
    gguf_files.write_model(folder / "model.gguf", "llama", raw, gguf_files.random_params(raw), more)


def _use_gguf(folder):
    file = GGUFFile(folder / "model.gguf")
    ModelConfig.from_hf(hf_config(file))
    read_tokenizer(file).encode(_TEXT)
    for name, shape in file.shapes().items():
        file.check_readable(name)
        file.read(name, tuple(slice(0, size) for size in shape)).sum()


# -------------------------------------------------------------------- data and settings

ROWS = [{"prompt": f"question {n}", "completion": f" answer {n}", "label": n % 3} for n in range(40)]
SETTINGS = """\
model: smollm2-135m-instruct
steps: 20
lora:
  rules:
    - {pattern: "ffn/(gate|up|down)_proj", rank: 4}
mechanisms: ["soft:power=2.0,warmup=5", curvature_cap]
optimizer: &rates {learning_rate: 1.0e-3, schedule: cosine}
data: {max_length: 128}
"""


def _settings(folder):
    (folder / "run.yaml").write_text(SETTINGS)


def _jsonl(folder):
    _tokenizer(folder)
    more = [{"role": "user", "content": "c", "name": "x"}, {"role": "assistant", "content": "abc"}]
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    talks = [{"messages": talk} for talk in (TALK, columns, [*TALK, *more])]
    _write_lines(folder / "data.jsonl", [{"prompt": "a b", "completion": " ab"}, *talks])


def _use_jsonl(folder):
    lines, tokenizer = open_rows(folder / "data.jsonl"), Tokenizer.from_folder(folder)
    for index in range(min(len(lines), 8)):
        (record,) = lines.read([index])
        text = render_record(record, DataConfig(loss_on="assistant"), tokenizer, lines.where(index))
        tokenize([text], tokenizer)


def _rows(folder):
    table = pa.Table.from_pylist(ROWS)
    _write_json(folder, rows=ROWS)
    csv.write_csv(table, folder / "rows.csv")
    parquet.write_table(table, folder / "rows.parquet", row_group_size=16)
    feather.write_feather(table, folder / "rows.arrow", compression="uncompressed")


def _use_rows(folder, name):
    rows = open_rows(folder / name)
    rows.read(range(min(len(rows), 64)))


def _harness(folder):
    """Settings of generation, and a task on questions with choices."""
    settings = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": True, "temperature": 0.7, "top_k": 5}
    _write_json(folder, generation=settings | {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2})
    items = [{"question": f"Which is {n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]
    _write_lines(folder / "items.jsonl", items)
    task = f"""\
task: fuzzed
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "items.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
    (folder / "fuzzed.yaml").write_text(task)


def _use_task(folder):
    """Runs the task, without the index of the harness's own tasks, which takes seconds to read."""
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Even(LM):  # type: ignore[misc]
        """A model whose every answer is equally likely."""

        def loglikelihood(self, requests):
            return [(-1.0, False) for _ in requests]

        def loglikelihood_rolling(self, requests):
            return [-1.0 for _ in requests]

        def generate_until(self, requests):
            return ["" for request in requests if generation_settings(request.args[1])]

    only_here = partial(TaskManager, include_defaults=False)
    # The harness prints some settings to stdout, which has the outcomes of a campaign.
    with mock.patch("lm_eval.tasks.TaskManager", only_here), contextlib.redirect_stdout(sys.stderr):
        run_harness(Even(), ["fuzzed"], folder=folder)


# -------------------------------------------------------------------- images

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
IMAGES = TOWER | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
TEXTS = TOWER | {"model_type": "clip_text_model", "vocab_size": 64, "max_position_embeddings": 16}
CLIP = {"model_type": "clip", "projection_dim": 8, "logit_scale_init_value": 2.6592}
CLIP |= {"vision_config": IMAGES, "text_config": TEXTS}
PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3}
PROCESSOR |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "rescale_factor": 1 / 255}
PROCESSOR |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


def _images(folder):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    for name in ("image.png", "image.jpg"):
        picture.save(folder / name)
    _write_json(folder, preprocessor_config=PROCESSOR, config=CLIP)


# -------------------------------------------------------------------- runs and studies

# The smallest study of the repository, with enough of its records to have a rate chosen.
STUDY = Path(__file__).parents[2] / "studies" / "emoji_alignment"


def _run(folder):
    """A run's folder, without digests in the log, which would find the damage before anything else does."""
    records = list(fake_records(20, layers=2, every=10))
    paired = {"difference": 0.1, "low": -0.1, "high": 0.2, "gained": 3, "lost": 1, "p_value": 0.3, "n": 10}
    records[-2]["eval"]["paired"] = paired
    base = {"name": "x", "file": "x.gguf", "format": "GGUF", "numbers": "Q4_1", "fingerprint": "all:0"}
    write_run(folder, [{**records[0], "initial": True}, *records], RunConfig(steps=20), base=base)
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines.insert(4, {"resumed": {"step": 10, "versions": {}, "device": "cpu"}})
    _write_lines(log, [{name: line[name] for name in line if name != "sha256"} for line in lines])
    _write_json(folder, before=records[0]["eval"] | {"right": [True, False]})
    (folder / "adapter").mkdir(exist_ok=True)
    _adapter(folder / "adapter")


def _use_page(folder):
    """The report and the comparison page, without their pictures, which take most of the time."""
    with mock.patch("nalora_jax.report.html._draw", return_value=[]):
        write_report(folder)
    with mock.patch("nalora_jax.report.compare._pictures", return_value=()):
        write_comparison([folder], folder / "comparison.html")


def _use_run(folder):
    """Everything that other subcommands read of a finished run."""
    located = locate(folder)
    recorded_settings(folder)
    _use_page(folder)
    read_evaluation(folder / "before.json")
    assert located.adapter is not None
    import_adapter(located.adapter, ModelConfig.from_hf(SHAPE), fingerprint="all:0")


def _study(folder):
    shutil.copy(STUDY / "protocol.toml", folder)
    lines = (STUDY / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:20]))


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
    Parser("metrics.jsonl in the report", "metrics.jsonl", _run, write_report, every=50),  # draws its pictures
    Parser("metrics.jsonl in the report, without pictures", "metrics.jsonl", _run, _use_page),
    Parser("run folder", "*", _run, _use_run),
    Parser("metrics.jsonl as a run's header", "metrics.jsonl", _run, lambda f: (run_config(f), locate(f))),
    Parser("before.json", "before.json", _run, lambda f: read_evaluation(f / "before.json")),
    Parser("JSON array", "rows.json", _rows, lambda f: _use_rows(f, "rows.json")),
    Parser("CSV", "rows.csv", _rows, lambda f: _use_rows(f, "rows.csv")),
    Parser("Parquet", "rows.parquet", _rows, lambda f: _use_rows(f, "rows.parquet")),
    Parser("Arrow", "rows.arrow", _rows, lambda f: _use_rows(f, "rows.arrow")),
    Parser("YAML settings", "run.yaml", _settings, lambda f: load_config(f / "run.yaml")),
    Parser("PNG", "image.png", _images, lambda f: open_image(f / "image.png")),
    Parser("JPEG", "image.jpg", _images, lambda f: open_image(f / "image.jpg")),
    Parser(
        "preprocessor_config.json", "preprocessor_config.json", _images,
        lambda f: read_processor(f).batch([open_image(f / "image.png")]),
    ),
    Parser("config.json of CLIP", "config.json", _images, lambda f: read_dual(read_json(f / "config.json"), str(f))),
    Parser("protocol.toml", "protocol.toml", _study, lambda f: status(read_protocol(f))),
    Parser("records.jsonl", "records.jsonl", _study, lambda f: status(read_protocol(f))),
    Parser(
        "harness generation settings", "generation.json", _harness,
        lambda f: generation_settings(read_json(f / "generation.json")),
    ),
    Parser("harness task", "fuzzed.yaml", _harness, _use_task, needs="lm_eval"),
)  # fmt: skip
