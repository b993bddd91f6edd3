"""The whole step against torch in float64: blocks with both mechanisms.

Two gated blocks, adapters on gate, up and down with nonzero B, padding, two micro-batches with
unequal numbers of target tokens, masks and step scales that are not all one, AdamW with weight
decay, twelve optimizer steps.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from nalora_jax.assembly.mechanisms import layer_metrics
from nalora_jax.assembly.objectives import NextToken
from nalora_jax.method import activations
from nalora_jax.method.ffn import Adapters, GatedFFN
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.method.rules import HomogeneityStep, SoftMask
from nalora_jax.method.step import StepConfig, init_state, make_train_step
from nalora_jax.method.transform import make_mechanisms, nalora, replace_gate_state
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head
from tests import tiny

LAYERS, D, F, R, V = 2, 6, 10, 3, 17
SCALES = {"gate_proj": 1.5, "up_proj": 0.5, "down_proj": 2.0}
LR, DECAY, B1, B2, EPS = 0.05, 0.1, 0.9, 0.95, 1e-8
MASK = SoftMask(power=2.0, low=0.2, high=1.8, decay=0.7, warmup=0)
STEP = HomogeneityStep(gains=(0.3, 0.6, 1.0, 0.9), min_occupancy=0.01, decay=0.6, warmup=0)


class Tower(nn.Module):
    """Embedding and residual gated blocks under a scan: the smallest thing that the step trains."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        del positions
        table = self.param("embed", lambda _: {"embedding": jnp.zeros((V, D))})["embedding"]

        def body(block: nn.Module, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            weights = (segment_ids > 0).astype(jnp.float32)
            return x + block(x, SCALES, token_weights=weights, deterministic=deterministic), None

        adapters = Adapters(tuple((name, R) for name in SCALES))
        block = GatedFFN(
            D, F, "silu", adapters, stats=GateStatsConfig(probe_stride=1), name="layers"
        )
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "gate_mask": 0, "gate_taps": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        return scan(block, table[tokens], None)[0]


class Reference:
    """The same in float64 by torch, whose autograd and AdamW know nothing of masks, from the
    design's formulas."""

    def __init__(
        self, params: dict, lora: dict, importance: np.ndarray, occupancy: np.ndarray, count: int
    ) -> None:
        self.table = torch.tensor(np.asarray(params["embed"]["embedding"], np.float64))
        self.w = {
            k: torch.tensor(np.asarray(params["layers"][k]["kernel"], np.float64)) for k in SCALES
        }
        self.lora = {
            name: {
                key: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
                for key, x in leaf.items()
            }
            for name, leaf in lora["layers"].items()
        }
        trained = [x for leaf in self.lora.values() for x in leaf.values()]
        self.optimizer = torch.optim.AdamW(trained, LR, (B1, B2), EPS, DECAY)
        # Averages before bias correction, after `count` updates.
        self.importance, self.occupancy, self.count = importance, occupancy, count

    def masks(self) -> np.ndarray:
        ratio = self.importance / self.importance.mean(axis=-1, keepdims=True)
        return np.clip(ratio**MASK.power, MASK.low, MASK.high)

    def scales(self) -> np.ndarray:
        corrected = self.occupancy / (1 - STEP.decay**self.count)
        return np.einsum("lkc,k->lc", corrected, np.array(STEP.gains))

    @staticmethod
    def equalised(factor: np.ndarray) -> torch.Tensor:
        return torch.tensor(factor / np.sqrt((factor**2).mean(axis=-1, keepdims=True)))

    def project(
        self, name: str, i: int, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        a, b, scale = self.lora[name]["a"][i], self.lora[name]["b"][i], SCALES[name]
        result = x @ self.w[name][i] + scale * (x @ a) @ b
        if mask is not None:  # a zero, through which A's gradient sees B times the mask
            result = result + scale * (x.detach() @ (a - a.detach())) @ (b * (mask - 1)).detach()
        return result

    def step(self, batch: dict[str, np.ndarray]) -> float:
        mask, joint = self.equalised(self.masks()), self.equalised(self.masks() * self.scales())
        tokens, targets = (
            torch.tensor(batch[name]).flatten().long() for name in ("tokens", "targets")
        )
        weights = torch.tensor(batch["loss_weights"], dtype=torch.float64).flatten()
        x, gates = self.table[tokens], []
        for i in range(LAYERS):
            z = self.project("gate_proj", i, x, mask[i])
            z.retain_grad()
            gates.append(z)
            x = x + self.project(
                "down_proj", i, z * torch.sigmoid(z) * self.project("up_proj", i, x)
            )
        losses = torch.nn.functional.cross_entropy(x @ self.table.T, targets, reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        gate, before = self.lora["gate_proj"]["b"], self.lora["gate_proj"]["b"].detach().clone()
        self.optimizer.step()
        with torch.no_grad():
            gate.copy_(before + (gate - before) * joint[:, None, :])
        z, dz = (
            np.stack([x.detach().numpy() for x in each])
            for each in (gates, [z.grad for z in gates])
        )
        real = (batch["segment_ids"].flatten() > 0) / np.sum(batch["segment_ids"] > 0)
        s, part = 1 / (1 + np.exp(-z)), activations.partition("silu")
        slope = np.einsum("t,ltc->lc", real, np.abs(s * (1 + z * (1 - s))))
        edges = np.stack(
            [z < part.z0, (z >= part.z0) & (z < 0), (z >= 0) & (z < part.z1), z >= part.z1]
        )
        occupancy = np.einsum("t,kltc->lkc", real, edges)
        # Of the mean loss per target token.
        self.delta_squared = np.einsum("t,ltc->lc", real, dz**2)
        self.importance = MASK.decay * self.importance + (1 - MASK.decay) * slope
        self.occupancy = STEP.decay * self.occupancy + (1 - STEP.decay) * occupancy
        self.count += 1
        return loss.item()


def _batch(seed: int) -> dict[str, np.ndarray]:
    """Two micro-batches of three rows, with many and few loss tokens."""
    flat = tiny.packed_batch(seed, 6, 12, np.repeat([0.9, 0.3], 3)[:, None])
    flat |= {name: flat[name] % V for name in ("tokens", "targets")}
    return {name: value.reshape(2, 3, 12) for name, value in flat.items()}


def _random_like(rng: np.random.Generator, tree: Any, size: float) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), tree)


def test_twelve_steps_agree_with_torch() -> None:
    rng, batch = np.random.default_rng(0), _batch(0)
    names, model = ("positions", "segment_ids"), Tower()
    rest = {name: jnp.asarray(batch[name][0]) for name in names}
    variables = model.init(
        jax.random.key(0), jnp.asarray(batch["tokens"][0]), **rest, deterministic=True
    )
    params, lora = (
        _random_like(rng, variables["params"], 0.4),
        _random_like(rng, variables["lora"], 0.3),
    )
    assert set(lora["layers"]) == set(SCALES)
    inner = optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    # One with a statistic of the backward pass rides along, with an exponent of 0: it measures, and
    # changes nothing.
    chosen = make_mechanisms((MASK, STEP, "delta:q=0,decay=0"), activation="silu")
    optimizer = nalora(inner, chosen, find_gates(lora))
    objective = NextToken(model, Head(transposed=True), Numerics())
    settings = StepConfig(chosen, {"layers": (LAYERS, F)}, metrics=layer_metrics(chosen))
    step = jax.jit(make_train_step(optimizer, settings, objective))
    state = init_state(lora, optimizer, seed=0)

    # Averages of a run under way, far from uniform.
    importance = rng.uniform(0.05, 1.0, (LAYERS, F)).astype(np.float32)
    occupancy = rng.dirichlet(np.ones(4), (LAYERS, F)).transpose(0, 2, 1).astype(np.float32)
    count = 5
    memory = {"mask": {"slope": importance}, "step_scale": {"occupancy": occupancy}}
    kept = {
        label: {"layers": jax.tree.map(jnp.asarray, averages)} for label, averages in memory.items()
    }
    gate = state.gate._replace(
        memory=state.gate.memory | kept,
        updates={"layers": jnp.full((LAYERS,), count, jnp.int32)},
        count=jnp.asarray(count, jnp.int32),
    )
    state = state._replace(opt_state=replace_gate_state(state.opt_state, gate))
    raw = (importance * (1 - MASK.decay**count), occupancy * (1 - STEP.decay**count))
    reference = Reference(params, lora, *(x.astype(np.float64) for x in raw), count)
    assert reference.masks().std() > 0.3
    assert reference.scales().std() > 0.03

    for i in range(12):
        batch = _batch(10 + i)
        want = reference.step(batch)
        state, metrics = step(params, state, {k: jnp.asarray(v) for k, v in batch.items()})
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
        for name, leaf in reference.lora.items():
            for key, value in leaf.items():
                ours, where = state.lora["layers"][name][key], f"{name}/{key}"
                np.testing.assert_allclose(
                    ours, value.detach(), rtol=2e-4, atol=2e-5, err_msg=where
                )
        memory = state.gate.memory
        corrected = reference.importance / (1 - MASK.decay**reference.count)
        np.testing.assert_allclose(memory["mask"]["layers"]["slope"], corrected, rtol=1e-4)
        squared = memory["delta"]["layers"]["delta_squared"]
        np.testing.assert_allclose(squared, reference.delta_squared, rtol=2e-3, atol=1e-9)
        corrected = reference.occupancy / (1 - STEP.decay**reference.count)
        found = memory["step_scale"]["layers"]["occupancy"]
        np.testing.assert_allclose(found, corrected, rtol=1e-4, atol=1e-5)
