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

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "nalora_jax" / "cli" / "planning" / "released"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_in_transformers(name):
    raw = json.loads((FOLDER / f"{name}.json").read_text())
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
