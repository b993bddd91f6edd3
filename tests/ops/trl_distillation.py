"""Writes trl_distillation.json: divergences and their gradients by TRL, in float64.

    pip install trl==1.16.0 datasets
    python -m tests.ops.trl_distillation

``GKDTrainer.generalized_jsd_loss`` computes the divergence of whole distributions, and
``ServerDistillationTrainer``'s bucket of all other tokens is added to the teacher's most likely ones.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket

ROWS, TOKENS, VOCABULARY, LIKELIEST = 2, 5, 7, 3
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
        "likeliest": likeliest(student, teacher, labels, settings),
    }


def likeliest(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, settings: dict[str, float]
) -> dict[str, Any]:
    """Returns the results for the most likely tokens of the teacher."""
    leaf = torch.tensor(student, requires_grad=True)
    of_teacher = (torch.tensor(teacher) / settings["temperature"]).log_softmax(-1)
    top, ids = of_teacher.topk(LIKELIEST, dim=-1)
    of_student = (leaf / settings["temperature"]).log_softmax(-1).gather(-1, ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    p, _ = _add_tail_bucket(of_student, valid)
    q, _ = _add_tail_bucket(top, valid)
    # They are log-probabilities that add up to 1, which a softmax keeps.
    jsd = GKDTrainer.generalized_jsd_loss(p, q, torch.tensor(labels), settings["beta"])
    jsd.backward()
    return {
        "ids": ids.numpy().tolist(),
        "log_probs": top.numpy().tolist(),
        "loss": jsd.item(),
        "gradient": leaf.grad.numpy().tolist(),
    }


if __name__ == "__main__":
    cases = [case(settings, seed) for seed, settings in enumerate(CASES)]
    written = {"trl": version("trl"), "cases": cases}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written) + "\n")
