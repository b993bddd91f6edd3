"""A rule of studies/new_rules, against NumPy in float64."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common import imports
from nalora_jax.method.rules import MECHANISMS
from nalora_jax.method.transform import init_gate_state, make_mechanisms, scale_by_gates, update_gate_state

AGREEMENT = Path(__file__).parents[2] / "studies" / "agreement.py"
LAYERS, RANK, CHANNELS = 3, 4, 48


def test_agreement_is_the_column_of_adams_ratio_over_its_layers_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imports, "_IMPORTED", dict(imports._IMPORTED))
    monkeypatch.setattr(MECHANISMS, "_values", dict(MECHANISMS._values))
    imports.import_file(str(AGREEMENT))
    rng = np.random.default_rng(0)
    update = rng.standard_normal((LAYERS, RANK, CHANNELS)) * rng.uniform(0.1, 2, (LAYERS, 1, CHANNELS))
    mechanisms = make_mechanisms(("agreement:warmup=0",), activation="silu")
    sums = {"tokens": jnp.full(LAYERS, 10.0), "slope": jnp.ones((LAYERS, CHANNELS))}
    state = init_gate_state({"layers/ffn": (LAYERS, CHANNELS)}, mechanisms)
    state = update_gate_state(state, {"layers/ffn": sums}, mechanisms)
    transform = scale_by_gates(mechanisms, {"gate": "layers/ffn"})
    scaled, _ = transform.update(
        {"gate": {"b": jnp.asarray(update, jnp.float32)}}, state, gate_stats={"layers/ffn": sums}
    )
    importance = np.sqrt((update**2).mean(1))
    want = update * (importance / importance.mean(-1, keepdims=True))[:, None]
    want *= np.sqrt((update**2).sum((1, 2)) / (want**2).sum((1, 2)))[:, None, None]
    np.testing.assert_allclose(scaled["gate"]["b"], want, rtol=1e-5)
    assert (np.abs(want / update - 1) > 0.3).mean() > 0.3
