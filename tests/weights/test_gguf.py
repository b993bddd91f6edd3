"""GGUF files: against the gguf package's own reader and transformers reading the same file;
adapters as such files."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nalora_jax.common.trees import flatten, map_named
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import BUILT_IN
from nalora_jax.models.stacks import param_shapes
from nalora_jax.weights import tensors
from nalora_jax.weights.base import load_model
from nalora_jax.weights.gguf import READABLE, GGUFFile, hf_config
from nalora_jax.weights.gguf_export import (
    verify_adapter_gguf,
    write_adapter_gguf,
)
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.tensors import load_params
from tests.param_trees import params_from_tensors, tensors_from_params
from tests.weights.conftest import mixed
from tests.weights.gguf_files import (
    MODEL,
    Write,
    add_shape,
    finish,
    random_params,
    write_model,
)
from tests.weights.in_peft import merged_params


def write_llama(path: Path, more: Write = lambda _: None, **changes: Any) -> Path:
    raw = MODEL | changes
    return write_model(path, "llama", raw, random_params(raw), more)


def test_metadata_equals_the_gguf_packages_reader(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, Any] = {
        "uint8": 7,
        "int8": -7,
        "uint16": 700,
        "int16": -700,
        "uint32": 70_000,
    }
    values |= {"int32": -70_000, "uint64": 2**40, "int64": -(2**40), "float32": 0.1, "float64": 0.1}
    values |= {"bool": True, "string": "é\n"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 1e-5])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_tensor("t", np.ones((2, 3), np.float32))
    path = finish(writer, tmp_path / "m.gguf")

    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, value in values.items():
        assert ours.metadata[f"a.{key}"] == value, key
    for key in ("ints", "floats", "flags", "strings"):
        assert list(ours.metadata[f"a.{key}"]) == theirs.fields[f"a.{key}"].contents()
    assert ours.metadata.keys() == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert ours.shapes() == {"t": (2, 3)}


@pytest.mark.parametrize("name", READABLE)
def test_every_number_format_is_read_whole_and_in_slices(tmp_path, name):
    """Also of random bytes, of which K-quants and I-quants cannot be written by the package."""
    kind, plain = GGMLQuantizationType[name], name in ("F32", "F16")
    block, size = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (6, 512 // block * size), np.uint8)
    if plain:
        stored = stored.view({"F32": np.float32, "F16": np.float16}[name])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("first", np.ones(3, np.float32))
    writer.add_tensor("two", stored, raw_dtype=None if plain else kind)
    writer.add_tensor("three", stored.reshape(3, 2, -1), raw_dtype=None if plain else kind)
    file = GGUFFile(finish(writer, tmp_path / "m.gguf"))
    tensor = next(t for t in gguf.GGUFReader(file.path).tensors if t.name == "two")

    assert file.shapes() == {"first": (3,), "two": (6, 512), "three": (3, 2, 512)}
    with np.errstate(all="ignore"):  # scales of random bytes overflow
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(6, 512)
        whole = file.read("two", (slice(0, 6), slice(0, 512)))
        np.testing.assert_array_equal(whole.astype(np.float32), expected)
        np.testing.assert_array_equal(
            file.read("two", (slice(2, 5), slice(7, 70))), whole[2:5, 7:70]
        )
        cube = whole.reshape(3, 2, 512)
        for index in np.s_[1:3, 1:2, 3:9], np.s_[1:2, 1:2, 3:9]:  # of several matrices, and of one
            np.testing.assert_array_equal(file.read("three", index), cube[index])
    np.testing.assert_array_equal(file.read("first", (slice(1, 3),)), [1, 1])
    file.check_readable("two")


YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}


def fields(**values: Any) -> Write:
    """Writes metadata by the names of the writer's methods: ``fields(rope_freq_base=1e4)``."""
    return lambda writer: [getattr(writer, f"add_{name}")(value) for name, value in values.items()]


ADD_YARN = {"rope_freq_base": 5e5, "rope_scaling_type": gguf.RopeScalingType.YARN}
ADD_YARN |= {"rope_scaling_factor": 4.0, "rope_scaling_orig_ctx_len": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
ADD_LINEAR = {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
MINISTRAL3 = YARN | {
    "beta_fast": 16.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.25,
}
NO_WINDOW = {"sliding_window": None}
ROTATIONS = {"no_rope_layer_interval": 4, "no_rope_layers": None, "num_hidden_layers": 5}
GRANITE = {
    "embedding_scale": 6.0,
    "residual_scale": 0.4,
    "attention_scale": 0.3,
    "logit_scale": 4.0,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
PATTERN = {"sliding_window": 4, "sliding_window_pattern": [True, False, True]}
MISTRAL = {
    "rope_scaling_yarn_beta_fast": 16.0,
    "rope_scaling_yarn_log_mul": 0.5,
    "attn_temperature_scale": 0.25,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# By model type: llama.cpp's architecture, changes of the model, and what its file says.
FAMILIES: dict[str, tuple[str, dict[str, Any], Write]] = {
    "llama": ("llama", {}, fields(rope_freq_base=1e4)),
    "qwen2": (
        "qwen2",
        NO_WINDOW | {"rope_parameters": LINEAR},
        fields(rope_freq_base=1e4, **ADD_LINEAR),
    ),
    "qwen3": ("qwen3", NO_WINDOW, fields(rope_freq_base=1e4)),
    "gemma": ("gemma", {"head_dim": 8}, fields()),
    "gemma2": ("gemma2", {}, fields(sliding_window=4, **CAPS)),
    "gemma3_text": ("gemma3", {}, fields(sliding_window=4, rope_freq_base=1e6)),
    "phi3": ("phi3", {"sliding_window": 4}, fields(sliding_window=4, rope_dimension_count=8)),
    "olmo2": ("olmo2", {}, fields(rope_freq_base=1e4)),
    "olmo3": ("olmo2", {"rope_parameters": OLMO3}, fields(**PATTERN, **ADD_YARN)),
    "ministral3": ("mistral3", {"rope_parameters": MINISTRAL3}, fields(**ADD_YARN, **MISTRAL)),
    "smollm3": ("smollm3", ROTATIONS, fields(rope_freq_base=2e6)),
    "granite": ("granite", {}, fields(**GRANITE)),
    "mixtral": ("llama", NO_WINDOW, fields(**EXPERTS, rope_freq_base=1e6)),
    "qwen3_moe": ("qwen3moe", NO_WINDOW, fields(**EXPERTS, expert_feed_forward_length=20)),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_comes_back_from_its_file(tmp_path, tiny_model, params_of, model_type):
    architecture, changes, more = FAMILIES[model_type]
    model, config = tiny_model(model_type, **changes)
    params = params_of(model, config)
    file = GGUFFile(
        write_model(tmp_path / "m.gguf", architecture, model.config.to_dict(), params, more)
    )

    assert ModelConfig.from_hf(hf_config(file)) == config
    loaded = load_params(param_shapes(config), file, keymap_for(config, "gguf"), dtype="float32")
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(flatten(loaded)[path], leaf, rtol=0, atol=1e-6, err_msg=path)


# What transformers takes for granted instead of reading it from the file.
TRANSFORMERS_READS = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "gemma3_text": {},
    "phi3": {},
    "qwen3_moe": {"moe_intermediate_size": 768, "head_dim": 128},
}


@pytest.mark.parametrize("model_type", TRANSFORMERS_READS)
def test_these_files_are_what_transformers_expects(tmp_path, tiny_model, params_of, model_type):
    """An independent reader of names, row orders and norms: it must find the model that the file
    was written from."""
    architecture, changes, more = FAMILIES[model_type]
    model, config = tiny_model(
        model_type, **changes, **TRANSFORMERS_READS[model_type], hidden_size=32
    )
    params = params_of(model, config)
    path = write_model(tmp_path / "m.gguf", architecture, model.config.to_dict(), params, more)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_quantized_model_is_right_on_a_mesh_and_in_blocks(tmp_path, monkeypatch):
    """Rows of 32 in Q8_0 with norms in float32: the values are the dequantized ones, cast once."""
    raw = MODEL | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    config, kind, stored = ModelConfig.from_hf(raw), GGMLQuantizationType.Q8_0, {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    add_shape(writer, raw)
    for name, tensor in tensors_from_params(config, random_params(raw), "gguf"):
        blocks = gguf.quants.quantize(tensor, kind) if tensor.ndim == 2 else tensor
        writer.add_tensor(name, blocks, raw_dtype=kind if tensor.ndim == 2 else None)
        stored[name] = gguf.quants.dequantize(blocks, kind) if tensor.ndim == 2 else tensor
    path, mesh = finish(writer, tmp_path / "m.gguf"), make_mesh(MeshConfig(1, 4, 2))
    expected = flatten(params_from_tensors(config, stored.__getitem__, "gguf"))
    monkeypatch.setattr(tensors, "READ_BLOCK", 40)
    for name, leaf in flatten(load_model(str(path), dtype="bfloat16", mesh=mesh).params).items():
        np.testing.assert_array_equal(
            leaf, expected[name].astype("bfloat16"), strict=True, err_msg=name
        )


def test_llama3_divisors_become_its_settings_and_others_are_kept(tmp_path):
    settings = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    settings |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    wide = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        **(MODEL | wide | {"max_position_embeddings": 131_072}), rope_parameters=settings
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = 5e5 ** -(np.arange(0, 64, 2) / 64) / stretched.numpy()

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(5e5)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))

    def rope() -> dict[str, Any]:
        return hf_config(GGUFFile(write_llama(tmp_path / "m.gguf", more, **wide)))["rope_scaling"]

    assert rope() == {
        key: pytest.approx(value) for key, value in settings.items() if key != "rope_theta"
    }

    divisors[3] = 1.5  # nothing that Llama 3's rule gives
    found = rope()
    np.testing.assert_allclose(found["short_factor"], divisors, rtol=1e-6)
    assert found["long_factor"] == found["short_factor"]
    assert found["attention_factor"] == 1.0


def test_gguf_errors_name_file_and_field(tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    good = path.read_bytes()
    bad = {
        "begins with b'PK": b"PK\x03\x04" + good[4:],
        "found version 1": good[:4] + struct.pack("<I", 1) + good[8:],
        "big-endian": good[:4] + struct.pack(">I", 3) + good[8:],
        "at most": good[:8] + struct.pack("<Q", 2**60) + good[16:],
        "until the end of the file": good[: len(good) // 20],
        "bytes beyond": good[:-4],
        "found cannot mmap an empty file": b"",
    }
    for found, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(NaloraError, match="m.gguf") as error:
            GGUFFile(path)
        assert found in str(error.value)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(*shape: int, kind: int = 0) -> bytes:
    """A row of the table of tensors."""
    return text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


UINT32, ARRAY, Q4_0 = 4, 9, 2


@pytest.mark.parametrize(
    ("keys", "tensors", "match"),
    [
        ([text(b"a") + struct.pack("<II", UINT32, 1)] * 2, [], "each key once, found a again"),
        (
            [text(b"general.alignment") + struct.pack("<II", UINT32, 3)],
            [],
            "a power of two as general.alignment, found 3",
        ),
        ([text(b"a") + struct.pack("<I", 99)], [], "a value type of GGUF, found type 99"),
        (
            [text(b"a") + struct.pack("<II", ARRAY, ARRAY)],
            [],
            "an array of numbers or strings, found type 9",
        ),
        ([text(b"\xff")], [], "a UTF-8 string, found invalid start byte"),
        ([], [tensor(1, 1, 1, 1, 1)], "t: 1 to 4 dimensions, found 5"),
        ([], [tensor(4, 0)], "t: dimensions of 1 or more, found"),
        ([], [tensor(4, kind=999)], "t: a tensor type of GGUF, found 999"),
        ([], [tensor(8, kind=Q4_0)], "t: rows of whole Q4_0 blocks of 32, found rows of 8"),
        ([], [tensor(1)] * 2, "each tensor once, found t again"),
    ],
)
def test_damaged_headers_are_refused_at_their_byte(tmp_path, keys, tensors, match):
    counts = struct.pack("<IQQ", 3, len(tensors), len(keys))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join([b"GGUF", counts, *keys, *tensors, bytes(64)]))
    with pytest.raises(NaloraError, match=f"m.gguf: GGUF header, byte .*expected {match}"):
        GGUFFile(path)


def value(add: str, *given: Any) -> Write:
    return lambda writer: getattr(writer, f"add_{add}")(*given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (value("uint32", "split.count", 3), "part of 3.*llama-gguf-split"),
        (value("string", "general.architecture", "mamba"), "general.architecture.*llama.*'mamba'"),
        (
            value("tensor", "output.weight", np.ones((48, 16))),
            "weight: expected one of F32.*found F64",
        ),
        (value("uint32", "llama.attention.sliding_window", 64), "sliding_window.*not supported"),
        (fields(causal_attention=False), "is_causal: expected true"),
        (fields(rope_dimension_count=2), "partial_rotary_factor"),
        (value("uint32", "llama.attention.head_count", 0), "head_count: expected 1 or more, found"),
        (value("string", "llama.rope.scaling.type", "magic"), "scaling.factor"),
    ],
)
def test_models_that_are_refused(tmp_path, change, match):
    path = write_llama(tmp_path / "m.gguf", change)
    with pytest.raises(NaloraError, match=match):
        load_model(str(path), dtype="float32")


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_adapter_file_is_the_difference_of_merged_and_base(
    family, tiny_model, random_lora, tmp_path
):
    """By llama.cpp's rule: W + alpha / rank * B A, with the rank of each tensor, in llama.cpp's row
    order."""
    model, config = tiny_model(family)
    lora, spec = random_lora(config, mixed(config), rslora=True)
    params = random_params(model.config.to_dict())

    path = write_adapter_gguf(tmp_path / "a.gguf", config, lora, spec)

    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == BUILT_IN[family].gguf.architecture
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    before = dict(tensors_from_params(config, params, "gguf"))
    for name, after in tensors_from_params(
        config, merged_params(config, params, lora, spec), "gguf"
    ):
        a, b = stored.pop(f"{name}.lora_a", None), stored.pop(f"{name}.lora_b", None)
        delta = after - before[name]
        if a is None:
            assert not delta.any(), name
        else:
            np.testing.assert_allclose(
                alpha / a.shape[-2] * (b @ a), delta, atol=1e-5, err_msg=name
            )
    assert not stored

    verify_adapter_gguf(path, config, lora, spec)
    for factor in (1.001, np.nan):
        other = map_named(lambda _, leaf, factor=factor: leaf * factor, lora)
        with pytest.raises(NaloraError, match="expected the adapter that was exported"):
            verify_adapter_gguf(path, config, other, spec)
    with pytest.raises(NaloraError, match=r"a\.gguf: expected a new file"):
        write_adapter_gguf(path, config, lora, spec)
    with pytest.raises(NaloraError, match="DoRA"):
        write_adapter_gguf(tmp_path / "m.gguf", config, lora, replace(spec, dora=True))
    assert not (tmp_path / "m.gguf").exists()
