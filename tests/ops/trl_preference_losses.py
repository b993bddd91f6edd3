"""Writes trl_preference_losses.json: losses of preferences, gradients and rewards by TRL's
trainers, in float64.

    pip install trl==1.16.0 datasets
    python -m tests.ops.trl_preference_losses

Their methods run on drawn logits in place of a model's. A prompt has one token, because ORPO's NLL
in TRL includes the prompt, and here as in the paper it does not. TRL's NLL is the mean over the
tokens of a batch, here as in the papers over the tokens of an answer: each batch has one pair. A
batch of KTO has all records.
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
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from tests.ops.trl_policy_losses import Accelerator, Trainer

PAIRS, TOKENS, VOCABULARY = 3, 5, 4
# Settings of `PreferenceConfig`.
CASES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.5},
    {"loss": "dpo", "beta": 2.0, "per_token": True},
    {"loss": "dpo", "beta": 0.5, "nll_weight": 0.3},
    {"loss": "robust", "beta": 0.5, "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "ipo", "beta": 0.2, "nll_weight": 1.5},
    {"loss": "simpo", "beta": 2.0, "gamma": 0.7},
    {"loss": "simpo", "beta": 1.5, "gamma": 0.2, "label_smoothing": 0.1, "nll_weight": 0.4},
    {"loss": "orpo", "beta": 0.6},
    {"loss": "kto", "beta": 0.5},
    {"loss": "kto", "beta": 1.5, "desirable_weight": 0.7, "undesirable_weight": 1.3},
    {"loss": "dpo", "beta": 0.5, "nll_weight": 0.3, "weighted": True},
    {"loss": "ipo", "beta": 0.2, "weighted": True},
]
# Labels of the records of KTO.
DESIRABLE = [1.0, 0.0, 1.0]
# Of DPOTrainer, by our name.
DPO_LOSSES = {"dpo": "sigmoid", "robust": "robust", "ipo": "ipo"}


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities of the tokens after the first; 0 for padding."""
    table = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = table.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    return picked * (targets >= 0)


def log_squares(logits: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of the sum of squared probabilities, for the tokens after the first."""
    return torch.logsumexp(2 * logits[:, :-1].log_softmax(-1), -1)


def dpo(
    logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, settings: dict[str, Any]
) -> tuple[torch.Tensor, list[float]]:
    """Returns loss and rewards of a pair by TRL's DPOTrainer; rows are chosen and rejected."""
    name = DPO_LOSSES[settings["loss"]]
    names = ["sigmoid_norm" if settings.get("per_token") else name]
    weights = [1.0]
    if "nll_weight" in settings:
        names.append("sft")
        weights.append(settings["nll_weight"])
    outputs = SimpleNamespace(
        log_probs=log_probs(logits, labels),
        log_sum_sq_probs=log_squares(logits),
        entropy=torch.zeros_like(labels[:, 1:]),
        mean_logits=torch.zeros_like(labels[:, 1:]),
        is_top1=torch.zeros_like(labels[:, 1:]).bool(),
    )
    trainer = Trainer(
        DPOTrainer,
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        loss_types=names,
        loss_weights=weights,
        use_weighting=settings.get("weighted", False),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    reference = log_probs(base, labels).sum(1)
    completion = torch.ones_like(labels)
    completion[:, 0] = 0
    inputs = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": (labels >= 0).long(),
        "completion_mask": completion * (labels >= 0),
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    metrics = trainer._metrics["eval"]
    return loss, [metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]]


def without_reference(
    logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, settings: dict[str, Any]
) -> tuple[torch.Tensor, list[float]]:
    """Returns loss and rewards of a pair by TRL's CPOTrainer or ORPOTrainer."""
    methods = ORPOTrainer if settings["loss"] == "orpo" else CPOTrainer
    answers = labels.clone()
    answers[:, 0] = -100
    inputs = {
        "concatenated_input_ids": labels.clamp(min=0),
        "concatenated_attention_mask": (labels >= 0).long(),
        "concatenated_labels": answers,
    }
    trainer = Trainer(
        methods,
        accelerator=Accelerator(),
        concatenated_inputs=lambda *_, **__: inputs,
        get_batch_logps=methods.get_batch_logps,  # a static method
        is_encoder_decoder=False,
        alpha=0.0,
        beta=settings["beta"],
        loss_type="simpo",
        simpo_gamma=settings.get("gamma"),
        cpo_alpha=settings.get("nll_weight", 0.0),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    loss, metrics = methods.get_batch_loss_metrics(
        trainer,
        lambda *_, **__: SimpleNamespace(logits=logits),
        {"chosen_labels": answers[:1]},
    )
    return loss, [metrics["rewards/chosen"], metrics["rewards/rejected"]]


def kto(
    logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, settings: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns loss and metrics of a batch by TRL's KTOTrainer.

    Arrays are ``[records, 2, ...]``: a record's completion, then the one of another record.
    """
    answered = (labels >= 0).long()
    completion = answered.clone()
    completion[:, :, 0] = 0
    reference = log_probs(base.flatten(0, 1), labels.flatten(0, 1)).sum(1).reshape(-1, 2)
    trainer = Trainer(
        KTOTrainer,
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=settings["beta"],
        desirable_weight=settings.get("desirable_weight", 1.0),
        undesirable_weight=settings.get("undesirable_weight", 1.0),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": labels[:, 0].clamp(min=0),
        "attention_mask": answered[:, 0],
        "completion_mask": completion[:, 0],
        "KL_input_ids": labels[:, 1].clamp(min=0),
        "KL_attention_mask": answered[:, 1],
        "KL_completion_mask": completion[:, 1],
        "label": torch.tensor(DESIRABLE),
        "ref_logps": reference[:, 0],
        "ref_KL_logps": reference[:, 1],
    }
    # The trainer runs the model on the completions of other records first.
    places = iter((1, 0))

    def model(**_: Any) -> SimpleNamespace:
        place = next(places)
        zeros = torch.zeros_like(labels[:, 0, 1:])
        scores = log_probs(logits[:, place], labels[:, place])
        return SimpleNamespace(log_probs=scores, entropy=zeros, mean_logits=zeros)

    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
    return loss, {name: trainer._metrics["eval"][name][0] for name in names}


def unpaired_case(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns inputs and results of one case of KTO; arrays as in `case`."""
    logits, base, labels = drawn(seed)
    leaf = torch.tensor(logits, requires_grad=True)
    loss, metrics = kto(leaf, torch.tensor(base), torch.tensor(labels), settings)
    loss.backward()
    return {
        "settings": settings,
        "logits": logits.tolist(),
        "base": base.tolist(),
        "labels": labels.tolist(),
        "desirable": DESIRABLE,
        "loss": loss.item(),
        "gradient": leaf.grad.numpy().tolist(),
        "metrics": metrics,
    }


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns drawn logits of policy and base, and labels, -100 after the end."""
    rng = np.random.default_rng(seed)
    shape = (PAIRS, 2, 1 + TOKENS, VOCABULARY)
    logits = rng.normal(size=shape).round(3)
    base = rng.normal(size=shape).round(3)
    labels = rng.integers(0, VOCABULARY, shape[:3])
    lengths = rng.integers(1, TOKENS + 1, shape[:2])
    labels[np.arange(1 + TOKENS) > lengths[:, :, None]] = -100  # ignored
    return logits, base, labels


def case(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns inputs and results of one case; arrays are ``[pairs, 2, 1 + tokens, ...]``."""
    if settings["loss"] == "kto":
        # With seed 12 the divergence is positive.
        return unpaired_case(settings, seed + 2)
    logits, base, labels = drawn(seed)
    run = dpo if settings["loss"] in DPO_LOSSES else without_reference
    leaf = torch.tensor(logits, requires_grad=True)
    losses = []
    rewards = []
    for pair in range(PAIRS):
        loss, values = run(
            leaf[pair], torch.tensor(base[pair]), torch.tensor(labels[pair]), settings
        )
        losses.append(loss)
        rewards.append(values)
    mean = torch.stack(losses).mean()
    mean.backward()
    return {
        "settings": settings,
        "logits": logits.tolist(),
        "base": base.tolist(),
        "labels": labels.tolist(),
        "loss": mean.item(),
        "gradient": leaf.grad.numpy().tolist(),
        "rewards": rewards,
    }


if __name__ == "__main__":
    # ORPOTrainer casts to float32.
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    cases = [case(settings, seed) for seed, settings in enumerate(CASES)]
    written = {"trl": version("trl"), "cases": cases}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written) + "\n")
