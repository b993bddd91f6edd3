"""Writes trl_distillation.json: divergences and their gradients by TRL, in float64.

    pip install trl==1.16.0 datasets
    python -m tests.ops.trl_distillation

They are those of ``GKDTrainer.generalized_jsd_loss``.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer

ROWS, TOKENS, VOCABULARY = 2, 5, 7
CASES: list[dict[str, float]] = [
    {"beta": beta, "temperature": temperature}
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0)
    for temperature in (1.0, 0.6, 3.0)
]


def case(settings: dict[str, float], seed: int) -> dict[str, Any]:
    """Returns inputs and results of one case; logits are ``[rows, tokens, vocabulary]``."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, TOKENS, VOCABULARY)
    student = (2 * rng.normal(size=shape)).round(3)
    teacher = (2 * rng.normal(size=shape)).round(3)
    labels = rng.integers(0, VOCABULARY, shape[:2])
    labels[0, 3:] = -100  # ignored
    labels[1, :1] = -100
    leaf = torch.tensor(student, requires_grad=True)
    loss = GKDTrainer.generalized_jsd_loss(
        leaf, torch.tensor(teacher), torch.tensor(labels), **settings
    )
    loss.backward()
    results = {"loss": loss.item(), "gradient": leaf.grad.numpy().tolist()}
    return {
        "settings": settings,
        "student": student.tolist(),
        "teacher": teacher.tolist(),
        "labels": labels.tolist(),
        **results,
    }


if __name__ == "__main__":
    cases = [case(settings, seed) for seed, settings in enumerate(CASES)]
    written = {"trl": version("trl"), "cases": cases}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written) + "\n")
