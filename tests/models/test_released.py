"""Configurations of released checkpoints (`nalora_jax/plan/released`): read as transformers reads them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from tests.models.test_families import SIZES, TOLERANCE, Case, measure_plain

SMALL = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "nalora_jax" / "cli" / "planning" / "released"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_in_transformers(name):
    raw = read(name)
    ours = ModelConfig.from_hf(raw)
    raw.pop("quantization_config", None)
    of_buffers = ("/correction", "tail/scale")
    shapes = {path: shape for path, shape in param_shapes(ours).items() if not path.endswith(of_buffers)}
    count = sum(math.prod(shape) for shape in shapes.values())
    text = transformers.AutoConfig.for_model(**raw).get_text_config()
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(text)
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    stated = re.search(rf"\| {re.escape(name)} \| ([\d,]+) \|", (FOLDER / "README.md").read_text())
    assert stated is not None
    assert count == int(stated[1].replace(",", ""))


@pytest.mark.parametrize("name", ["Qwen3-Coder-30B-A3B-Instruct", "phi-4"])
def test_logits_agree_at_small_sizes(name):
    """Models of families that existed before them, with every other field as released."""
    raw = {key: value[:4] if isinstance(value, list) else value for key, value in read(name).items()}
    sizes = set(SIZES) | {"model_type", "architectures", "dtype", "torch_dtype"} | SMALL.keys()
    config = {key: value for key, value in raw.items() if key not in sizes} | {
        k: v for k, v in SMALL.items() if k in raw
    }
    assert measure_plain(Case(raw["model_type"], name, config)) <= TOLERANCE
