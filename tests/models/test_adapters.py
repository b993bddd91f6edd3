"""Initial values of adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from nalora_jax.common.trees import flatten
from nalora_jax.config import AdaLoRAConfig, LoRAConfig, LoRARule, RunConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from tests import tiny

BASE = ModelConfig.from_hf(tiny.HF | {"hidden_size": 64, "intermediate_size": 512})
ZERO_A = LoRAConfig(rules=(LoRARule("layers/0/ffn", 8), LoRARule("ffn", 4)), init="zero_a")


def test_zero_a_starts_with_a_gaussian_b() -> None:
    config = RunConfig(lora=ZERO_A)
    leaves = flatten(init_lora(BASE, adapter_spec(config, BASE), jax.random.key(0)))
    assert all(not np.any(leaf) for path, leaf in leaves.items() if path.endswith("/a"))
    b = np.asarray(leaves["layers/ffn/gate_proj/b"])
    assert b.shape == (2, 8, 512)
    assert np.std(b[0]) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert abs(np.mean(np.abs(b[0]) / np.std(b[0])) - math.sqrt(2 / math.pi)) < 0.02  # of a Gaussian
    assert not np.any(b[1, 4:])  # beyond the layer's rank


@pytest.mark.parametrize("changes", [{"adalora": AdaLoRAConfig(target_rank=2)}])
def test_zero_a_is_refused_by_name(changes: dict) -> None:
    with pytest.raises(NaloraError, match="--lora.init: expected default .*found zero_a"):
        check(replace(RunConfig(lora=ZERO_A), **changes))
