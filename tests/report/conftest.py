"""A made-up run whose numbers look like a real one's."""

from __future__ import annotations

import math
import re
from html import unescape

import numpy as np
import pytest

from nalora_jax.config import RunConfig
from nalora_jax.train.log import MetricsLog

# Prompts, the right answers, and the answers before and after training.
QUESTIONS = (
    (
        "Kai lent Sam the car. How would Sam feel afterwards?",
        "grateful",
        "angry at Kai",
        "grateful",
    ),
    ("Robin <b>missed</b> the bus & walked. What next?", "arrive late", "buy a bus", "arrive late"),
    ("Alex cooked dinner for the family. Why?", "to be kind", "to be alone", "to be alone"),
)


# The least mean of each per-layer number.
LAYERS = {"misalignment": 0.25, "limit": 0.2, "importance": 0.4, "favoured": 0.5, "feature": 0.01}
LAYERS |= {"step_scale_min": 0.7, "step_scale_max": 1.15, "mask_mean": 1.0}


def fake_records(steps=200, layers=30, every=2, seed=0):
    """The log of a run of ``steps`` steps after its first line, in order, as a run writes it."""
    rng = np.random.default_rng(seed)
    yield evaluation(0, 0.401, 5.1, samples=[(q, gold, before) for q, gold, before, _ in QUESTIONS])
    for step in range(every, steps + 1, every):
        yield log_step(step, rng, layers)
        if step % 50 == 0 and step < steps:
            yield evaluation(step, 0.5, 3.5)
    yield evaluation(steps, 0.523, 3.31)
    samples = [(q, gold, after) for q, gold, _, after in QUESTIONS]
    yield evaluation(steps, 0.523, 3.31, samples=samples) | {"final": True}
    yield {
        "done": {
            "step": steps,
            "best_step": steps,
            "seconds": {"preparing": 20.0, "training": 300.0},
        }
    }


def log_step(step, rng, count):
    layers = {name: least * rng.uniform(1, 1.2, count) for name, least in LAYERS.items()}
    layers["occupancy"] = rng.dirichlet([3, 4, 3, 1], count)
    acting = [0, 0.1, 0.2, 0.3, 0.3, 0.1, 0] if step > 9 else [0, 0, 0, 0, 1, 0, 0]
    spread = {
        "edges": [0.125, 0.25, 0.5, 1.0, 2.0, 4.0],
        "counts": rng.multinomial(1000, acting, count),
    }
    return {
        "step": step,
        "histograms": {"mask": spread, "step_scale": spread},
        "adapters": {
            f"layers/ffn/{name}_proj": rng.uniform(0, 1, count) for name in ("gate", "up")
        },
        "peak_memory": 1_234_000_000,
        "loss": 3.3 + 1.8 / step + 0.12 * rng.standard_normal(),
        "learning_rate": 1e-3 / step,
        "grad_norm": 0.6 + 0.2 * rng.random(),
        "tokens": 2000,
        "tokens_per_second": 900.0,
        "misalignment": layers["misalignment"].mean(),
        "misalignment_limit": layers["limit"].mean(),
        "seconds": 2.2,
        "layers": layers,
    }


def evaluation(step, accuracy, loss, samples=()):
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 400)
    found = {
        "accuracy": accuracy,
        "low": accuracy - half,
        "high": accuracy + half,
        "loss": loss,
        "n": 400,
    }
    if samples:
        names = "prompt", "expected", "answer", "correct"
        rows = [(*sample, sample[1] == sample[2]) for sample in samples]
        found["samples"] = [dict(zip(names, row, strict=True)) for row in rows]
    return {"step": step, "eval": found}


def words_of(text):
    """The text that a reader of the page sees."""
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def write_run(folder, records=None, config=None, **more):
    """A run's folder that holds these records (those of `fake_records` by default)."""
    with MetricsLog(folder) as log:
        versions = {"nalora_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"}
        log.start(
            (config or RunConfig(steps=200)).to_dict(), versions=versions, device="2 x cpu", **more
        )
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
