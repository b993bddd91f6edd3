"""Models quantized while they are read: the same codes as of the whole model at once, without ever holding it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax.common.trees import flatten
from nalora_jax.config import MeshConfig
from nalora_jax.layout.distributed import make_mesh
from nalora_jax.ops.quantize import quantize, quantize_params
from nalora_jax.weights.base import load_model
from nalora_jax.weights.tensors import quantized_parts
from tests.weights.folders import RAW, write_folder

LARGER = RAW | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FAMILIES = {
    "llama": LARGER,
    "phi3": LARGER | {"model_type": "phi3", "pad_token_id": 0},  # fused projections
    "mixtral": LARGER | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(("family", "kind"), [("llama", "int8"), ("phi3", "nf4"), ("mixtral", "int8")])
def test_codes_are_those_of_the_whole_model(tmp_path: Path, family: str, kind: str) -> None:
    write_folder(tmp_path, FAMILIES[family])
    whole = load_model(str(tmp_path), dtype="float32")
    want = flatten(quantize_params(whole.params, kind))
    found = load_model(str(tmp_path), dtype="float32", quantized=kind)
    assert found.fingerprint == whole.fingerprint
    assert len(flatten(found.params)) == len(want) > len(flatten(whole.params))
    for path, leaf in flatten(found.params).items():
        assert leaf.dtype == want[path].dtype
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)


def test_products_over_a_mesh_read_the_same_floats(tmp_path: Path) -> None:
    write_folder(tmp_path, LARGER)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    for kind in ("int8", "nf4"):
        alone, spread = (
            load_model(str(tmp_path), dtype="float32", quantized=kind, mesh=where).params["layers"]
            for where in (None, mesh)
        )
        for block, name in (("ffn", "gate_proj"), ("ffn", "down_proj"), ("attn", "k_proj")):
            ours, theirs = spread[block][name]["kernel"], alone[block][name]["kernel"]
            assert ours.places is not None
            assert ours.codes.addressable_shards[0].data.size == ours.codes.size // 8
            found = jax.jit(lambda kernel: kernel.expand())(ours)
            np.testing.assert_array_equal(found, theirs.expand())


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
def test_a_process_quantizes_what_its_devices_hold(kind, codes, scales, most) -> None:
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
