"""Learning rates: factors by adapter, and the rate of a run that names none."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from nalora_jax.assembly.optimizers import make_optimizer, make_schedule, resolve_learning_rate
from nalora_jax.common import trees
from nalora_jax.config import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
    check,
)  # fmt: skip
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import run_kind

PATHS = [f"layers/ffn/{name}/{leaf}" for name in ("gate_proj", "up_proj") for leaf in "ab"]
LORA = trees.unflatten({path: np.ones((2, 3), np.float32) for path in PATHS})
GRADS = trees.map_named(lambda path, leaf: leaf * (1.0 + len(path)), LORA)


def trained(rates: tuple[tuple[str, float], ...], learning_rate: float) -> dict[str, np.ndarray]:
    """The adapters after three steps of AdamW with weight decay."""
    settings = {"weight_decay": 0.1, "schedule": "constant"}
    config = OptimizerConfig(rates=rates, learning_rate=learning_rate, **settings)
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
    assert not np.allclose(
        found["layers/ffn/gate_proj/a"], found["layers/ffn/up_proj/a"], atol=1e-3
    )


def test_a_negative_factor_and_a_pattern_without_an_adapter_are_refused() -> None:
    with pytest.raises(NaloraError, match="--optimizer.rates"):
        check(RunConfig(optimizer=OptimizerConfig(rates=(("gate", -1.0),))))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, rates=(("attn", 2.0),)), 3)
    message = "--optimizer.rates.*'attn', which matches nothing.*layers/ffn/gate_proj"
    with pytest.raises(NaloraError, match=message):
        optimizer.init(LORA)


LEFT = RunConfig(optimizer=OptimizerConfig(learning_rate=0.0))


def rules(*given: LoRARule, **more: object) -> dict[str, LoRAConfig]:
    return {"lora": LoRAConfig(rules=given, **more)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "width", "rate"),
    [
        # What studies chose, which falls with the width.
        ({}, 576, 0.004),
        ({}, 2048, 0.0011),
        ({}, 0, 0.001),
        # It falls with the root of a large alpha, and does not rise.
        (rules(LoRARule("ffn", 16)), 576, 0.0028),
        (rules(LoRARule("ffn", 64, alpha=16.0)), 576, 0.004),
        # Its scale is that of alpha 128.
        (rules(LoRARule("ffn", 64, alpha=16.0), rslora=True), 576, 0.0014),
        (
            rules(LoRARule("gate", 0, alpha=99.0), LoRARule("up", 2), LoRARule("attn", 16)),
            576,
            0.0028,
        ),
        # Two rates that multiply, losses of pairs, adapters that start large, and those that start
        # slowly.
        ({"lora": LoRAConfig(plus_ratio=16.0)}, 576, 0.001),
        ({"preference": PreferenceConfig("dpo")}, 576, 0.0005),
        ({"lora": LoRAConfig(init="lora_ga")}, 576, 0.0005),
        ({"lora": LoRAConfig(init="pissa")}, 576, 0.001),
        ({"adalora": AdaLoRAConfig(target_rank=4)}, 576, 0.016),
        (rules(LoRARule("ffn", 64), init="gradient"), 576, 0.00071),
    ],
)
def test_the_automatic_rate_falls_with_the_width_and_follows_the_method(
    changes, width, rate
) -> None:
    config = replace(LEFT, **changes)
    settled = resolve_learning_rate(config, width, run_kind(config).rate)
    assert settled.optimizer.learning_rate == rate


def test_a_rate_that_is_named_stays_and_others_than_adam_need_one() -> None:
    named = replace(LEFT, optimizer=OptimizerConfig(name="sgd", learning_rate=0.3))
    assert resolve_learning_rate(named, 4096) is named
    with pytest.raises(NaloraError, match="expected a learning rate with lion, found auto"):
        resolve_learning_rate(replace(LEFT, optimizer=OptimizerConfig(name="lion")), 576)
    with pytest.raises(
        NaloraError, match=r"--optimizer.learning-rate: expected a number above 0, found auto"
    ):
        make_schedule(LEFT.optimizer, 10)
    with pytest.raises(NaloraError, match="expected a learning rate with --tune, found auto"):
        resolve_learning_rate(RunConfig(tune=("full",)), 576)


@pytest.mark.parametrize(
    ("settings", "steps", "rates"),
    [
        ({"warmup_share": 0.1}, 35, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1]),  # 3.5 steps, rounded up
        ({"warmup_share": 0.1, "warmup_steps": 2}, 35, [1 / 3, 2 / 3, 1, 1]),
        ({"warmup_steps": 9}, 4, [1 / 4, 2 / 4, 3 / 4, 1]),  # at most all steps but the last
        ({"warmup_steps": 2, "warmup_from_zero": True}, 35, [0, 1 / 2, 1, 1]),
        ({"warmup_share": 0.0}, 35, [1, 1]),
    ],
)
def test_the_warmup_has_the_steps_of_its_share_or_number(settings, steps, rates) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", **settings)
    schedule = make_schedule(config, steps)
    found = [float(schedule(step)) for step in range(len(rates))]
    np.testing.assert_allclose(found, rates, rtol=1e-6)
