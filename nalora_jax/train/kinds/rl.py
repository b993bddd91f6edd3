"""Runs with rewards: the policy samples, rewards become advantages, and the policy is updated.

A step has two programs: groups of samples of the current adapter (`nalora_jax.train.rollout`), and the
update (`nalora_jax.train.policy`). Between them are the rewards, on the host. With several updates, the
samples of one rollout serve as many steps.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.config import RLConfig, RunConfig
from nalora_jax.data.forms import in_turns
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.data.prompts import Prompt, PromptData, held_out_prompts, prompt_data
from nalora_jax.data.source import Source
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import SAMPLES, Evaluator, ItemRecord, variables_of
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.statistics import bootstrap
from nalora_jax.layout import distributed
from nalora_jax.method.step import Batch, Step, TrainState
from nalora_jax.ops.policy_losses import CLIPS, PolicyLoss, advantages, divergence_penalty
from nalora_jax.train.inputs import open_records, settled
from nalora_jax.train.job import Inputs, Job
from nalora_jax.train.kinds import text
from nalora_jax.train.objectives import NextToken
from nalora_jax.train.output import Output
from nalora_jax.train.policy import Policy
from nalora_jax.train.program import Assembly, next_token
from nalora_jax.train.rewards import Scorer, make_rewards
from nalora_jax.train.rollout import Sampler, Samples, sample_batch
from nalora_jax.weights.hub import resolve
from nalora_jax.weights.model_files import LoadedModel, open_files

log = logging.getLogger(__name__)

FILE = "rollouts.jsonl"  # in a run's folder: some samples of every logged step
_SHOWN = 4  # samples of a step in that file
_PATIENCE = 10  # rollouts in a row without a difference between rewards, before a warning


def policy_loss_of(rl: RLConfig) -> PolicyLoss:
    """Returns the static settings of a run's loss."""
    low, high = CLIPS[rl.loss]
    return PolicyLoss(rl.loss, rl.clip_low or low, rl.clip_high or high, rl.max_new_tokens, rl.beta)


def scorer_of(rl: RLConfig) -> Scorer:
    """Returns the rewards of a run.

    Raises:
      NaloraError: an unknown reward.
    """
    rewards = tuple(make_rewards(rl.rewards))
    return Scorer(rl.rewards, rewards, rl.reward_seconds, rl.ignore_reward_errors)


def metric_names(rl: RLConfig) -> list[str]:
    """Returns the name of each reward in log and records: ``reward_`` with its name or its function's.

    Names differ, also from those of their standard deviations: the second of two has ``_2``.
    """
    names: list[str] = []
    used = {"reward", "reward_std"}
    for reward in rl.rewards:
        name, _, rest = reward.partition(":")
        short = f"reward_{rest if rest and '=' not in rest else name}"
        several = itertools.chain([short], (f"{short}_{number}" for number in itertools.count(2)))
        names.append(next(name for name in several if used.isdisjoint((name, f"{name}_std"))))
        used |= {names[-1], f"{names[-1]}_std"}
    return names


def weighted_sum(rl: RLConfig, rewards: np.ndarray) -> np.ndarray:
    """Returns the weighted sum of rewards ``[..., rewards]``; NaN if none of a sample's is known."""
    weights = np.array(rl.reward_weights or [1.0] * len(rl.rewards))
    known = ~np.isnan(rewards)
    total = np.where(known, rewards * weights, 0.0).sum(-1)
    return np.where(known.any(-1), total, np.nan)


def program_parts(rl: RLConfig) -> dict[str, Any]:
    """Returns the arguments of `nalora_jax.train.program.assemble` for a run with rewards."""

    def objective(plain: NextToken) -> Policy:
        return Policy(plain, policy_loss_of(rl), rl.temperature)

    return {"objective": objective}


# ---------------------------------------------------------------- the four functions of a kind


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the model's files and the prompts, tokenizes them and settles the settings.

    Raises:
      NaloraError: a model, prompts or rewards that cannot be read, or settings that do not fit them.
    """
    scorer_of(config.rl)
    files = open_files(replace(resolve(config.model), rope_scaling=config.rope_scaling))
    added, rl = AddedTokens.of(config.data), config.rl
    base, tokenizer = files.described(added), files.tokenizer_with(added)
    train, held = open_records(config.data, source)
    turns = in_turns(train.read([0])[0], config.data)
    shape = {
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "seed": config.seed,
    }
    data = prompt_data(train, config.data, tokenizer, rl=rl, context=base.max_positions, **shape)
    config = replace(config, data=replace(config.data, max_length=data.length))
    config = settled(config, base.d_model, data.rows_per_epoch, "samples")
    prompts = held_out_prompts(held, config.data, tokenizer, data.length - rl.max_new_tokens)
    questions = {name: _digest(of) for name, of in zip(("reported", "selecting"), prompts, strict=True)}
    return Inputs(config, base, files, data, prompts, questions, turns)


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: Output, like: Job | None
) -> tuple[LoadedModel, Assembly, PromptRows]:
    """Loads the base, and builds adapters and the step with its rollouts; see `text.build_step`."""
    stream = inputs.data
    loaded, assembly, _ = text.build_step(inputs, placed, mesh, output, like, **program_parts(placed.rl))
    rows = distributed.process_rows(mesh, stream.batch_size // stream.accumulate)
    data = PromptRows(replace(stream, rows=tuple(rows.tolist())), Rollout())
    sampler = Sampler(
        assembly.eval_model,
        assembly.params,
        loaded.tokenizer,
        mesh,
        scorer_of(placed.rl),
        samples=placed.rl.samples,
        limit=placed.rl.max_new_tokens,
        temperature=placed.rl.temperature,
        seed=placed.seed,
        longest=stream.longest,
        folder=output.folder / "rollouts",
    )
    assert inputs.base is not None
    plain = next_token(inputs.base, assembly.model, placed.compute, mesh)
    scoring: Policy = program_parts(placed.rl)["objective"](plain)
    step = RolloutStep(placed, assembly, scoring, sampler, data, output.folder / FILE)
    return loaded, replace(assembly, step=step), data


def evaluators(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, like: Job | None
) -> tuple[RewardEvaluator, RewardEvaluator]:
    """Returns the evaluators of the held-out prompts."""
    reported, selecting = (
        RewardEvaluator(inputs.config.rl, loaded, assembly, of) for of in inputs.held_out
    )
    return reported, selecting


export_run = text.export_run


def _digest(prompts: Sequence[Prompt]) -> str:
    asked = [[list(prompt.ids), str(prompt.record["answer"])] for prompt in prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


# ---------------------------------------------------------------- the step


@dataclass
class Rollout:
    """The batch of a rollout that serves several updates; empty between rollouts."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # [accumulate, rows of this process, ...]
    figures: dict[str, float] = field(default_factory=dict)  # log metrics of the latest rollout


class RolloutBatches(BatchIterator):
    """Batches of prompts whose position includes a rollout that has updates left."""

    def __init__(self, data: PromptData, rollout: Rollout) -> None:
        super().__init__(data)
        self._rollout = rollout

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch, see `BatchIterator`, with the arrays of the rollout."""
        state = super().get_state()
        if self._rollout.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **self._rollout.arrays)
            state["rollout"] = base64.b64encode(buffer.getvalue()).decode()
            state["figures"] = self._rollout.figures
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position."""
        super().set_state(state)
        self._rollout.arrays = {}
        if "rollout" in state:
            self._rollout.arrays = dict(np.load(io.BytesIO(base64.b64decode(state["rollout"]))))
            self._rollout.figures = dict(state["figures"])


@dataclass(frozen=True)
class PromptRows:
    """The training rows of a run: prompts, and the rollout in progress."""

    stream: PromptData
    rollout: Rollout

    def batches(self) -> BatchIterator:
        """Returns an endless iterator of batches."""
        return RolloutBatches(self.stream, self.rollout)

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        return self.stream.describe()


class RolloutStep:
    """A training step with its rollout: ``(params, state, batch of prompts) -> (state, metrics)``.

    Args:
      config: the run's settings.
      assembly: with the compiled update.
      scoring: the objective, for log-probabilities before the first of several updates.
      sampler: draws the samples.
      data: the prompts of a batch.
      file: receives some samples.
    """

    def __init__(
        self,
        config: RunConfig,
        assembly: Assembly,
        scoring: Policy,
        sampler: Sampler,
        data: PromptRows,
        file: Path,
    ) -> None:
        self._config, self._sampler, self._data, self._file = config, sampler, data, file
        self._update: Step = assembly.step
        self._mesh, self._alike = assembly.mesh, deque[bool](maxlen=_PATIENCE)
        self._scores = jax.jit(partial(_scored, scoring))
        self._said: set[str] = set()
        self._first: dict[str, float] = {}

    def __call__(self, params: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after one update, on a new rollout or on the one in progress."""
        rl, rollout, number = self._config.rl, self._data.rollout, int(state.step)
        if number % rl.updates == 0 or not rollout.arrays:
            rollout.arrays, rollout.figures = self._new(params, state, batch, number)
        started = time.perf_counter()
        arrays = distributed.make_global_batch(rollout.arrays, self._mesh, rows_axis=1)
        state, metrics = self._update(params, state, arrays)
        jax.block_until_ready(metrics["loss"])
        if (number + 1) % rl.updates == 0:
            rollout.arrays = {}
        measured = dict(metrics["measured"]) | {"update_seconds": time.perf_counter() - started}
        self._warn(measured | rollout.figures)
        return state, metrics | {"measured": measured | rollout.figures}

    def _new(
        self, params: Any, state: TrainState, batch: Batch, number: int
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns the arrays of a new rollout, and its figures."""
        rl, stream = self._config.rl, self._data.stream
        started = time.perf_counter()
        places = np.asarray(distributed.fetch(batch["prompt"])).ravel()[:: rl.samples]
        prompts = stream.prompts(places.tolist())
        samples = self._sampler(state.lora, number, prompts)
        replaced = 0
        for attempt in range(rl.resample):
            flat = np.flatnonzero(_is_flat(weighted_sum(rl, samples.rewards), rl.samples))
            if not len(flat):
                break
            replaced += len(flat)
            others = stream.prompts(stream.others(number, attempt, len(flat)).tolist())
            drawn = self._sampler(state.lora, number, others, attempt=attempt + 1)
            samples = samples.replaced(flat, drawn, rl.samples)
            for place, other in zip(flat, others, strict=False):
                prompts[place] = other
        total = weighted_sum(rl, samples.rewards)
        ids = [prompt.ids for prompt in prompts for _ in range(rl.samples)]
        figures = {
            **{name: float(np.nanmean(samples.rewards[:, i])) for i, name in enumerate(metric_names(rl))},
            "reward": float(np.nanmean(total)),
            "reward_std": float(np.nanstd(total)),
            "groups_alike": float(_is_flat(total, rl.samples).mean()),
            "groups_replaced": float(replaced),
            "length": float(samples.lengths.mean()),
            "cut": float(samples.cut.mean()),
        }
        whole = sample_batch(ids, samples, stream.length, masks_cut=rl.mask_cut)
        has_penalty, scores = rl.loss == "rloo" and rl.beta > 0, {}
        if rl.updates > 1 or has_penalty:
            scores = self._by_training_program(params, state, whole)
        if has_penalty:
            total = total - divergence_penalty(
                scores["old"], scores["base"], whole["loss_weights"], rl.beta
            )
        if rl.updates > 1:
            whole |= scores
        whole["advantages"] = advantages(total.reshape(-1, rl.samples), rl.loss).ravel().astype(np.float32)
        figures["rollout_seconds"] = time.perf_counter() - started
        self._write(number + 1, prompts, samples)
        return self._rows(whole), figures

    def _rows(self, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns this process's rows ``[accumulate, rows, ...]``."""
        stream = self._data.stream
        micro = {
            name: value.reshape(stream.accumulate, -1, *value.shape[1:]) for name, value in whole.items()
        }
        return {name: value[:, list(stream.rows)] for name, value in micro.items()}

    def _by_training_program(
        self, params: Any, state: TrainState, whole: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Returns log-probabilities before the first update by the training program, of policy and base."""
        found: list[Any] = []
        batch = distributed.make_global_batch(self._rows(whole), self._mesh, rows_axis=1)
        for micro in range(self._data.stream.accumulate):
            rows = {name: value[micro] for name, value in batch.items()}
            of_micro = self._scores(params, state.lora, rows)
            found.append([np.asarray(distributed.fetch(x)) for x in of_micro])
        old, base = (np.concatenate(rows) for rows in zip(*found, strict=True))
        return {"old": old, "base": base}

    def _write(self, step: int, prompts: Sequence[Prompt], samples: Samples) -> None:
        """Appends some samples to the run's file at log steps."""
        if jax.process_index() or step % self._config.train.log_every:
            return
        rl, tokenizer = self._config.rl, self._sampler.tokenizer
        with self._file.open("a", encoding="utf-8") as file:
            for row in range(min(_SHOWN, len(prompts))):
                sample = row * rl.samples
                shown = {
                    "step": step,
                    "prompt": prompts[row].text,
                    "completion": tokenizer.decode(
                        samples.tokens[sample][samples.tokens[sample] >= 0].tolist()
                    ),
                    "rewards": dict(zip(rl.rewards, samples.rewards[sample].tolist(), strict=True)),
                }
                file.write(json.dumps(shown) + "\n")

    def _warn(self, figures: Mapping[str, Any]) -> None:
        """Logs once each that rewards are all equal, that samples grow, or that the policy has no entropy left."""
        rl, names = self._config.rl, ("groups_alike", "length", "entropy")
        now = {name: float(figures[name]) for name in names}
        first = self._first = self._first or now
        self._alike.append(now["groups_alike"] == 1)
        if len(self._alike) == _PATIENCE and all(self._alike):
            self._say(
                "the rewards of each group were all equal in %d steps: nothing is learned; look at %s, take easier or "
                "harder prompts, or more --rl.samples",
                *(_PATIENCE, self._file.name),
            )
        if now["length"] > max(2 * first["length"], 0.8 * rl.max_new_tokens):
            text_of = "samples have grown from %.0f to %.0f tokens, of at most %d"
            self._say(text_of, first["length"], now["length"], rl.max_new_tokens)
        if now["entropy"] < 0.1 * first["entropy"]:
            text_of = "the entropy of the policy fell from %.3f to %.3f: samples hardly differ; lower the learning rate"
            self._say(text_of, first["entropy"], now["entropy"])

    def _say(self, message: str, *values: Any) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message, *values)


def _is_flat(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Returns True for groups whose known rewards are all equal, bool ``[prompts]``."""
    groups = rewards.reshape(-1, samples)
    return np.nanmax(groups, 1, initial=-np.inf) <= np.nanmin(groups, 1, initial=np.inf)


def _scored(objective: Policy, params: Any, lora: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    frozen = params if "params" in params else {"params": params}
    variables = {**frozen, "lora": lora}
    key = jax.random.key(0)  # of dropout, which a run with rewards does not have
    now = objective.log_probs(variables, frozen["params"], batch, key)
    return now, objective.base_log_probs(variables, frozen["params"], batch)


# ---------------------------------------------------------------- held-out prompts


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
        self, rl: RLConfig, loaded: LoadedModel, assembly: Assembly, prompts: Sequence[Prompt]
    ) -> None:
        self._rl, self._scorer, self._prompts = rl, scorer_of(rl), prompts
        self._model, self._tokenizer = assembly.eval_model, loaded.tokenizer
        self._mesh = distributed.unless_single(assembly.mesh)

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns prompt, answer, the weighted sum ``reward`` (NaN if unknown) and each reward of every prompt."""
        generator = Generator(self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh)
        prompts = self._prompts
        answers = generator.generate([p.ids for p in prompts], max_new_tokens=self._rl.max_new_tokens)
        texts, records, places = zip(*((p.text, p.record, p.where) for p in prompts), strict=True)
        rewards = self._scorer(texts, answers, records, places)
        named = metric_names(self._rl)
        rows = zip(
            prompts, answers, weighted_sum(self._rl, rewards).tolist(), rewards.tolist(), strict=True
        )
        return [
            {
                "prompt": prompt.text,
                "answer": answer,
                "reward": total,
                **dict(zip(named, each, strict=True)),
            }
            for prompt, answer, total, each in rows
        ]

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the mean ``reward``, its 95% interval ``low`` and ``high``, ``n``, and the mean of each reward."""
        known = [record["reward"] for record in records if not math.isnan(record["reward"])]
        if not known:
            raise NaloraError("held-out prompts", expected="a reward of at least one", found="none")
        low, high = bootstrap(np.array(known))
        values: dict[str, Any] = {
            "reward": float(np.mean(known)),
            "low": low,
            "high": high,
            "n": len(known),
        }
        for name in records[0]:
            if name.startswith("reward_"):
                values[name] = float(np.nanmean([record[name] for record in records]))
        return values

    def samples(self, params: Any, lora: Any | None, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns a few prompts with their completions and the reference completions."""
        pairs = zip(self._prompts[:SAMPLES], records, strict=False)
        shown = [
            {
                "prompt": prompt.text,
                "answer": record["answer"].strip(),
                "expected": str(prompt.record["answer"]).strip(),
            }
            for prompt, record in pairs
        ]
        return {"samples": shown}
