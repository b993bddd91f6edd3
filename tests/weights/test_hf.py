"""Hugging Face folders: values, placement, quantization and identity of the weights, and what is
refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
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
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import quantize
from nalora_jax.weights import origin, tensors
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.origin import fingerprint
from nalora_jax.weights.shards import INDEX, read_header
from nalora_jax.weights.tensors import load_params, quantized_parts
from tests.models.family_fields import LATENT
from tests.param_trees import bytes_per_device, params_from_tensors, quantize_params
from tests.weights.folders import RAW, tokenizer_files, write_folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """Replaces the folder's file by ``count`` shards and their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {
        name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(NaloraError, match=match):
        load_model(str(folder), dtype="float32")


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
        state |= {
            name: t.to(getattr(torch, dtype)).float().numpy() for name, t in converted.items()
        }
    model = load_model(str(tmp_path), dtype=dtype)
    expected, found = (
        flatten(params_from_tensors(model.config, state.__getitem__)),
        flatten(model.params),
    )
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected[name], err_msg=name)
    assert model.source == str(tmp_path)
    assert model.hf_config["model_type"] == model.config.model_type == family


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path):
    tensors = write_folder(tmp_path, RAW | {"tie_word_embeddings": True})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in load_model(str(tmp_path), dtype="float32").params
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "lm_head.weight.*model.embed_tokens.weight.*tie_word_embeddings")


def test_every_device_gets_its_shard_alone(tmp_path, monkeypatch):
    write_folder(tmp_path)
    read, sizes = SafetensorsFolder.read, []

    def counted(*of: Any) -> np.ndarray:
        array = read(*of)
        sizes.append(array.size)  # by several threads
        return array

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    params = load_model(str(tmp_path), dtype="float32", mesh=make_mesh(MeshConfig(2, 2, 2))).params
    total, replicated = size_bytes(params), 4 * 16 * 7  # the norms
    for count in bytes_per_device(params).values():
        assert count == (total - replicated) // 4 + replicated
    assert sum(sizes) == total // 4  # each number once, replicas included


@pytest.mark.parametrize(("kind", "besides"), [(None, 3e6), ("nf4", 5e6)])
def test_loading_takes_the_parameters_and_a_block_for_each_core(
    tmp_path, monkeypatch, kind, besides
):
    """A second copy of one leaf takes 4.2 MB, a whole kernel in floats 8.4 MB."""
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 8}
    write_folder(tmp_path, RAW | wide)
    config, aligned, places = ModelConfig.from_hf(RAW | wide), tensors.allocate_aligned, []

    def recorded(*of: Any) -> np.ndarray:
        buffer = aligned(*of)
        places.append(buffer.ctypes.data)
        return buffer

    monkeypatch.setattr(tensors, "allocate_aligned", recorded)
    model = param_shapes(config), SafetensorsFolder(tmp_path), keymap_for(config)
    load_params(*model, dtype="bfloat16", quantized=kind)  # compiles
    tracemalloc.start()
    params = load_params(*model, dtype="bfloat16", quantized=kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size_bytes(params) < peak < size_bytes(params) + besides
    for leaf in jax.tree.leaves(params):  # which JAX uses without a copy
        assert np.asarray(leaf).ctypes.data in places


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


def test_number_formats_are_listed_by_their_shares_of_the_weights(folder):
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    total, mlp = (sum(t.size for n, t in tensors.items() if word in n) for word in ("", "mlp"))
    half = {
        name: t.astype(ml_dtypes.bfloat16) if "mlp" in name else t for name, t in tensors.items()
    }
    save_file(half, folder / "model.safetensors")
    numbers = f"BF16 ({mlp / total:.0%}), F32 ({1 - mlp / total:.0%})"
    assert origin.number_formats(SafetensorsFolder(folder)) == numbers


def test_codes_are_those_of_the_whole_model(tmp_path):
    larger = RAW | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    write_folder(tmp_path, larger | {"model_type": "phi3", "pad_token_id": 0})  # fused projections
    floats = load_model(str(tmp_path), dtype="float32")
    expected = flatten(quantize_params(floats.params, "nf4"))
    found = flatten(load_model(str(tmp_path), dtype="float32", quantized="nf4").params)
    assert found.keys() == expected.keys() != flatten(floats.params).keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], strict=True, err_msg=path)


@pytest.mark.parametrize(
    ("codes", "scales", "most"),
    [
        # Rows 96 to 160 of the weights touch two blocks of 64, and one scale of each; columns 8 to
        # 16 of 24.
        ([((0, 2), (48, 80), (8, 16))], [((0, 2), (1, 2), (8, 16))], 2 * 128 * 8),
        # Two chips of a torus: what lies between their rows is another process's.
        ([((0, 2), (0, 32), (0, 24)), ((0, 2), (96, 128), (0, 24))], [], 2 * 2 * 64 * 24),
    ],
)
def test_a_process_quantizes_what_its_devices_hold(codes, scales, most):
    kernel, read = np.random.default_rng(0).normal(size=(2, 256, 24)).astype(np.float32), []

    def reader(index: Any, dtype: Any) -> np.ndarray:
        read.append(kernel[index].size)
        return kernel[index].astype(dtype)

    parts = quantized_parts(kernel.shape, "nf4", codes, scales, reader)
    whole = quantize(kernel, "nf4")
    for keys, found, of in zip((codes, scales), parts, (whole.codes, whole.scales), strict=True):
        assert list(found) == keys
        for key, part in found.items():
            np.testing.assert_array_equal(part, np.asarray(of)[tuple(slice(*span) for span in key)])
    assert sum(read) == most


def test_one_file_next_to_an_index_is_read_as_transformers_reads_it(tmp_path):
    whole, name = write_folder(tmp_path), "model.norm.weight"
    write_shards(tmp_path, {name: tensor + 1 for name, tensor in whole.items()}, 2)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    np.testing.assert_array_equal(theirs.numpy(), whole[name])
    ours = load_model(str(tmp_path), dtype="float32").params["final_norm"]["scale"]
    np.testing.assert_array_equal(ours, whole[name])


def test_files_that_change_after_their_header_was_read_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones(4, np.float32)}, path)
    stored = read_header(path)[0]["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(NaloraError, match="expected 16 bytes from .*, found 12; the file changed"):
        stored.read(0, 16)
    path.unlink()
    with pytest.raises(NaloraError, match="expected a file that can be read"):
        stored.read(0, 16)


def test_tensors_that_are_not_needed_may_have_any_format(tmp_path):
    good = write_folder(tmp_path)
    expected = flatten(load_model(str(tmp_path), dtype="float32").params)
    rotary = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    extra = {rotary.format(0): np.array(1.5, np.float32), rotary.format(1): np.array([True, False])}
    save_file(good | extra, tmp_path / "model.safetensors")
    found = flatten(load_model(str(tmp_path), dtype="float32").params)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], strict=True, err_msg=path)


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
    refused(
        tmp_path,
        "index.json: expected the file 'model-00002-of-00003.saf.*found 1 of 3 files missing",
    )
    save_file({"other": np.ones(3, np.float32)}, second)
    refused(
        tmp_path, "index.json: expected .* in model-00002-of-00003.saf.*, found a file without it"
    )
    second.write_bytes(whole)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": f"../{second.name}"}}))
    refused(tmp_path, "expected the file .* that it names, found 1 of 1 files missing")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": 3}}))
    refused(tmp_path, "weight_map: expected file names of this folder")
    (tmp_path / INDEX).write_text(index[:-3])
    refused(tmp_path, r"index.json: expected a JSON file")
    (tmp_path / INDEX).unlink()
    refused(tmp_path, rf"expected model.safetensors, or several files and {INDEX}")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(
        tmp_path, "found no safetensors file; pytorch_model.bin is a pickle, which can run any code"
    )


def test_a_layer_that_predicts_further_tokens_is_left_out_and_named(tmp_path, caplog):
    raw = RAW | LATENT | {"model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 2}
    raw |= {"num_experts_per_tok": 2, "topk_group": 1, "moe_intermediate_size": 20}
    raw |= {"first_k_dense_replace": 1}
    written = write_folder(tmp_path / "m", raw)
    further = {"model.layers.3.eh_proj.weight": np.ones((16, 32), np.float32)}
    note = "m: without layer 3, which predicts further tokens (num_nextn_predict_layers)"
    for more in ({}, further):
        save_file(written | more, tmp_path / "m" / "model.safetensors")
        with caplog.at_level("INFO", "nalora_jax"):
            load_model(str(tmp_path / "m"), dtype="float32")
        assert (note in caplog.text) == bool(more)
