"""Rules, ranks, scales and initial values of adapters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common.trees import flatten
from nalora_jax.config import AdaLoRAConfig, LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.method.low_rank import init_a
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec, TargetSpec, adapter_scale, resolve
from tests import tiny

SHAPES = {
    "layers/ffn/gate_proj": (16, 40),
    "layers/ffn/up_proj": (16, 40),
    "layers/attn/q_proj": (16, 12),
}


def test_scales_follow_lora_and_rslora() -> None:
    spec = AdapterSpec((("layers/ffn/gate_proj", TargetSpec((8, 4, 0), (16.0, 16.0, 1.0))),))
    np.testing.assert_allclose(spec.scales("layers/ffn/gate_proj"), [2.0, 4.0, 0.0])
    assert adapter_scale(16, 4, rslora=True) == 8.0


def test_rules_decide_in_order_and_per_layer() -> None:
    config = LoRAConfig(
        rules=(
            LoRARule(r"layers/1/ffn/gate", 2, 3.0),
            LoRARule("gate_proj", 8),
            LoRARule("q_proj", 4, 4.0),
        )
    )
    spec = resolve(config, SHAPES, 3)
    assert spec.target("layers/ffn/gate_proj") == TargetSpec((8, 2, 8), (16.0, 3.0, 16.0))
    assert spec.target("layers/attn/q_proj") == TargetSpec((4, 4, 4), (4.0, 4.0, 4.0))
    assert spec.target("layers/ffn/up_proj") is None


@pytest.mark.parametrize(
    ("rule", "init", "message"),
    [
        (LoRARule("nothing_like_it"), "default", "matches nothing.*layers/\\*/ffn/gate_proj"),
        (LoRARule("gate_proj", 17), "default", "rank.*0 to 16.*found 17"),
        (
            LoRARule("gate_proj", 9),
            "lora_ga",
            "0 to 8 \\(half the smaller side, for LoRA-GA.*found 9",
        ),
        (LoRARule("gate_proj", 4, 0.0), "default", "alpha"),
        (LoRARule("gate_proj", 0), "default", "at least one adapter"),
        (LoRARule("gate_(proj"), "default", "regular expression"),
    ],
)
def test_bad_rules_are_refused_by_name(rule: LoRARule, init: Any, message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        resolve(LoRAConfig(rules=(rule,), init=init), SHAPES, 2)


def test_init_a_has_pefts_bound() -> None:
    a = init_a(jax.random.key(0), (256, 64))
    assert float(jnp.abs(a).max()) <= 1 / 16
    np.testing.assert_allclose(jnp.std(a), 1 / 16 / np.sqrt(3), rtol=0.03)


BASE = ModelConfig.from_hf(tiny.HF | {"hidden_size": 64, "intermediate_size": 512})
ZERO_A = LoRAConfig(rules=(LoRARule("layers/0/ffn", 8), LoRARule("ffn", 4)), init="zero_a")


def test_zero_a_starts_with_a_gaussian_b() -> None:
    config = RunConfig(lora=ZERO_A)
    leaves = flatten(init_lora(BASE, adapter_spec(config, BASE), jax.random.key(0)))
    assert all(not np.any(leaf) for path, leaf in leaves.items() if path.endswith("/a"))
    b = np.asarray(leaves["layers/ffn/gate_proj/b"])
    assert b.shape == (2, 8, 512)
    assert np.std(b[0]) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)
    assert (
        abs(np.mean(np.abs(b[0]) / np.std(b[0])) - math.sqrt(2 / math.pi)) < 0.02
    )  # of a Gaussian
    assert not np.any(b[1, 4:])  # beyond the layer's rank


def test_zero_a_is_refused_by_name() -> None:
    config = RunConfig(lora=ZERO_A, adalora=AdaLoRAConfig(target_rank=2))
    with pytest.raises(NaloraError, match="--lora.init: expected default .*found zero_a"):
        check_run_config(config)
