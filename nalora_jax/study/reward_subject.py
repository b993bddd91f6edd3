"""Rewards in a study: runs with ``rl.rewards`` (`nalora_jax.kinds.rl.kind`) and held-out prompts.

Probes of forgetting are completions, as of any language model.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from nalora_jax.assembly.program import Assembly
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.prompts import held_out_prompts
from nalora_jax.data.sources import open_pair
from nalora_jax.kinds.inputs import stream_shape
from nalora_jax.kinds.rl import kind
from nalora_jax.kinds.rl.environments import Arena
from nalora_jax.kinds.rl.reward_evaluation import RewardEvaluator, weighted_sum
from nalora_jax.kinds.rl.rollout import Sampler, sample_batch
from nalora_jax.mesh import distributed, processes
from nalora_jax.method.step import Step
from nalora_jax.study.language import Items, Language, LanguageItems

_DRAWN = 8  # samples of a prompt for pass@1 and pass@8
_ROWS = 64  # samples whose log-probabilities are computed at once
_SEED = 20261201  # of these samples: the same in every run


class Rewards(Language):
    """Language models that train with rewards; their data are prompts."""

    trains_together: ClassVar[bool] = False
    accuracy_items: ClassVar[str] = "none for rewards: answers are generated"

    @classmethod
    def unit(cls, config: RunConfig) -> str:
        """Returns the unit of the loss, for tables."""
        answers = "1 minus the mean reward of greedy answers"
        return f"{answers}, of probes nats per answer token"

    @classmethod
    def metric(cls, config: RunConfig) -> str:
        """Returns the metric that is measured during training."""
        return "reward"

    def data(self, config: RunConfig) -> Any:
        """Returns the prompts."""
        records, _ = open_pair(config.data)
        model = self.model(config)
        shape = stream_shape(config) | {"context": model.config.max_positions}
        written = kind.prompt_text(config.rl, config.data, model.tokenizer, records[0])
        return kind.PromptRows.of(
            records,
            config.data,
            model.tokenizer,
            rl=config.rl,
            written=written,
            **shape,
        )

    def source_digest(self, data: Any) -> str:
        """Returns the digest of the prompts."""
        fingerprint: str = data.fingerprint
        return fingerprint.split(":", 1)[0]  # without the seed

    def step(self, config: RunConfig, assembly: Assembly, data: Any) -> Step:
        """Returns the step with rollouts.

        It stores no group of samples, since a run resumes from its evaluations.
        """
        return kind.RolloutStep(config, self.model(config), assembly, data, None)

    def items(self, config: RunConfig, data: DataConfig) -> Items:
        """Returns prompts; their digest is of the token ids and the reference completions."""
        _, records = open_pair(data)
        model = self.model(config)
        context = model.config.max_positions
        limit = min(data.max_length or context, context) - config.rl.max_new_tokens
        written = kind.prompt_text(config.rl, data, model.tokenizer, records[0])
        parts = held_out_prompts(
            records, replace(data, select_limit=0), model.tokenizer, limit, written
        )
        prompts = tuple(itertools.chain(*parts))
        return Items(kind.prompts_digest(prompts)[:16], len(prompts), config, prompts)

    def measure(
        self,
        items: Any,
        assembly: Assembly,
        params: Any,
        lora: Any = None,
        *,
        whole: bool = False,
    ) -> dict[str, float]:
        """Returns ``reward``, the mean of greedy answers, and ``loss``, 1 minus it.

        With ``whole``, also of 8 samples of each prompt: the mean reward ``pass_1``, the mean of
        the prompts' best rewards ``pass_8``, and the ``divergence`` from the base, a mean over
        tokens. Completions of a probe have the measures of `Language`.
        """
        if isinstance(items, LanguageItems):
            return super().measure(items, assembly, params, lora, whole=whole)
        config = items.config
        loaded = self.model(items.config)
        evaluator = RewardEvaluator(config.rl, loaded, assembly, items.asked)
        reward = float(evaluator.summary(evaluator.records(params, lora))["reward"])
        values = {"loss": 1.0 - reward, "reward": reward}
        if whole:
            values |= self._sampled(items, assembly, params, lora)
        return values

    def _sampled(
        self, items: Items, assembly: Assembly, params: Any, lora: Any
    ) -> dict[str, float]:
        """Draws 8 samples of each prompt, and returns ``pass_1``, ``pass_8`` and ``divergence``.

        The divergence is the mean over tokens of ``exp(r) - r - 1``, with r the log-ratio of the
        base to the policy: an estimate of KL(policy, base) that is never negative (Schulman, 2020,
        "Approximating KL divergence").
        """
        config = items.config
        loaded = self.model(items.config)
        prompts = items.asked
        longest = max(len(prompt.ids) for prompt in prompts)
        drawn = replace(config.rl, samples=_DRAWN)
        mesh = assembly.mesh
        count = len(prompts)
        parts = assembly.eval_model, assembly.params, loaded.tokenizer
        arena = Arena.of(drawn, loaded.tokenizer) if drawn.environment else None
        sampler = Sampler(drawn, *parts, mesh, count, _SEED, longest, arena=arena)
        samples = sampler(lora, 0, prompts)
        # [prompts * samples] -> [prompts, samples]
        rewards = weighted_sum(config.rl, samples.rewards).reshape(-1, _DRAWN)
        # prompt and completion, rounded up to a multiple of 8
        length = -(-(longest + config.rl.max_new_tokens) // 8) * 8
        ids: list[Any] = []  # of each sample's prompt
        for prompt in prompts:
            ids += [prompt.ids] * _DRAWN
        batch = sample_batch(ids, samples, length)
        scores = kind.scores_of(config, assembly)
        # A start may have changed the base's weights in params.
        of_policy = assembly.view(params)
        of_base = assembly.view(self.base(config)[1])
        divergence = 0.0
        for start in range(0, len(ids), _ROWS):
            rows = {
                name: _pad_rows(value[start : start + _ROWS])
                for name, value in batch.items()
            }
            placed = distributed.make_global_batch(rows, assembly.mesh, rows_axis=0)
            policy = scores(of_policy, lora, placed, of_base=False)
            reference = scores(of_base, lora, placed, of_base=True)
            ratio = np.asarray(processes.fetch(reference - policy))  # [rows, tokens]
            by_token = np.expm1(ratio, dtype=np.float64) - ratio
            divergence += (by_token * rows["loss_weights"]).sum()
        tokens = batch["loss_weights"].sum()
        return {
            "pass_1": float(np.nanmean(rewards)),
            "pass_8": float(np.nanmean(np.nanmax(rewards, axis=1))),
            "divergence": float(divergence / tokens),
        }


def _pad_rows(rows: np.ndarray) -> np.ndarray:
    """Returns ``_ROWS`` rows, the last ones zeros."""
    padded = np.zeros((_ROWS, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded
