"""Writes trl_policy_losses.json: losses, their gradients and advantages by TRL's trainers, in
float64.

    pip install trl==1.16.0 datasets
    python tests/ops/trl_policy_losses.py

Their methods run on drawn log-probabilities and rewards in place of a model's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

PROMPTS, SAMPLES, TOKENS, LIMIT = 3, 4, 5, 8
ROWS = PROMPTS * SAMPLES
# Clips and how far log-probabilities moved, so that some ratios are clipped.
METHODS = {
    "grpo": (0.2, 0.2, 0.2),
    "dr_grpo": (0.2, 0.2, 0.2),
    "dapo": (0.2, 0.28, 0.2),
    "gspo": (3e-4, 4e-4, 8e-4),
    "rloo": (0.2, 0.2, 0.15),
}
# (beta, truncated samples out of the loss, a group with equal rewards, a sample without a reward)
VARIANTS = ((0.0, False, False, False), (0.04, True, True, True), (0.1, False, True, False))


class Accelerator:
    """Of one process."""

    process_index, num_processes, sync_gradients, device = 0, 1, True, "cpu"

    def gather(self, values: Any) -> Any:
        return values

    gather_for_metrics = unwrap_model = gather

    def reduce(self, values: Any, reduction: str) -> Any:
        return values


class Trainer:
    """Attributes that methods of a TRL trainer read; other attributes are None."""

    def __init__(self, methods: type, **attributes: Any) -> None:
        self.__dict__ |= {"methods": methods, **attributes}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.methods, name, None)
        return value.__get__(self) if callable(value) else value


def trainer(name: str, beta: float, rewards: np.ndarray, log_probs: list[torch.Tensor]) -> Trainer:
    """Returns a trainer whose model's calls return ``log_probs``, one after another."""
    calls = iter(log_probs)
    args = {
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "per_device_train_batch_size": ROWS,
    }
    return Trainer(
        RLOOTrainer if name == "rloo" else GRPOTrainer,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=object(),
        accelerator=Accelerator(),
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            gradient_checkpointing=False,
            gradient_checkpointing_kwargs=None,
            **args,
        ),
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        loss_type="grpo" if name == "gspo" else name,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        beta=beta,
        epsilon_low=METHODS[name][0],
        epsilon_high=METHODS[name][1],
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        scale_rewards="none" if name == "dr_grpo" else "group",
        multi_objective_aggregation="sum_then_normalize",
        num_generations=SAMPLES,
        num_iterations=1,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["reward"],
        reward_funcs=[None],
        _calculate_rewards=lambda *_: torch.tensor(rewards).reshape(-1, 1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            (of := next(calls)),
            torch.zeros_like(of),
            None,
        ),
    )


def advantages(
    name: str, beta: float, rewards: np.ndarray, old: np.ndarray, base: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Returns the advantages of samples whose tokens have these log-probabilities."""
    of = trainer(
        name,
        beta if name == "rloo" else 0.0,
        rewards,
        [torch.tensor(old * mask), torch.tensor(base * mask)],
    )
    ids = [[1]] * ROWS, [[1] * TOKENS] * ROWS
    texts = [""] * ROWS
    of.__dict__["_generate"] = lambda _: (
        (*ids, texts) if name == "rloo" else (*ids, None, texts, None, {}, None, None)
    )
    with torch.no_grad():
        scored = of.methods._generate_and_score_completions(of, [{"prompt": "a"}] * ROWS)
    return scored["advantages"].numpy()


def case(
    name: str, seed: int, beta: float, truncated: bool, flat: bool, unscored: bool
) -> dict[str, Any]:
    """Returns inputs and results of one case."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (ROWS, TOKENS)).round(3)
    log_probs = (old + METHODS[name][2] * rng.normal(size=old.shape)).round(5)
    base = (old + 0.3 * rng.normal(size=old.shape)).round(3)
    mask = (np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, ROWS)[:, None]).astype(float)
    if truncated:
        mask[rng.choice(ROWS, 3, replace=False)] = 0
    rewards = rng.integers(0, 3, (PROMPTS, SAMPLES)).astype(float)
    if flat:
        rewards[1] = 1.0
    if unscored:
        rewards[0, 2] = np.nan
    gains = advantages(name, beta, rewards, old, base, mask)
    leaf = torch.tensor(log_probs, requires_grad=True)
    of = trainer(name, beta, rewards, [leaf])
    zeros, ones = torch.zeros(ROWS, TOKENS, dtype=torch.long), torch.ones(ROWS, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": zeros,
        "completion_mask": torch.tensor(mask),
    }
    inputs |= {
        "old_per_token_logps": torch.tensor(old),
        "old_logps": torch.tensor((old * mask).sum(1)),
    }
    inputs |= {
        "ref_per_token_logps": torch.tensor(base),
        "num_items_in_batch": torch.tensor(mask.sum()),
    }
    loss = of.methods._compute_loss(of, None, inputs | {"advantages": torch.tensor(gains)})
    loss.backward()
    arrays = {
        "log_probs": log_probs,
        "old": old,
        "base": base,
        "mask": mask.astype(int),
        "rewards": rewards,
    }
    arrays |= {"advantages": gains.reshape(PROMPTS, SAMPLES), "gradient": leaf.grad.numpy()}
    return {
        "name": name,
        "beta": beta,
        "loss": loss.item(),
        **{key: value.tolist() for key, value in arrays.items()},
    }


if __name__ == "__main__":
    settings = [(name, *variant) for name in METHODS for variant in VARIANTS]
    cases = [case(name, seed, *variant) for seed, (name, *variant) in enumerate(settings)]
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps({"trl": version("trl"), "length": LIMIT, "cases": cases}) + "\n")
