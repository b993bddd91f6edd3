from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from nalora_jax.common import trees
from nalora_jax.config import OptimizerConfig, RunConfig, check, config_from_dict
from nalora_jax.errors import NaloraError
from nalora_jax.train.optimizers import make_optimizer

LORA = trees.unflatten(
    {
        f"layers/ffn/{name}/{leaf}": np.ones((2, 3), np.float32)
        for name in ("gate_proj", "up_proj")
        for leaf in "ab"
    }
)
GRADS = trees.map_named(lambda path, leaf: leaf * (1.0 + len(path)), LORA)


def trained(rates: tuple[tuple[str, float], ...], learning_rate: float) -> dict[str, np.ndarray]:
    """The adapters after three steps of AdamW with weight decay."""
    config = OptimizerConfig(
        rates=rates, learning_rate=learning_rate, weight_decay=0.1, schedule="constant"
    )
    optimizer, lora = make_optimizer(config, 3), LORA
    state = optimizer.init(lora)
    for _ in range(3):
        updates, state = optimizer.update(GRADS, state, lora)
        lora = optax.apply_updates(lora, updates)
    return trees.flatten(jax.device_get(lora))


def test_a_factor_is_a_learning_rate_of_its_own() -> None:
    found = trained((("gate_proj", 0.5), ("ffn", 2.0)), 1e-2)
    alone = {"gate_proj": trained((), 5e-3), "up_proj": trained((), 2e-2)}
    for path, value in found.items():
        np.testing.assert_allclose(value, alone[path.split("/")[2]][path], rtol=1e-6)
    assert not np.allclose(found["layers/ffn/gate_proj/a"], found["layers/ffn/up_proj/a"], atol=1e-3)


def test_a_pattern_without_an_adapter_is_refused() -> None:
    with pytest.raises(
        NaloraError, match="--optimizer.rates.*'attn', which matches nothing.*layers/ffn/gate_proj"
    ):
        make_optimizer(OptimizerConfig(learning_rate=1e-3, rates=(("attn", 2.0),)), 3).init(LORA)


def test_factors_are_checked_and_survive_json() -> None:
    config = RunConfig(optimizer=OptimizerConfig(rates=(("gate", 2.0),)))
    values = config.to_dict()
    values["optimizer"]["rates"] = [["gate", 2.0]]  # as JSON gives it back
    assert config_from_dict(values) == check(config)
    with pytest.raises(NaloraError, match="--optimizer.rates"):
        check(RunConfig(optimizer=OptimizerConfig(rates=(("gate", -1.0),))))
