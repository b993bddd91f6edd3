"""Writes trl_corrections.json: importance weights, losses and gradients by TRL's GRPO trainer for
samples of another engine, in float64.

    pip install trl==1.16.0 datasets
    python tests/ops/trl_corrections.py

See trl_policy_losses.py: the trainer's methods run on drawn log-probabilities.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl_policy_losses import LIMIT, METHODS, ROWS, TOKENS, trainer

# TRL's mode, its bounds, and the settings of the same correction here.
MODES = {
    "clip": ("token_truncate", None, 2.0, {"clip": 2.0}),
    "clip_low": ("token_truncate", None, 1.1, {"clip": 1.1}),
    "mask": ("token_mask", 0.7, 1.5, {"clip": 1e9, "tokens": [0.7, 1.5]}),
    "whole": ("sequence_truncate", None, 1.2, {"clip": 1.2}),
}
NAMES = ("grpo", "dr_grpo", "dapo", "gspo")


def case(name: str, mode: str, seed: int, beta: float) -> dict[str, Any]:
    """Returns inputs and results of one case."""
    rng = np.random.default_rng(seed)
    sampled = -rng.exponential(1.0, (ROWS, TOKENS)).round(3)
    old = (sampled + 0.5 * rng.normal(size=sampled.shape)).round(4)
    log_probs = (old + METHODS[name][2] * rng.normal(size=old.shape)).round(5)
    base = (old + 0.3 * rng.normal(size=old.shape)).round(3)
    mask = (np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, ROWS)[:, None]).astype(float)
    mask[0] = 1  # TRL pads to the longest sample
    rewards = rng.integers(0, 3, (ROWS // 4, 4)).astype(float)
    ratio, gains = weights(name, mode, rewards, old, sampled, mask)
    leaf = torch.tensor(log_probs, requires_grad=True)
    of = trainer(name, beta, rewards, [leaf])
    of.__dict__ |= settings(mode)
    zeros, ones = torch.zeros(ROWS, TOKENS, dtype=torch.long), torch.ones(ROWS, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": zeros,
        "completion_mask": torch.tensor(mask),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(base),
        "num_items_in_batch": torch.tensor(mask.sum()),
        "importance_sampling_ratio": ratio,
        "advantages": gains,
    }
    loss = of.methods._compute_loss(of, None, inputs)
    loss.backward()
    arrays = {"log_probs": log_probs, "old": old, "sampled": sampled, "base": base}
    arrays |= {"mask": mask.astype(int), "advantages": gains.numpy()}
    arrays |= {"weights": ratio.numpy(), "gradient": leaf.grad.numpy()}
    return {
        "name": name,
        "mode": mode,
        "correction": MODES[mode][3],
        "beta": beta,
        "loss": loss.item(),
        **{key: value.tolist() for key, value in arrays.items()},
    }


def settings(mode: str) -> dict[str, Any]:
    """Returns TRL's settings of a correction."""
    of_trl, low, high, _ = MODES[mode]
    return {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": of_trl,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


def weights(
    name: str,
    mode: str,
    rewards: np.ndarray,
    old: np.ndarray,
    sampled: np.ndarray,
    mask: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns TRL's importance weights and its advantages."""
    of = trainer(name, 0.0, rewards, [torch.tensor(old * mask)])
    of.__dict__ |= settings(mode)
    counts = mask.sum(1).astype(int)
    rows = [row[:count].tolist() for row, count in zip(sampled, counts, strict=True)]
    ids = [[1]] * ROWS, [[1] * int(count) for count in counts]
    of.__dict__["_generate"] = lambda _: (*ids, None, [""] * ROWS, rows, {}, None, None)
    # Otherwise the engine's log-probabilities are float32.
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        scored = of.methods._generate_and_score_completions(of, [{"prompt": "a"}] * ROWS)
    torch.set_default_dtype(torch.float32)
    ratio = scored["importance_sampling_ratio"]
    return ratio, scored["advantages"].double()


if __name__ == "__main__":
    cases = []
    for name in NAMES:
        for mode in ("clip", "clip_low", "mask"):
            cases.append(case(name, mode, len(cases), 0.04 * (len(cases) % 2)))
    cases.append(case("grpo", "whole", len(cases), 0.0))
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps({"trl": version("trl"), "length": LIMIT, "cases": cases}) + "\n")
