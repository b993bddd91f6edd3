"""Hugging Face folders: values, placement, quantization and identity of the weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import flatten, size_bytes
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import PARAM_RULES, make_mesh, shardings
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import quantize
from nalora_jax.weights import origin, tensors
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.origin import fingerprint
from nalora_jax.weights.shards import INDEX
from nalora_jax.weights.tensors import Index, load_params, quantized_parts
from tests.param_trees import bytes_per_device, params_from_tensors, quantize_params
from tests.weights.folders import RAW, WIDE, loaded_and_peak, tokenizer_files, write_folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """Replaces the folder's file by ``count`` shards and their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("phi3", "float32", "bfloat16"),
        ("mixtral", "float16", "float32"),
        ("llama", "float8_e4m3fn", "bfloat16"),
        ("llama", "float8_e5m2", "float32"),
    ],
)
def test_a_saved_torch_model_loads_from_shards(tmp_path, tiny_model, family, stored, dtype):
    """With torch's conversions of the numbers."""
    torch_model, _ = tiny_model(family)
    torch_model.save_pretrained(tmp_path, max_shard_size="8KB")
    tokenizer_files(tmp_path)
    assert (tmp_path / INDEX).exists()
    state = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        converted = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()}
        safetensors.torch.save_file(converted, path, {"format": "pt"})
        state |= {name: t.to(getattr(torch, dtype)).float().numpy() for name, t in converted.items()}
    model = load_model(str(tmp_path), dtype=dtype)
    expected, found = flatten(params_from_tensors(model.config, state.__getitem__)), flatten(model.params)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected[name], err_msg=name)
    assert model.source == str(tmp_path)
    assert model.hf_config["model_type"] == model.config.model_type == family


def test_tensors_larger_than_a_block(tmp_path, monkeypatch):
    expected = flatten(params_from_tensors(ModelConfig.from_hf(RAW), write_folder(tmp_path).__getitem__))
    monkeypatch.setattr(tensors, "BLOCK", 100)
    monkeypatch.setattr(tensors, "WORKERS", 7)
    for path, leaf in flatten(load_model(str(tmp_path), dtype="float32").params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path):
    tensors = write_folder(tmp_path, RAW | {"tie_word_embeddings": True})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in load_model(str(tmp_path), dtype="float32").params
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        NaloraError, match=r"lm_head.weight.*model.embed_tokens.weight.*tie_word_embeddings"
    ):
        load_model(str(tmp_path), dtype="float32")


# ---------------------------------------------------------------- placement


class Counted(SafetensorsFolder):
    """Counts the numbers that are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sizes: list[int] = []  # several threads append

    def read(self, name: str, index: Index) -> np.ndarray:
        array = super().read(name, index)
        self.sizes.append(array.size)
        return array


def test_every_device_gets_its_shard_alone(tmp_path):
    write_folder(tmp_path)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    alone, spread = (load_model(str(tmp_path), dtype="float32", mesh=m) for m in (None, mesh))
    for path, leaf in flatten(spread.params).items():
        np.testing.assert_array_equal(leaf, flatten(alone.params)[path], err_msg=path)
    total, replicated = size_bytes(alone.params), 4 * 16 * 7  # the norms
    for count in bytes_per_device(spread.params).values():
        assert count == (total - replicated) // 4 + replicated

    config, source = alone.config, Counted(tmp_path)
    places = flatten(shardings(alone.params, mesh, PARAM_RULES))
    load_params(param_shapes(config), source, keymap_for(config, "hf"), dtype="float32", shardings=places)
    assert sum(source.sizes) == total // 4  # each number once, replicas included


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_the_parameters_and_a_block(tmp_path):
    """A second copy of one leaf, 67 MB, would show, and a whole kernel in floats (17 MB a layer)."""
    raw = RAW | WIDE | {"tie_word_embeddings": True}
    (packed, with_codes), (floats, with_floats) = loaded_and_peak(tmp_path, raw, ("nf4", None))
    assert packed < 0.3 * 243 < 230 < floats
    assert with_codes < packed + 80
    assert with_floats < floats + 32


# ---------------------------------------------------------------- identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path)
    return tmp_path


def digest(folder: Path, **changes: Any) -> str:
    return fingerprint(ModelConfig.from_hf(RAW | changes), SafetensorsFolder(folder))


def test_the_digest_covers_settings_and_every_weight_and_not_the_shards(folder, monkeypatch):
    """A flipped bit anywhere in the file's data changes it."""
    monkeypatch.setattr(origin, "_CHUNK", 1000)
    first, path = digest(folder), folder / "model.safetensors"
    good = path.read_bytes()
    seen = {first, digest(folder, rms_norm_eps=1e-6)}
    for at in np.linspace(8 + int.from_bytes(good[:8], "little"), len(good) - 1, 12, dtype=int):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        seen.add(digest(folder))
    assert len(seen) == 14
    path.write_bytes(good)
    write_shards(folder, load_file(path), 4)
    assert digest(folder) == first


def test_processes_share_the_hashing(folder, monkeypatch):
    alone = digest(folder)
    config, source, parts = ModelConfig.from_hf(RAW), SafetensorsFolder(folder), []
    monkeypatch.setattr(origin.jax, "process_count", lambda: 3)
    for gather in (lambda mine: parts.append(mine) or np.stack([mine]), lambda _: np.stack(parts)):
        monkeypatch.setattr(origin.multihost_utils, "process_allgather", gather)
        for index in range(3):
            monkeypatch.setattr(origin.jax, "process_index", lambda index=index: index)
            found = fingerprint(config, source, together=True)
    assert found == alone
    read = [int((part != 0).any(axis=1).sum()) for part in parts]
    assert max(read) < sum(read) == len(parts[0])


def test_a_model_knows_its_file_formats_by_their_shares_and_its_digest(folder):
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    half = {name: t.astype(ml_dtypes.bfloat16) if "mlp" in name else t for name, t in tensors.items()}
    save_file(half, folder / "model.safetensors")
    total, mlp = (sum(t.size for n, t in tensors.items() if word in n) for word in ("", "mlp"))
    numbers = f"BF16 ({mlp / total:.0%}), F32 ({1 - mlp / total:.0%})"
    model = load_model(str(folder), dtype="bfloat16")
    assert model.origin is not None
    assert model.origin.to_dict() == {
        "name": str(folder),
        "file": folder.name,
        "format": "safetensors",
        "numbers": numbers,
        "fingerprint": digest(folder),
        "copy_of": "",
    }
    assert (model.source, model.fingerprint) == (model.origin.name, model.origin.fingerprint)
    described = f"{folder.name}: safetensors, {numbers.replace('%)', '% of the weights)', 1)}, digest all:"
    assert model.origin.describe().startswith(described)


# ---------------------------------------------------------------- quantized while they are read


LARGER = RAW | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FAMILIES = {
    "phi3": LARGER | {"model_type": "phi3", "pad_token_id": 0},  # fused projections
    "mixtral": LARGER | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(("family", "kind"), [("phi3", "nf4"), ("mixtral", "int8")])
def test_codes_are_those_of_the_whole_model(tmp_path, family, kind):
    write_folder(tmp_path, FAMILIES[family])
    whole = load_model(str(tmp_path), dtype="float32")
    want = flatten(quantize_params(whole.params, kind))
    found = load_model(str(tmp_path), dtype="float32", quantized=kind)
    assert found.fingerprint == whole.fingerprint
    assert len(flatten(found.params)) == len(want) > len(flatten(whole.params))
    for path, leaf in flatten(found.params).items():
        assert leaf.dtype == want[path].dtype
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)


@pytest.mark.parametrize(
    ("kind", "codes", "scales", "most"),
    [
        # Rows 96 to 160 of the weights touch two blocks of 64, and one scale of each; columns 8 to 16 of 24.
        ("nf4", [((0, 2), (48, 80), (8, 16))], [((0, 2), (1, 2), (8, 16))], 2 * 128 * 8),
        # Two chips of a torus: what lies between their rows is another process's.
        ("nf4", [((0, 2), (0, 32), (0, 24)), ((0, 2), (96, 128), (0, 24))], [], 2 * 2 * 64 * 24),
        # A scale of int8 is that of all inputs.
        ("int8", [((0, 2), (0, 64), (0, 12))], [((0, 2), (0, 1), (0, 12))], 2 * 256 * 12),
    ],
)
def test_a_process_quantizes_what_its_devices_hold(kind, codes, scales, most):
    kernel = np.random.default_rng(0).normal(size=(2, 256, 24)).astype(np.float32)
    read = []

    def reader(index: Any, dtype: Any) -> np.ndarray:
        read.append(kernel[index].size)
        return kernel[index].astype(dtype)

    made = quantized_parts(kernel.shape, kind, codes, scales, reader)
    whole = quantize(kernel, kind)
    for keys, parts, of in ((codes, made[0], whole.codes), (scales, made[1], whole.scales)):
        assert list(parts) == list(keys)
        for key, part in parts.items():
            np.testing.assert_array_equal(part, np.asarray(of)[tuple(slice(*span) for span in key)])
    assert sum(read) == most


# ---------------------------------------------------------------- bad folders


def refused(folder: Path, match: str) -> None:
    with pytest.raises(NaloraError, match=match):
        load_model(str(folder), dtype="float32")


def test_one_file_next_to_an_index_is_read_as_transformers_reads_it(tmp_path):
    whole, name = write_folder(tmp_path), "model.norm.weight"
    write_shards(tmp_path, {name: tensor + 1 for name, tensor in whole.items()}, 2)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    np.testing.assert_array_equal(theirs.numpy(), whole[name])
    ours = load_model(str(tmp_path), dtype="float32").params["final_norm"]["scale"]
    np.testing.assert_array_equal(ours, whole[name])


def test_tensors_that_are_not_needed_may_have_any_format(tmp_path):
    good = write_folder(tmp_path)
    rotary = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    extra = {rotary.format(0): np.array(1.5, np.float32), rotary.format(1): np.array([True, False])}
    save_file(good | extra, tmp_path / "model.safetensors")
    first = load_model(str(tmp_path), dtype="float32")
    save_file(good | extra | {rotary.format(1): np.array([True, True])}, tmp_path / "model.safetensors")
    assert load_model(str(tmp_path), dtype="float32").fingerprint != first.fingerprint


def test_damaged_shards_and_indices(tmp_path):
    good, up = write_folder(tmp_path), "model.layers.1.mlp.up_proj.weight"
    save_file(good | {up: good[up].astype(np.int8)}, tmp_path / "model.safetensors")
    refused(tmp_path, rf"{up}: expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, found I8")
    write_shards(tmp_path, good, 3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    whole, index = second.read_bytes(), (tmp_path / INDEX).read_text()

    second.write_bytes(whole[:-10])
    refused(tmp_path, r"model-00002-of-00003.safetensors: expected a complete safetensors file")
    second.unlink()
    refused(tmp_path, "index.json: expected the file 'model-00002-of-00003.saf.*found 1 of 3 files missing")
    save_file({"other": np.ones(3, np.float32)}, second)
    refused(tmp_path, "index.json: expected .* in model-00002-of-00003.saf.*, found a file without it")
    second.write_bytes(whole)
    for name in ("../model-00002-of-00003.safetensors", "x" * 300, "\ud800", ""):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        refused(tmp_path, "expected the file .* that it names, found 1 of 1 files missing")
    for listed in ({"weight_map": {}}, {"weight_map": {"a": 3}}, {}):
        (tmp_path / INDEX).write_text(json.dumps(listed))
        refused(tmp_path, "weight_map: expected file names of this folder")
    (tmp_path / INDEX).write_text(index[:-3])
    refused(tmp_path, r"index.json: expected a JSON file")
    (tmp_path / INDEX).unlink()
    refused(tmp_path, rf"expected model.safetensors, or several files and {INDEX}")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "found no safetensors file; pytorch_model.bin is a pickle, which can run any code")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mamba"}, r"config.json: model_type: expected one of .*llama.*found 'mamba'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "config.json: quantization_config"),
        ({"tie_word_embeddings": True}, "lm_head.weight.*tie_word_embeddings"),
        ({"num_hidden_layers": 2}, r"model.layers.0.*unknown tensor model.layers.2"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, match):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW | change))
    refused(tmp_path, match)


def test_a_multimodal_folder_loads_as_its_text_model_and_says_so(tmp_path, caplog):
    text = {**RAW, "model_type": "ministral3", "head_dim": 8, "pad_token_id": 0}
    tower = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower |= {"head_dim": 8, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=tower, tie_word_embeddings=False)
    theirs = transformers.AutoModelForImageTextToText.from_config(config)
    theirs.save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    with caplog.at_level("INFO"):
        model = load_model(str(tmp_path), dtype="float32")
    assert f"{tmp_path}: the text model of mistral3, without its image tower" in caplog.messages
    assert (model.config.model_type, model.config.query_growth) == ("ministral3", 0.1)
    expected = theirs.model.language_model.layers[2].mlp.up_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(flatten(model.params)["layers/ffn/up_proj/kernel"][2], expected)
