"""The whole step against a hand-written NumPy float64 implementation of blocks with both mechanisms.

Two gated blocks, adapters on gate, up and down with nonzero B, padding, two micro-batches with unequal numbers of
target tokens, masks and step scales that are not all one, AdamW with weight decay, twelve optimizer steps.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nalora_jax.method import activations
from nalora_jax.method.ffn import Adapters, GatedFFN
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.method.rules import HomogeneityStep, SoftMask
from nalora_jax.method.step import StepConfig, init_state, make_train_step
from nalora_jax.method.transform import make_mechanisms, nalora, with_gate_state
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head
from nalora_jax.train.mechanisms import layer_metrics
from nalora_jax.train.objectives import NextToken

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
        block = GatedFFN(D, F, "silu", adapters, stats=GateStatsConfig(probe_stride=1), name="layers")
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "gate_mask": 0, "gate_taps": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        return scan(block, table[tokens], None)[0]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Reference:
    """The same in NumPy float64, written from the design's formulas."""

    def __init__(
        self, params: dict, lora: dict, importance: np.ndarray, occupancy: np.ndarray, count: int
    ) -> None:
        self.table = np.asarray(params["embed"]["embedding"], np.float64)
        self.w = {k: np.asarray(params["layers"][k]["kernel"], np.float64) for k in SCALES}
        self.lora = {
            k: {n: np.asarray(v, np.float64) for n, v in leaf.items()} for k, leaf in lora["layers"].items()
        }
        zeros = {k: {n: np.zeros_like(v) for n, v in leaf.items()} for k, leaf in self.lora.items()}
        self.m, self.v = (
            zeros,
            {k: {n: np.zeros_like(x) for n, x in leaf.items()} for k, leaf in zeros.items()},
        )
        # Averages before bias correction, after `count` updates.
        self.importance, self.occupancy, self.count, self.steps = (
            importance.copy(),
            occupancy.copy(),
            count,
            0,
        )

    def masks(self) -> np.ndarray:
        ratio = self.importance / self.importance.mean(axis=-1, keepdims=True)
        return np.clip(ratio**MASK.power, MASK.low, MASK.high)

    def scales(self) -> np.ndarray:
        corrected = self.occupancy / (1 - STEP.decay**self.count)
        return np.einsum("lkc,k->lc", corrected, np.array(STEP.gains))

    @staticmethod
    def equalised(factor: np.ndarray) -> np.ndarray:
        return factor / np.sqrt((factor**2).mean(axis=-1, keepdims=True))

    def project(self, name: str, layer: int, x: np.ndarray) -> np.ndarray:
        adapter = self.lora[name]
        return x @ self.w[name][layer] + SCALES[name] * (x @ adapter["a"][layer]) @ adapter["b"][layer]

    def micro(self, batch: dict[str, np.ndarray], mask: np.ndarray) -> tuple[float, dict, dict]:
        tokens, weights = batch["tokens"].reshape(-1), batch["loss_weights"].reshape(-1).astype(np.float64)
        real = (batch["segment_ids"].reshape(-1) > 0).astype(np.float64)
        x, kept = self.table[tokens], []
        stats = {
            "tokens": real.sum(),
            "slope": np.zeros((LAYERS, F)),
            "occupancy": np.zeros((LAYERS, 4, F)),
        }
        stats["delta_squared"] = np.zeros((LAYERS, F))
        part = activations.partition("silu")
        for i in range(LAYERS):
            z, u = self.project("gate_proj", i, x), self.project("up_proj", i, x)
            s = _sigmoid(z)
            hidden = z * s * u
            kept.append((x, z, u, hidden))
            x = x + self.project("down_proj", i, hidden)
            slope = s * (1 + z * (1 - s))
            stats["slope"][i] = (real[:, None] * np.abs(slope)).sum(0)
            edges = [z < part.z0, (z >= part.z0) & (z < 0), (z >= 0) & (z < part.z1), z >= part.z1]
            stats["occupancy"][i] = np.stack([(real[:, None] * e).sum(0) for e in edges])
        logits = x @ self.table.T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        targets = batch["targets"].reshape(-1)
        loss = -(weights * np.log(p[np.arange(len(p)), targets])).sum()
        p[np.arange(len(p)), targets] -= 1
        g = (weights[:, None] * p) @ self.table
        grads = {k: {n: np.zeros_like(v) for n, v in leaf.items()} for k, leaf in self.lora.items()}
        for i in reversed(range(LAYERS)):
            x, z, u, hidden = kept[i]
            dh = self.pull(grads, "down_proj", i, hidden, g, None)
            s = _sigmoid(z)
            du, dz = dh * z * s, dh * u * s * (1 + z * (1 - s))
            stats["delta_squared"][i] = (real[:, None] * dz**2).sum(0)
            g = (
                g
                + self.pull(grads, "up_proj", i, x, du, None)
                + self.pull(grads, "gate_proj", i, x, dz, mask[i])
            )
        return loss, grads, stats

    def pull(
        self, grads: dict, name: str, i: int, x: np.ndarray, g: np.ndarray, mask: np.ndarray | None
    ) -> np.ndarray:
        a, b, scale = self.lora[name]["a"][i], self.lora[name]["b"][i], SCALES[name]
        shaped = b if mask is None else b * mask
        grads[name]["a"][i] = scale * x.T @ (g @ shaped.T)
        grads[name]["b"][i] = scale * (x @ a).T @ g
        return g @ self.w[name][i].T + scale * (g @ b.T) @ a.T

    def step(self, batch: dict[str, np.ndarray]) -> float:
        mask, joint = self.equalised(self.masks()), self.equalised(self.masks() * self.scales())
        parts = [self.micro({k: v[i] for k, v in batch.items()}, mask) for i in range(len(batch["tokens"]))]
        n = batch["loss_weights"].sum()
        self.steps += 1
        for name, leaf in self.lora.items():
            for key in leaf:
                grad = sum(part[1][name][key] for part in parts) / n
                m = self.m[name][key] = B1 * self.m[name][key] + (1 - B1) * grad
                v = self.v[name][key] = B2 * self.v[name][key] + (1 - B2) * grad**2
                unit = (m / (1 - B1**self.steps)) / (np.sqrt(v / (1 - B2**self.steps)) + EPS)
                update = -LR * (unit + DECAY * leaf[key])
                if (name, key) == ("gate_proj", "b"):
                    update = update * joint[:, None, :]
                leaf[key] = leaf[key] + update
        tokens = sum(part[2]["tokens"] for part in parts)
        slope = sum(part[2]["slope"] for part in parts) / tokens
        occupancy = sum(part[2]["occupancy"] for part in parts) / tokens
        # Of the mean loss per target token.
        self.delta_squared = sum(part[2]["delta_squared"] for part in parts) / n**2 / tokens
        self.importance = MASK.decay * self.importance + (1 - MASK.decay) * slope
        self.occupancy = STEP.decay * self.occupancy + (1 - STEP.decay) * occupancy
        self.count += 1
        return sum(part[0] for part in parts) / n


def _batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (2, 3, 5)
    segments = np.ones(shape, np.int32)
    segments[0, 2, 1:] = 0
    segments[1, 0, 3:] = 0
    weights = (rng.uniform(size=shape) < np.array([0.9, 0.3])[:, None, None]) * (segments > 0)
    tokens, targets = (rng.integers(0, V, shape).astype(np.int32) for _ in range(2))
    positions = np.broadcast_to(np.arange(5, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments,
        "positions": np.array(positions),
    }


def _random_like(rng: np.random.Generator, tree: Any, size: float) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), tree)


def test_twelve_steps_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    batch = _batch(rng)
    flat = {k: jnp.asarray(v[0]) for k, v in batch.items()}
    model = Tower()
    variables = model.init(
        jax.random.key(0),
        flat["tokens"],
        positions=flat["positions"],
        segment_ids=flat["segment_ids"],
        deterministic=True,
    )
    params, lora = _random_like(rng, variables["params"], 0.4), _random_like(rng, variables["lora"], 0.3)
    assert set(lora["layers"]) == set(SCALES)
    inner = optax.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    # One with a statistic of the backward pass rides along, with an exponent of 0: it measures, and changes nothing.
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
    kept = {label: {"layers": jax.tree.map(jnp.asarray, averages)} for label, averages in memory.items()}
    gate = state.gate._replace(
        memory=state.gate.memory | kept,
        updates={"layers": jnp.full((LAYERS,), count, jnp.int32)},
        count=jnp.asarray(count, jnp.int32),
    )
    state = state._replace(opt_state=with_gate_state(state.opt_state, gate))
    raw = (importance * (1 - MASK.decay**count), occupancy * (1 - STEP.decay**count))
    reference = Reference(params, lora, *(x.astype(np.float64) for x in raw), count)
    assert reference.masks().std() > 0.3
    assert reference.scales().std() > 0.03

    for i in range(12):
        batch = _batch(np.random.default_rng(10 + i))
        want = reference.step(batch)
        state, metrics = step(params, state, {k: jnp.asarray(v) for k, v in batch.items()})
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
        for name, leaf in reference.lora.items():
            for key, value in leaf.items():
                np.testing.assert_allclose(
                    state.lora["layers"][name][key], value, rtol=2e-4, atol=2e-5, err_msg=f"{name}/{key}"
                )
        memory = state.gate.memory
        corrected = reference.importance / (1 - MASK.decay**reference.count)
        np.testing.assert_allclose(memory["mask"]["layers"]["slope"], corrected, rtol=1e-4)
        squared = memory["delta"]["layers"]["delta_squared"]
        np.testing.assert_allclose(squared, reference.delta_squared, rtol=2e-3, atol=1e-9)
        corrected = reference.occupancy / (1 - STEP.decay**reference.count)
        found = memory["step_scale"]["layers"]["occupancy"]
        np.testing.assert_allclose(found, corrected, rtol=1e-4, atol=1e-5)
