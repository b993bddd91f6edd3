"""Evaluation of runs with rewards on held-out prompts: greedy rewards, and pass@k of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from nalora_jax.assembly.program import Assembly
from nalora_jax.config import RLConfig
from nalora_jax.data.chat_text import Message
from nalora_jax.data.prompts import PromptRecord
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import (
    SAMPLES,
    Evaluator,
    ItemRecord,
    sample_records,
    variables_of,
)
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.generate.programs import view_weights
from nalora_jax.evaluate.intervals import bootstrap
from nalora_jax.kinds.rl.engine import Request
from nalora_jax.kinds.rl.environments import Arena
from nalora_jax.kinds.rl.episodes import TurnEngine, episode_rewards, play
from nalora_jax.kinds.rl.rewards import MODEL_REWARD, Scorer
from nalora_jax.kinds.rl.turn_generator import GreedyTurns, TurnGenerator, stop_ids
from nalora_jax.mesh import distributed
from nalora_jax.weights.model_files import LoadedModel

_PASS_SEED = 20260102  # of the samples of pass@k, the same in all runs


def metric_names(rl: RLConfig) -> list[str]:
    """Returns the name of each reward's mean in log and records, such as ``reward_length``.

    The standard deviation of a reward has the name with ``_std``. No name of either is used twice:
    the second reward of a name gets ``_2``.
    """
    names: list[str] = []
    used = {"reward", "reward_std"}
    for reward in rl.reward_names:
        short, _, rest = reward.partition(":")
        # MODULE:FUNCTION is named after the function, NAME:setting=value after the built-in reward,
        # and model:FOLDER "model".
        if rest and "=" not in rest and short != MODEL_REWARD:
            short = rest
        name = f"reward_{short}"
        number = 2
        while name in used or f"{name}_std" in used:
            name = f"reward_{short}_{number}"
            number += 1
        names.append(name)
        used |= {name, f"{name}_std"}
    return names


def weighted_sum(rl: RLConfig, rewards: np.ndarray) -> np.ndarray:
    """Returns the weighted sum over the last axis of rewards ``[..., rewards]``, ``[...]``.

    Unknown rewards (NaN) count as 0; the sum is NaN if all rewards of a sample are unknown.
    """
    weights = np.array(rl.reward_weights or [1.0] * len(rl.reward_names))
    known = ~np.isnan(rewards)
    total = np.where(known, rewards * weights, 0.0).sum(-1)
    return np.where(known.any(-1), total, np.nan)


def pass_at(passed: np.ndarray, samples: int, k: int) -> float:
    """Returns the mean over prompts of the probability that one of ``k`` samples passes.

    It is 1 - C(n - c, k) / C(n, k) with c of n samples that pass, the estimate without bias of
    arXiv 2107.03374.

    Args:
      passed: number of samples that pass, int ``[prompts]``.
      samples: number of samples of each prompt, at least ``k``.
      k: number of attempts.
    """
    ways = math.comb(samples, k)
    estimates = [1 - math.comb(samples - int(c), k) / ways for c in passed]
    return float(np.mean(estimates))


class _Completed(NamedTuple):
    """Completions of prompts with their rewards."""

    texts: list[str]  # of several turns: all of them
    rewards: np.ndarray  # float64 [completions, rewards]


def _transcript(messages: Sequence[Message]) -> str:
    """Returns messages as a text, with the role before each."""
    lines = []
    for message in messages:
        text = str(message["content"])
        for call in message.get("tool_calls", ()):
            text += f" {call['function']}"
        lines.append(f"{message['role']}: {text.strip()}")
    return "\n".join(lines)


class RewardEvaluator(Evaluator):
    """Evaluator of different adapters by the rewards of greedy completions of the same prompts.

    Args:
      rl: the rewards.
      loaded: the base model.
      assembly: with the model and its adapters.
      prompts: held out.
    """

    metric: Literal["reward"] = "reward"
    mode: Literal["max"] = "max"

    def __init__(
        self,
        rl: RLConfig,
        loaded: LoadedModel,
        assembly: Assembly,
        prompts: Sequence[PromptRecord],
    ) -> None:
        self._rl = rl
        self._scorer = Scorer(rl)
        self._prompts = prompts
        self._model = assembly.eval_model
        self._tokenizer = loaded.tokenizer
        self._mesh = distributed.multi_device_mesh(assembly.mesh)

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns prompt, answer, the weighted sum ``reward`` (NaN if unknown) and each reward of
        every prompt; with ``rl.pass_at`` also ``passed``, the number of samples that pass."""
        generator = Generator(
            self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh
        )
        completed = self._greedy(generator)
        totals = weighted_sum(self._rl, completed.rewards).tolist()
        names = metric_names(self._rl)
        records: list[dict[str, Any]] = []
        rows = zip(
            self._prompts,
            completed.texts,
            totals,
            completed.rewards.tolist(),
            strict=True,
        )
        for prompt, answer, total, each in rows:
            record = {"prompt": prompt.text, "answer": answer, "reward": total}
            records.append(record | dict(zip(names, each, strict=True)))
        if self._rl.pass_at:
            passed = self._passed(params, lora).tolist()
            for record, count in zip(records, passed, strict=True):
                record["passed"] = count
        return records

    @cached_property
    def _arena(self) -> Arena | None:
        """Returns the arena of an environment, or None."""
        if not self._rl.environment:
            return None
        return Arena.of(self._rl, self._tokenizer)

    def _greedy(self, generator: Generator) -> _Completed:
        """Returns the likeliest completion of each prompt."""
        prompts = self._prompts
        if self._arena is not None:
            return self._played(
                self._arena, GreedyTurns(generator, self._tokenizer), prompts
            )
        answers = generator.generate(
            [p.ids for p in prompts], max_new_tokens=self._rl.max_new_tokens
        )
        return _Completed(answers, self._rewarded(prompts, answers))

    def _rewarded(
        self, prompts: Sequence[PromptRecord], answers: Sequence[str]
    ) -> np.ndarray:
        """Returns the rewards of completions of one turn, float64 ``[completions, rewards]``."""
        return self._scorer(
            [p.text for p in prompts],
            answers,
            [p.record for p in prompts],
            [p.where for p in prompts],
        )

    def _played(
        self,
        arena: Arena,
        engine: TurnEngine,
        prompts: Sequence[PromptRecord],
        seeds: Sequence[int] = (),
    ) -> _Completed:
        """Returns completions of several turns with their rewards."""
        episodes = play(engine, arena, prompts, seeds or [0] * len(prompts))
        texts = []
        for episode in episodes:
            texts.append(_transcript(episode.messages[len(episode.opening.messages) :]))
        return _Completed(texts, episode_rewards(self._scorer, episodes))

    def _passed(self, params: Any, lora: Any | None) -> np.ndarray:
        """Returns the number of samples of each prompt that pass, of ``max(rl.pass_at)``, int
        ``[prompts]``."""
        rl = self._rl
        count = max(rl.pass_at)
        engine = TurnGenerator(
            self._model,
            view_weights(self._model, variables_of(params, lora)),
            stop_ids(self._tokenizer),
            self._mesh,
            rl.temperature,
            rl.max_new_tokens,
            0,
            distributed.GENERATED_ROWS * distributed.prompt_shards(self._mesh),
        )
        prompts = [prompt for prompt in self._prompts for _ in range(count)]
        sequence = np.random.SeedSequence(_PASS_SEED)
        seeds = sequence.generate_state(len(prompts)).tolist()
        if self._arena is not None:
            rewards = self._played(self._arena, engine, prompts, seeds).rewards
        else:
            requests = []
            for prompt, seed in zip(prompts, seeds, strict=True):
                requests.append(Request(prompt.ids, seed, rl.max_new_tokens))
            drawn = engine.sample(requests)
            texts = [self._tokenizer.decode(turn.tokens.tolist()) for turn in drawn]
            rewards = self._rewarded(prompts, texts)
        passes = weighted_sum(rl, rewards) >= rl.pass_reward  # False if unknown
        # [prompts * samples] -> [prompts, samples] -> [prompts]
        counts: np.ndarray = passes.reshape(-1, count).sum(1)
        return counts

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the mean ``reward`` and the mean of each reward, over prompts whose reward is
        known, and ``pass_1``, ... of `pass_at`, over all prompts.

        ``low`` and ``high`` are the 95% bootstrap interval of the mean; ``n`` is the number of
        prompts with a known reward.

        Raises:
          NaloraError: no prompt has a known reward.
        """
        known = [
            record["reward"] for record in records if not math.isnan(record["reward"])
        ]
        if not known:
            raise NaloraError(
                "held-out prompts", expected="a reward of at least one", found="none"
            )
        low, high = bootstrap(np.array(known))
        values: dict[str, Any] = {
            "reward": float(np.mean(known)),
            "low": low,
            "high": high,
            "n": len(known),
        }
        if self._rl.pass_at:
            passed = np.array([record["passed"] for record in records])
            for k in self._rl.pass_at:
                values[f"pass_{k}"] = pass_at(passed, max(self._rl.pass_at), k)
        for name in records[0]:
            if name.startswith("reward_"):
                values[name] = float(np.nanmean([record[name] for record in records]))
        return values

    def samples(
        self, params: Any, lora: Any | None, records: Sequence[ItemRecord]
    ) -> dict[str, Any]:
        """Returns a few prompts with their completions and the reference completions."""
        shown = self._prompts[:SAMPLES]
        answers = [record["answer"] for record in records[:SAMPLES]]
        references = [str(prompt.record["answer"]) for prompt in shown]
        return sample_records([prompt.text for prompt in shown], answers, references)
