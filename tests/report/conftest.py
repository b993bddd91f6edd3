"""A made-up run whose numbers look like a real one's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nalora_jax.config import RunConfig
from nalora_jax.train.log import MetricsLog

# Prompts, the right answers, and the answers before and after training.
QUESTIONS = (
    ("Kai lent Sam the car. How would Sam feel afterwards?", "grateful", "angry at Kai", "grateful"),
    ("Robin <b>missed</b> the bus & walked. What next?", "arrive late", "buy a bus", "arrive late"),
    ("Alex cooked dinner for the family. Why?", "to be kind", "to be alone", "to be alone"),
)


def fake_records(steps=200, layers=30, every=2, seed=0):
    """The log of a run of ``steps`` steps after its first line, in order, as a run writes it."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(0, 1, layers)
    slope = 0.36 + 0.2 * np.sin(2.5 * depth) + 0.02 * rng.standard_normal(layers)
    shares = np.array([[0.30, 0.38, 0.30, 0.02]]) + depth[:, None] * [[-0.2, 0.02, 0.08, 0.10]]
    limit = 0.22 + 0.09 * np.cos(4 * depth)
    yield evaluation(0, 0.401, 5.1, samples=[(q, gold, before) for q, gold, before, _ in QUESTIONS])
    for step in range(every, steps + 1, every):
        yield log_step(step, steps, rng, slope, shares, limit)
        if step % 50 == 0 and step < steps:
            yield evaluation(step, 0.46 + 0.05 * step / steps, 3.5)
    yield evaluation(steps, 0.523, 3.31)
    samples = [(q, gold, after) for q, gold, _, after in QUESTIONS]
    yield evaluation(steps, 0.523, 3.31, samples=samples) | {"final": True}
    yield {"done": {"step": steps, "best_step": steps, "seconds": {"preparing": 20.0, "training": 300.0}}}


def log_step(step, steps, rng, slope, shares, limit):
    progress, count = step / steps, len(slope)
    excess = 0.05 * (1 - math.exp(-5 * progress)) * (1 + 0.3 * rng.standard_normal(count))
    importance = slope * (1 + 0.08 * progress) + 0.004 * rng.standard_normal(count)
    occupancy = shares * (1 + 0.2 * progress * np.array([-1, 0, 0.5, 1.0]))
    layers = {
        "misalignment": limit + np.abs(excess),
        "limit": limit,
        "importance": importance,
        "favoured": 0.55 + 0.1 * np.tanh(importance - 0.4),
        "occupancy": occupancy / occupancy.sum(-1, keepdims=True),
        "step_scale_min": np.full(count, 0.72),
        "step_scale_max": 1.15 + 0.1 * slope,
        "mask_mean": np.full(count, 1.0 if step < 10 else 1.12) + 0.1 * slope,
        "feature": 0.012 * progress * (1 + slope),
    }
    acting = [0, 0.1, 0.2, 0.3, 0.3, 0.1, 0] if step > 9 else [0, 0, 0, 0, 1, 0, 0]
    spread = {"edges": [0.125, 0.25, 0.5, 1.0, 2.0, 4.0], "counts": rng.multinomial(1000, acting, count)}
    return {
        "step": step,
        "histograms": {"mask": spread, "step_scale": spread},
        "adapters": {f"layers/ffn/{name}_proj": 0.5 * progress + 0.1 * slope for name in ("gate", "up")},
        "peak_memory": 1_234_000_000,
        "loss": 3.3 + 1.8 * math.exp(-6 * progress) + 0.12 * rng.standard_normal(),
        "learning_rate": 1e-3 * min(1, step / (0.05 * steps)) * math.cos(math.pi * progress / 2),
        "grad_norm": 0.6 + 0.2 * rng.random(),
        "tokens": 2000,
        "tokens_per_second": 900 + 40 * rng.standard_normal(),
        "misalignment": layers["misalignment"].mean(),
        "misalignment_limit": limit.mean(),
        "seconds": 2.2,
        "layers": layers,
    }


def evaluation(step, accuracy, loss, n=400, samples=()):
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    found = {"accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "loss": loss, "n": n}
    if samples:
        names = "prompt", "expected", "answer", "correct"
        rows = [(*sample, sample[1] == sample[2]) for sample in samples]
        found["samples"] = [dict(zip(names, row, strict=True)) for row in rows]
    return {"step": step, "eval": found}


def write_run(folder, records=None, config=None, **more):
    """A run's folder that holds these records (those of `fake_records` by default)."""
    with MetricsLog(folder) as log:
        versions = {"nalora_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"}
        log.start((config or RunConfig(steps=200)).to_dict(), versions=versions, device="2 x cpu", **more)
        for record in fake_records() if records is None else records:
            log.write(record)
    return folder


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("fake") / "run")


@pytest.fixture
def make_run(tmp_path):
    """Writes given records to a run's folder and returns the folder."""
    return lambda records, config=None, **more: write_run(tmp_path / "run", records, config, **more)
