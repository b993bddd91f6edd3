"""Refusals of the weights' room that need a single call: the call, and a part of its message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from nalora_jax.common import uploads
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights import base, hf, hub, new_tokens
from nalora_jax.weights.gguf_export import verify_adapter_gguf, write_adapter_gguf
from nalora_jax.weights.peft_config import CONFIG_NAME
from nalora_jax.weights.peft_export import export_adapter
from tests import tiny
from tests.models.family_fields import LATENT
from tests.refused import Call, table_test
from tests.weights import gguf_files
from tests.weights.conftest import COMMON
from tests.weights.folders import RAW, write_folder

VISION: Any = SimpleNamespace(
    model_type="llava", image_token=99, tokens=4, tiled=False, tower=SimpleNamespace(image_size=16)
)


def see_with_another_size(_: pytest.MonkeyPatch, folder: Path) -> None:
    settings = {"image_processor_type": "CLIPImageProcessor", "crop_size": 24}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    files: Any = SimpleNamespace(
        config=SimpleNamespace(vision=SimpleNamespace(**vars(VISION) | {"image_token": 0})),
        raw={},
        tokenizer=tiny.word_tokenizer(),
        resolved=SimpleNamespace(path=folder),
    )
    base.vision_files(files)


def load_gguf_without_an_embedding(_: pytest.MonkeyPatch, folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    gguf_files.add_shape(writer, gguf_files.MODEL)
    writer.add_tensor("output_norm.weight", np.ones(16, np.float32))
    path = gguf_files.finish(writer, folder / "m.gguf")
    base.load_model(str(path), dtype="float32")


def verify_an_adapter_without_the_last_target(_: pytest.MonkeyPatch, folder: Path) -> None:
    config = ModelConfig.from_hf(tiny.GROUPED)
    shapes = projection_shapes(config)
    layers = config.n_layers
    wanted = LoRAConfig(rules=(LoRARule("gate_proj|up_proj", 2),))
    spec = resolve(wanted, shapes, layers)
    lora = init_lora(config, spec, jax.random.key(0))
    written = resolve(LoRAConfig(rules=(LoRARule("gate_proj", 2),)), shapes, layers)
    path = write_adapter_gguf(folder / "a.gguf", config, lora, written)
    verify_adapter_gguf(path, config, lora, spec)


def read_from_a_shortened_object(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(hf.buckets, "read_range", lambda *_: b"abc")
    stored = hf._StreamedTensor(folder / "m", (4,), "U8", 8, 4, "gs://bucket/m.safetensors")
    stored.read(0, 4)


def open_bucket(*names: str) -> Call:
    def call(patch: pytest.MonkeyPatch, _: Path) -> None:
        patch.setattr(hub.buckets, "names", lambda _: list(names))
        hub.resolve_source("gs://bucket/model")

    return call


def train_a_row_of_no_token(_: pytest.MonkeyPatch, folder: Path) -> None:
    write_folder(folder)
    model = base.load_model(str(folder), dtype="float32")
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    settings |= {"trainable_token_indices": [RAW["vocab_size"] + 3]}
    (adapter / CONFIG_NAME).write_text(json.dumps(settings))
    new_tokens.take_adapter_tokens(model, adapter)


def serve_an_adapter_of_other_positions(_: pytest.MonkeyPatch, folder: Path) -> None:
    write_folder(folder)
    model = base.load_model(str(folder), dtype="float32")
    new_tokens.check_adapter(replace(model, rope_scaling="linear:factor=2"), folder / "adapter")


def serve_what_vllm_never_applies(_: pytest.MonkeyPatch, folder: Path) -> None:
    config = ModelConfig.from_hf(COMMON | LATENT | {"model_type": "youtu"})
    rules = LoRAConfig(rules=(LoRARule("attn", 2),))
    spec = resolve(rules, projection_shapes(config), config.n_layers)
    lora = init_lora(config, spec, jax.random.key(0))
    export_adapter(lora, spec, config, folder / "a", base_model_name="b", target="vllm")


REFUSALS: dict[str, tuple[Call, str]] = {
    "a processor of another size": (
        see_with_another_size,
        r"image processor: expected images of 16 x 16.*found \(24, 24\); set size",
    ),
    "an image token that is none": (
        lambda *_: base.image_tokens(VISION, {}, tiny.word_tokenizer(), "m"),
        "m: tokenizer.json: expected a special token with the id 99.*found None",
    ),
    "a GGUF file without an embedding": (
        load_gguf_without_an_embedding,
        "m.gguf: expected the tensor token_embd.weight, found none of that name",
    ),
    "a GGUF adapter without a target": (
        verify_an_adapter_without_the_last_target,
        r"a.gguf: expected a tensor blk.0.ffn_up.weight.lora_a, found none of that name",
    ),
    "an object that was shortened": (
        read_from_a_shortened_object,
        "gs://bucket/m.safetensors: expected 4 bytes from 8, found 3; upload it again",
    ),
    "a bucket without a model": (
        open_bucket("notes.txt"),
        "gs://bucket/model: expected a folder with config.json.*found notes.txt",
    ),
    "a bucket without files": (open_bucket(), "found no file in it"),
    "an upload that was interrupted": (
        open_bucket(uploads.UPLOAD_MARK, "model.safetensors"),
        "found an upload that is not complete",
    ),
    "a trained row of no token": (
        train_a_row_of_no_token,
        "trainable_token_indices: expected ids below 48.*found 51",
    ),
    "an adapter without the model's RoPE scaling": (
        serve_an_adapter_of_other_positions,
        "expected an adapter of .* RoPE scaling, linear:factor=2, found none; load the model with",
    ),
    "an adapter of the latents' projection for vLLM": (
        serve_what_vllm_never_applies,
        "--for vllm: expected no adapter that vLLM loads but never applies, "
        "found one at layers/attn/kv_b_proj; merge it",
    ),
    "float16": (
        lambda *_: base.load_model("nowhere", dtype="float16"),
        "dtype: expected .*float32.*found 'float16'",
    ),
}

test_it_is_refused = table_test(REFUSALS)
