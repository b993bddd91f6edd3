"""The compiled step on a small decoder: splits, meshes and switches that must not matter, and those
that must."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.assembly.program import Assembly
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    DebugConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.method import activations
from nalora_jax.method.step import Evaluated, StepConfig, init_state, make_train_step
from nalora_jax.method.transform import make_mechanisms, replace_gate_state
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.train.loop import _Meter
from tests import tiny
from tests.param_trees import bytes_per_device

# Each key head has one query head, so that tensor divides both. SGD makes the adapters' movement
# proportional to the gradient, so that comparing them compares gradients (of size 0.01 to 1); Adam
# would divide rounding noise by itself where a gradient is tiny.
BASE = ModelConfig.from_hf(tiny.GROUPED | {"num_hidden_layers": 3, "num_key_value_heads": 4})
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", 4), LoRARule("attn/(q|v)_proj", 2))),
    mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=0.0, schedule="constant"),
    compute=ComputeConfig(dtype="float32", probe_stride=1),
)
ROWS, SEQ = 8, 16
SOUND = Decoder.apply


def _batch(seed: int, accumulate: int = 1) -> dict[str, np.ndarray]:
    """The rows have very different numbers of targets."""
    flat = tiny.packed_batch(seed, ROWS, SEQ, np.linspace(0.05, 1, ROWS)[:, None])
    return {
        name: value.reshape(accumulate, ROWS // accumulate, SEQ) for name, value in flat.items()
    }


def _train(assembly: Assembly, params: Any, accumulate: int = 1) -> tuple[Any, list[Any]]:
    """Takes three steps."""
    state, history = assembly.state, []
    for i in range(3):
        batch = distributed.make_global_batch(_batch(i, accumulate), assembly.mesh, rows_axis=1)
        state, metrics = assembly.step(params, state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def _assert_close(one: Any, other: Any, *, atol: float) -> None:
    first, second = trees.flatten(one), trees.flatten(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_allclose(value, second[path], rtol=1e-4, atol=atol, err_msg=path)


def test_a_mesh_and_micro_batches_are_one_device_and_one_batch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also weights and state are split: over fsdp and tensor, and the adapters over the axis of
    their wide side."""
    config = replace(CONFIG, mechanisms=(*CONFIG.mechanisms, "delta"))  # statistics of both passes
    alone, expected = _train(*tiny.assembled(config, BASE))
    mesh = MeshConfig(2, 2, 2)
    assembly, params = tiny.assembled(config, BASE, mesh)
    state, history = _train(assembly, params, accumulate=2)
    # What XLA's partitioner says where it makes an array whole on every device to lay it out anew.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    _assert_close(alone.lora, jax.device_get(state.lora), atol=2e-6)
    _assert_close(alone.gate, jax.device_get(state.gate), atol=1e-6)
    for one, other in zip(expected, history, strict=True):
        _assert_close(one, other, atol=1e-5)
    # Norms are replicated.
    sizes = mesh.fsdp * mesh.tensor, min(mesh.fsdp, mesh.tensor)
    for tree, parts in zip(
        (params, {"lora": state.lora, "opt": state.opt_state}), sizes, strict=True
    ):
        per_device = bytes_per_device(tree)
        assert len(per_device) == 8
        assert max(per_device.values()) < (1 / parts + 0.05) * trees.size_bytes(tree)


def test_every_step_and_every_micro_batch_has_its_own_key_for_dropout() -> None:
    class Draw:
        """Measures a number drawn by its key."""

        def loss(self, variables: Any, params: Any, batch: Any, key: jax.Array) -> Evaluated:
            return Evaluated(0.0 * jnp.sum(variables["lora"]), {"drawn": jax.random.uniform(key)})

        def counts(self, batch: Any) -> tuple[jax.Array, jax.Array]:
            return jnp.float32(1), jnp.float32(1)

    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    step = make_train_step(
        optimizer, StepConfig(make_mechanisms((), activation="silu"), {}), Draw()
    )
    state = first = init_state(jnp.ones(2), optimizer, seed=0)
    means = []
    for micro_batches in (1, 2, 3):
        _, metrics = step({}, first, {"tokens": jnp.zeros((micro_batches, 1))})
        means.append(float(metrics["measured"]["drawn"]))
    for _ in range(3):
        state, metrics = step({}, state, {"tokens": jnp.zeros((1, 1))})
        means.append(float(metrics["measured"]["drawn"]))
    assert means[3] == means[0]  # the first step again
    assert len(set(means)) == 5


def _wrong_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = activations.get_activation("silu")
    wrong = replace(silu, gate=lambda z: (silu.gate(z)[0], 1.05 * silu.gate(z)[1]))
    monkeypatch.setitem(activations.ACTIVATIONS._values, "silu", wrong)


def _unmasked_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: Any, variables: Any, tokens: Any, **options: Any) -> Any:
        options["token_weights"] = jnp.ones(options["segment_ids"].shape, bool)
        return SOUND(self, variables, tokens, **options)

    monkeypatch.setattr(Decoder, "apply", apply)


def _mask_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: Any, variables: Any, tokens: Any, **options: Any) -> Any:
        masks = jax.tree.map(lambda mask: jnp.roll(mask, 1, axis=0), variables.get("gate_mask", {}))
        return SOUND(self, variables | {"gate_mask": masks}, tokens, **options)

    monkeypatch.setattr(Decoder, "apply", apply)


@pytest.mark.parametrize(
    ("plant", "compute", "meaning"),
    [
        (None, {"stats_stride": 2, "probe_stride": 2}, ""),
        (_wrong_derivative, {}, ""),
        (_unmasked_padding, {}, ": .*sums over the sampled tokens"),
        (_mask_of_another_layer, {"dtype": "bfloat16"}, ": .*gated by this block's mask"),
    ],
)
def test_the_debug_check_passes_what_is_right_and_names_what_is_wrong(
    plant: Callable[[pytest.MonkeyPatch], None] | None,
    compute: dict[str, Any],
    meaning: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The masks of the last two steps differ between layers."""
    config = replace(CONFIG, mechanisms=("squared:warmup=1",), debug=DebugConfig(check_gates=True))
    config = replace(config, compute=replace(CONFIG.compute, **compute))
    fails = pytest.raises(NaloraError, match=f"check-gates.*in layers/ffn{meaning}")
    if plant is not None:
        plant(monkeypatch)
    with contextlib.nullcontext() if plant is None else fails:
        _train(*tiny.assembled(config, BASE))


def test_what_was_not_measured_is_not_a_number_and_stops_the_run() -> None:
    assembly, params = tiny.assembled(CONFIG, BASE)
    batch = _batch(0)
    batch |= {name: np.zeros_like(batch[name]) for name in ("segment_ids", "loss_weights")}
    gate = assembly.state.gate._replace(count=jnp.int32(10))
    late = assembly.state._replace(opt_state=replace_gate_state(assembly.state.opt_state, gate))
    _, metrics = assembly.step(params, late, batch)
    for name in ("importance", "occupancy", "feature", "misalignment", "limit"):
        assert np.isnan(metrics["layers"]["layers/ffn"][name]).all(), name
    assert {label: bool(x) for label, x in metrics["idle"].items()} == {
        "mask": True,
        "step_scale": True,
    }
    meter = _Meter({})
    meter.add(11, metrics)
    with pytest.raises(NaloraError, match="step 11: mask, step_scale: .*no token measured"):
        meter.record(1e-3)
