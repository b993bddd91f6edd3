"""The gates of two models beside those that hooks read from transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from nalora_jax import config as cfg
from nalora_jax.__main__ import main
from nalora_jax.loading.adapted import load
from nalora_jax.report.gate_comparison import compare_gates
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.new_tokens import tokenizer_writer
from tests import tiny
from tests.refused import Call, table_test

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers
TEXTS = ["a b c d e", "z y x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, an adapter of it, and a model whose weights have moved."""
    root = tmp_path_factory.mktemp("gates")
    base = tiny.make_model(root / "base")
    rules = [cfg.LoRARule("ffn/(gate|up|down)_proj", 2)]
    adapter = tiny.make_adapter(root / "adapter", base, rules)
    model = load(base, dtype="float32").base
    rng = np.random.default_rng(0)

    def move(leaf: Any) -> Any:
        return np.asarray(leaf) + rng.normal(size=leaf.shape).astype(np.float32) * 0.05

    moved = jax.tree.map(move, model.params)
    adapted = load(adapter, dtype="float32")
    for name, params, lora in (("tuned", moved, None), ("merged", model.params, adapted.lora)):
        write_merged(
            root / name,
            model.config,
            params,
            lora,
            adapted.spec,
            hf_config=model.hf_config,
            tokenizer=tokenizer_writer(model),
        )
    return {path.name: path for path in root.iterdir()}


def gates_of(folder: Path, rows: list[list[int]]) -> np.ndarray:
    """Outputs of gate_proj in every layer, of all tokens, ``[layers, tokens, d_ff]``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layers = []
    for layer in model.model.layers:
        found: list[np.ndarray] = []
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, inputs, output, found=found: found.append(output.detach().numpy()[0])
        )
        layers.append(found)
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    return np.stack([np.concatenate(found) for found in layers]).astype(np.float64)


def test_figures_are_those_of_the_gates_in_transformers(folders):
    model, reference = (load(folders[name], dtype="float32") for name in ("adapter", "tuned"))
    found = compare_gates(model, reference, TEXTS)["layers/ffn"]
    rows = [model.base.tokenizer.encode(text) for text in TEXTS]
    z0, ours, theirs = (gates_of(folders[name], rows) for name in ("base", "merged", "tuned"))

    def rho(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    def total(values: np.ndarray) -> np.ndarray:
        return values.sum((1, 2))

    def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return total(x * y) / np.sqrt(total(x * x) * total(y * y))

    feature, their_feature = (rho(z0) * (z - z0) for z in (ours, theirs))
    selection, their_selection = ((rho(z) - rho(z0)) * z for z in (ours, theirs))
    moved = (theirs > 0) != (z0 > 0)
    followed = moved & ((ours > 0) == (theirs > 0))
    h, their_h = (np.clip(1 + z * (1 - rho(z)), -8, 8) for z in (ours, theirs))
    expected = {
        "misalignment": total(abs(selection)) / total(abs(feature)),
        "misalignment_of_reference": total(abs(their_selection)) / total(abs(their_feature)),
        "feature": cosine(feature, their_feature),
        "selection": cosine(selection, their_selection),
        "size": total(abs(feature)) / total(abs(their_feature)),
        "opened": moved.mean((1, 2)),
        "followed": total(followed) / total(moved),
        "homogeneity": abs(h - their_h).mean((1, 2)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=2e-3, err_msg=name)


def test_the_command_prints_a_table_and_writes_json(folders, tmp_path, capsys):
    file = tmp_path / "gates.json"
    arguments = ["--against", str(folders["tuned"]), "--json", str(file)]
    assert main(["inspect", str(folders["adapter"]), *arguments, "--texts", *TEXTS]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = next(line for line in lines if line.startswith("layer"))
    assert heads.split()[:2] == ["layer", "misalignment"]
    figures = json.loads(file.read_text())["layers/ffn"]
    mean = next(line for line in lines if line.startswith("mean"))
    assert float(mean.split()[1]) == pytest.approx(np.mean(figures["misalignment"]), abs=1e-4)


def compared(first: str, second: str) -> Call:
    def call(patch: pytest.MonkeyPatch, folder: Path) -> None:
        base = tiny.make_model(folder / "base")
        tiny.make_model(folder / "wide", tiny.GROUPED)
        tiny.make_adapter(folder / "adapter", base, [cfg.LoRARule("ffn/gate_proj", 2)])
        models = [load(folder / name, dtype="float32") for name in (first, second)]
        compare_gates(*models, TEXTS)

    return call


EXPERTS = tiny.HF | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def of_experts(patch: pytest.MonkeyPatch, folder: Path) -> None:
    base = tiny.make_model(folder / "base", EXPERTS)
    tiny.make_adapter(folder / "adapter", base, [cfg.LoRARule("attn/q_proj", 2)])
    model = load(folder / "adapter", dtype="float32")
    compare_gates(model, model, TEXTS)


REFUSALS: dict[str, tuple[Call, str]] = {
    "no adapter": (compared("base", "base"), "expected a model with an adapter, whose base is"),
    "experts alone": (of_experts, "expected a model with dense self-gated blocks, found qwen3_moe"),
    "another shape": (compared("adapter", "wide"), "--against: expected a run of .*another shape"),
}
test_it_is_refused = table_test(REFUSALS)
