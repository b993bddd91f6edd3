"""Runs with rewards: the policy samples, rewards become advantages, and the policy is updated.

A step has two programs: groups of samples of the current adapter (`nalora_jax.kinds.rl.rollout`),
and the update (`nalora_jax.kinds.rl.policy`). Between them are the rewards, on the host. With
several updates, the samples of one rollout serve as many steps.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.program import Assembly, next_token
from nalora_jax.assembly.schedule import Schedule
from nalora_jax.common.folders import RunFolder
from nalora_jax.config import DataConfig, RLConfig, RunConfig
from nalora_jax.config.checks import Limits, check_divides, require
from nalora_jax.config.settings import UNCHANGED
from nalora_jax.data.forms import uses_chat_template
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.data.prompts import (
    PromptData,
    PromptRecord,
    PromptText,
    answered,
    chat_prompts,
    held_out_prompts,
    is_chat_prompt,
    prompt_data,
)
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import ROLLOUTS
from nalora_jax.kinds import text
from nalora_jax.kinds.inputs import (
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.record import Arrays, Built, Inputs, Job, register_kind
from nalora_jax.kinds.rl.environments import Arena, make_environments
from nalora_jax.kinds.rl.episodes import segments
from nalora_jax.kinds.rl.policy import Policy
from nalora_jax.kinds.rl.reward_evaluation import (
    RewardEvaluator,
    metric_names,
    weighted_sum,
)
from nalora_jax.kinds.rl.rewards import Scorer
from nalora_jax.kinds.rl.rollout import Samples, sample_batch
from nalora_jax.kinds.rl.sampling_step import SamplingStep
from nalora_jax.kinds.rl.servers.pool import ServerPool
from nalora_jax.kinds.rl.servers.proof import expected_log_probs, make_probes
from nalora_jax.kinds.rl.servers.received import Received
from nalora_jax.kinds.rl.servers.trial import try_servers
from nalora_jax.kinds.rl.servers.versions import Exports
from nalora_jax.mesh import distributed, processes
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.replay import ROUTING_DTYPE, routing_shape
from nalora_jax.ops.policy_losses import (
    CLIPS,
    Correction,
    PolicyLoss,
    advantages,
    divergence_penalty,
)
from nalora_jax.weights.model_files import LoadedModel, open_files

log = logging.getLogger(__name__)

# Total variation distance between generator and training program, before a warning.
_MISMATCH = 0.1
# Rollouts in a row without a difference between rewards, before a warning.
_PATIENCE = 10


def updates_with_base(rl: RLConfig) -> bool:
    """Returns True if the update computes the base's log-probabilities, which its loss needs.

    Otherwise they are an input of the update: with several updates and for "rloo" they are computed
    before it, and without beta they are only used to log the divergence.
    """
    return rl.beta > 0 and rl.updates == 1 and rl.loss != "rloo"


def _policy(rl: RLConfig, plain: NextToken) -> Policy:
    """Returns the objective of a run with rewards."""
    low, high = CLIPS[rl.loss]
    loss = PolicyLoss(
        rl.loss, rl.clip_low or low, rl.clip_high or high, rl.max_new_tokens, rl.beta
    )
    correction = None
    if rl.servers:
        correction = Correction(
            rl.importance_clip, rl.importance_tokens, rl.importance_samples
        )
    return Policy(plain, loss, rl.temperature, correction)


def program_parts(config: RunConfig, processor: Any) -> dict[str, Any]:
    """Returns the arguments of `nalora_jax.assembly.program.assemble` for a run with rewards."""
    return {"objective": partial(_policy, config.rl)}


# ---------------------------------------------------------------- functions of a kind


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the model's files and the prompts, tokenizes them and settles the settings.

    Held-out prompts leave room for a completion of ``rl.max_new_tokens`` in a training row.

    Raises:
      NaloraError: a model, prompts or rewards that cannot be read, or settings that do not fit
        them.
    """
    rl = config.rl
    # They raise for unknown names, before data is read.
    Scorer(rl)
    if rl.environment:
        make_environments(rl.environment)
    files = open_files(resolve_base(config))
    base, tokenizer, adapters = describe_base(config, files)
    if rl.replay_routing and not routing_shape(base)[0]:
        raise NaloraError(
            "--rl.replay-routing",
            expected="a model with experts",
            found=config.model,
            remedy="leave it out",
        )
    train, held = open_records(config.data, source)
    first = train.read([0])[0]
    if rl.environment:
        record = answered(first, config.data)
        check_environment(Arena.of(rl, tokenizer), record, train.where(0))
    written = prompt_text(rl, config.data, tokenizer, first)
    turns = written is not None or uses_chat_template(first, config.data)
    shape = stream_shape(config) | {"context": base.max_positions}
    data = PromptRows.of(train, config.data, tokenizer, rl=rl, written=written, **shape)
    config = replace(config, data=replace(config.data, max_length=data.length))
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "samples")
    prompts = held_out_prompts(
        held, config.data, tokenizer, data.length - rl.max_new_tokens, written
    )
    questions = {
        name: prompts_digest(of)
        for name, of in zip(("reported", "selecting"), prompts, strict=True)
    }
    return Inputs(config, base, files, data, prompts, questions, turns, adapters)


def prompt_text(
    rl: RLConfig, data: DataConfig, tokenizer: Tokenizer, first: Record
) -> PromptText | None:
    """Returns the function that writes prompts, for `nalora_jax.data.prompts.prompt_data`.

    They are an environment's, or chats that end before the assistant's turn or have
    ``rl.system_prompt``; otherwise those of training on text, and the result is None.

    Args:
      rl: environment and system prompt.
      data: names of the fields.
      tokenizer: of the model.
      first: a record, whose form is that of all.
    """
    if rl.environment:
        arena = Arena.of(rl, tokenizer)
        return lambda record, where: arena.render(
            arena.begin(answered(record, data), where)[1]
        )
    if rl.system_prompt or is_chat_prompt(first, data):
        return chat_prompts(data, tokenizer, rl.system_prompt)
    return None


def check_environment(arena: Arena, record: Record, where: str) -> None:
    """Checks that the chat template can write an environment's conversations, on one record, and
    logs if it removes thoughts.

    Raises:
      NaloraError: it rewrites earlier turns, or cannot write its tools.
    """
    if arena.check(arena.begin(record, where)[1]):
        log.info(
            "the chat template removes the thoughts of earlier turns; samples keep them: each turn "
            "is trained on after all tokens before it"
        )


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: RunFolder, like: Job | None
) -> Built:
    """Loads the base, and builds adapters and the step with its rollouts; see `text.build_step`."""
    exports = None
    if placed.rl.servers:
        exports = tried_servers(inputs, placed, output)
    built = text.build_step(inputs, placed, mesh, output, like)
    loaded = cast(LoadedModel, built.loaded)
    assembly = built.assembly
    data = replace(built.data, rollout=Rollout())
    pool = None
    if exports is not None:
        pool = server_pool(placed, exports, loaded, assembly, data, output.folder)
    step = RolloutStep(placed, loaded, assembly, data, output.folder, pool)
    return Built(loaded, replace(assembly, step=step), data)


def tried_servers(inputs: Inputs, config: RunConfig, output: RunFolder) -> Exports:
    """Tries the servers of a run (`try_servers`) and returns the folder of adapter versions."""
    assert inputs.base is not None
    assert inputs.adapters is not None
    rl = config.rl
    folder = rl.server_adapters or str(output.folder.absolute() / "served")
    name = hashlib.sha256(str(output.folder.absolute()).encode()).hexdigest()[:6]
    path = rl.server_path or folder
    exports = Exports(folder, path, name, inputs.base, inputs.adapters)
    longest = inputs.data.longest + rl.max_new_tokens
    prompt = inputs.data.items[0].prompt_ids
    vocab = inputs.base.vocab_size
    processes.run_on_first_process(
        lambda: try_servers(rl, exports, prompt, longest, vocab)
    )
    return exports


def server_pool(
    config: RunConfig,
    exports: Exports,
    loaded: LoadedModel,
    assembly: Assembly,
    data: PromptData,
    folder: Path,
) -> ServerPool:
    """Returns the servers of a run; their probes are prompts of the training data."""
    probes = make_probes([item.prompt_ids for item in data.items])
    model = assembly.eval_model
    first = jax.process_index() == 0
    return ServerPool(
        config.rl,
        exports,
        probes,
        lambda lora: expected_log_probs(model, assembly.params, lora, probes),
        Received(folder / "received" / _policy_digest(config) if first else None),
        stops=sorted(loaded.tokenizer.eos_ids),
        vocab=loaded.config.vocab_size,
        folder=folder,
    )


def _policy_digest(config: RunConfig) -> str:
    """Returns a digest of settings that decide which policy draws the samples of a step.

    A run that starts again before its first checkpoint, with others, asks for new samples.
    """
    settings = config.to_dict()
    names = ("model", "adapter", "seed", "lora", "optimizer", "mechanisms")
    decisive = [settings[name] for name in names]
    rl = config.rl
    decisive.append([rl.rewards, rl.loss, rl.temperature, rl.beta])
    if rl.environment:
        turns = [rl.environment, rl.max_turns, rl.max_turn_tokens]
        decisive.append([*turns, rl.system_prompt])
    if config.distill.kind:
        decisive.append(settings["distill"])
    return hashlib.sha256(json.dumps(decisive, default=str).encode()).hexdigest()[:8]


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, prompts: Any
) -> RewardEvaluator:
    """Returns the evaluator of some held-out prompts."""
    return RewardEvaluator(inputs.config.rl, loaded, assembly, prompts)


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run with rewards.

    Raises:
      NaloraError: no reward, weights of other rewards, or a batch that groups of samples do not
        divide.
    """
    rl = config.rl
    has_reward = bool(rl.reward_names)
    require("--rl.rewards", has_reward, "at least one, or --rl.environment", "none")
    several = "2 or more, whose rewards are compared"
    require("--rl.samples", rl.samples > 1, several, rl.samples)
    # The penalty compares with the base, whose kernels PiSSA changes. Initializations by gradients
    # read batches of targets, which prompts do not have.
    inits: tuple[str, ...] = (*UNCHANGED, "pissa")
    if rl.beta:
        inits = UNCHANGED
    values: dict[str, tuple[Any, ...]] = {
        "tune": ((),),
        "vision.task": ("",),
        "preference.loss": ("none",),
        "adalora.target_rank": (0,),
        "lora.dropout": (0.0,),
        "data.loss_last": (0.0,),
        "lora.init": inits,
    }
    yield Limits("--rl.rewards", values)
    if config.adapter:
        remedy = "the reference is the base without an adapter: merge this one first (nalora merge)"
        yield Limits("--adapter", {"rl.beta": (0,)}, remedy)
    yield from server_limits(rl)
    if not rl.environment:
        values = {"rl.max_turns": (8,), "rl.max_turn_tokens": (0,)}
        yield Limits("no --rl.environment", values)
    enough = all(count >= 1 for count in rl.pass_at)
    require("--rl.pass-at", enough, "numbers of samples, at least 1", rl.pass_at)
    count = len(rl.reward_names)
    weights = len(rl.reward_weights)
    expected = f"{count}, one a reward"
    require("--rl.reward-weights", weights in (0, count), expected, weights)
    check_divides(config.train.batch_size, "rl.samples", rl.samples)


def server_limits(rl: RLConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have with and without servers; see `limits`."""
    for flag, bounds in (
        ("--rl.importance-tokens", rl.importance_tokens),
        ("--rl.importance-samples", rl.importance_samples),
    ):
        fits = not bounds or (len(bounds) == 2 and 0 <= bounds[0] < bounds[1])
        require(flag, fits, "LOW HIGH with 0 <= LOW < HIGH", bounds)
    if not rl.servers:
        path = rl.server_adapters or rl.server_path
        flags = "--rl.server-adapters, --rl.server-path"
        require(flags, not path, "none with no --rl.servers", path)
        yield Limits("no --rl.servers", {"rl.staleness": (0,)})
        return
    for url in rl.servers:
        is_url = url.startswith(("http://", "https://"))
        require("--rl.servers", is_url, "addresses such as http://localhost:8000", url)
    # A server applies a plain LoRA to the original base.
    values: dict[str, tuple[Any, ...]] = {
        "lora.init": UNCHANGED,
        "lora.dora": (False,),
        "data.add_tokens": ((),),
        # Their API returns no experts.
        "rl.replay_routing": (False,),
    }
    yield Limits("--rl.servers", values)


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the shapes of the arrays of an update, see `nalora_jax.kinds.rl.policy.Policy`."""
    row = (config.data.max_length,)
    arrays: Arrays = {"sampled": (row, "float32")}
    if config.rl.updates > 1:
        arrays["old"] = (row, "float32")
    if not updates_with_base(config.rl):
        arrays["base"] = (row, "float32")
    if config.rl.replay_routing:
        arrays["replayed"] = ((*row, *routing_shape(base)), ROUTING_DTYPE)
    return arrays | {"advantages": ((), "float32"), "real": ((), "float32")}


def prompts_digest(prompts: Sequence[PromptRecord]) -> str:
    """Returns the digest of the token ids and the reference completions."""
    asked = [[list(prompt.ids), str(prompt.record["answer"])] for prompt in prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


# ---------------------------------------------------------------- the step


@dataclass
class Rollout:
    """The batch of a rollout that serves several updates; empty between rollouts."""

    # [accumulate, rows of this process, ...]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    # log metrics of the latest rollout
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptRows(PromptData):
    """The training rows of a run: prompts, and the rollout in progress."""

    rollout: Rollout = field(default_factory=Rollout)

    @classmethod
    def of(cls, *arguments: Any, **options: Any) -> PromptRows:
        """Returns `nalora_jax.data.prompts.prompt_data` with an empty rollout."""
        return cls(**vars(prompt_data(*arguments, **options)))

    def batches(self, state: dict[str, Any] | None = None) -> BatchIterator:
        """Returns an endless iterator of batches, starting at the first one or at a state of an
        iterator."""
        iterator = RolloutBatches(self)
        if state is not None:
            iterator.set_state(state)
        return iterator


class RolloutBatches(BatchIterator):
    """Iterator of batches of prompts; its state includes the rollout that has updates left."""

    def __init__(self, data: PromptRows) -> None:
        super().__init__(data)
        self._rollout = data.rollout

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch (`BatchIterator`) and the arrays of a rollout that
        has updates left."""
        state = super().get_state()
        if self._rollout.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **self._rollout.arrays)
            state["rollout"] = base64.b64encode(buffer.getvalue()).decode()
            state["figures"] = self._rollout.figures
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position, and restores its rollout."""
        super().set_state(state)
        self._rollout.arrays = {}
        if "rollout" in state:
            self._rollout.arrays = dict(
                np.load(io.BytesIO(base64.b64decode(state["rollout"])))
            )
            self._rollout.figures = dict(state["figures"])


class RolloutStep(SamplingStep):
    """A `SamplingStep` with rewards; the samples of a rollout may serve several updates."""

    _data: PromptRows

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedModel,
        assembly: Assembly,
        data: PromptRows,
        folder: Path | None,
        servers: ServerPool | None = None,
    ) -> None:
        super().__init__(config, loaded, assembly, data, folder, servers)
        self._warn = EarlyWarnings(config.rl.max_new_tokens)
        self._scores = scores_of(config, assembly)

    def __call__(
        self, params: Any, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after one update, on a new rollout or on the one in progress.

        The metrics include the rollout's, under ``measured``. Unlike a step without rewards,
        the call returns after the update has been computed.
        """
        rl = self._config.rl
        rollout = self._data.rollout
        number = int(state.step)
        self._resume(number)
        # Also in the middle of the updates, if no rollout was restored.
        if number % rl.updates == 0 or not rollout.arrays:
            rollout.arrays, rollout.figures = self._new(params, state, batch, number)
        state, metrics, seconds = self._updated(params, state, rollout.arrays)
        if (number + 1) % rl.updates == 0:
            rollout.arrays = {}
        measured = (
            dict(metrics["measured"]) | rollout.figures | {"update_seconds": seconds}
        )
        measured["update_tokens_per_second"] = float(metrics["tokens"]) / seconds
        # Steps done before the current rollout; without the base, a placeholder was compared.
        if not self._needs_base(number // rl.updates * rl.updates):
            measured["divergence"] = math.nan
        self._warn(measured)
        return state, metrics | {"measured": measured}

    def _new(
        self, params: Any, state: TrainState, batch: Batch, number: int
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Draws a rollout; returns its arrays ``[accumulate, rows of this process, ...]`` and log
        metrics.

        Groups whose rewards are all equal have no gradient: with ``rl.resample`` they are replaced
        by groups of other prompts, in up to that many attempts. ``number`` is the count of steps
        done.
        """
        rl = self._config.rl
        stream = self._data
        started = time.perf_counter()
        places, prompts = self._prompts(batch)
        if self._servers is not None:
            self._ask_ahead(self._servers, state, number, places)
        samples = self._sampler(state.lora, number, prompts)
        drawn_tokens = samples.written.sum()
        replaced = 0
        for attempt in range(rl.resample):
            # Indices of the prompts whose groups are replaced.
            flat = np.flatnonzero(
                _is_flat(weighted_sum(rl, samples.rewards), rl.samples)
            )
            if not len(flat):
                break
            replaced += len(flat)
            others = stream.prompts(stream.others(number, attempt, len(flat)).tolist())
            drawn = self._sampler(state.lora, number, others, attempt=attempt + 1)
            samples = samples.replaced(flat, drawn, rl.samples)
            drawn_tokens = drawn_tokens + drawn.written.sum()
            for place, other in zip(flat, others, strict=False):
                prompts[place] = other
        seconds = time.perf_counter() - started
        total = weighted_sum(rl, samples.rewards)
        ids = [prompt.ids for prompt in prompts for _ in range(rl.samples)]
        figures = {
            # After the replacements, unlike `groups_replaced`.
            "groups_alike": float(_is_flat(total, rl.samples).mean()),
            "groups_kept": float((~_is_flat(total, rl.samples)).sum()),
            "groups_replaced": float(replaced),
            "length": float(samples.written.mean()),
            "cut": float(samples.cut.mean()),
            "rollout_seconds": seconds,
            "rollout_tokens_per_second": float(drawn_tokens) / seconds,
        }
        if rl.environment:
            figures["turns"] = float(samples.turns[:, 0].mean())
            figures["template_match"] = float(samples.turns[:, 1].mean())
        if self._servers is not None:
            figures |= self._servers.figures()
            figures["staleness"] = float(number - samples.version.mean())
            if number + rl.updates >= self._config.steps:
                self._servers.close()  # the last rollout
        for name, values in zip(
            ["reward", *metric_names(rl)], [total, *samples.rewards.T], strict=True
        ):
            known = values[~np.isnan(values)]
            figures[name] = math.nan
            figures[f"{name}_std"] = math.nan
            if len(known):
                figures[name] = float(known.mean())
                figures[f"{name}_std"] = float(known.std())
        # Arrays of all rows of the global batch, in every process.
        whole = sample_batch(ids, samples, stream.length, masks_cut=rl.mask_cut)
        has_penalty = rl.loss == "rloo" and rl.beta > 0
        # Log-probabilities before the update. The generator's serve unless several updates need the
        # ratio to the training program's, or the penalty compares them with the base's.
        old = whole["sampled"]
        if rl.updates > 1 or has_penalty:
            old = self._by_training_program(params, state, whole, of_base=False)
        base = whole["sampled"]  # a placeholder at steps whose divergence is not shown
        if self._needs_base(number) and not updates_with_base(rl):
            base = self._by_training_program(params, state, whole, of_base=True)
        if has_penalty:
            # "rloo" subtracts the divergence from the reward instead of adding it to the loss.
            total = total - divergence_penalty(
                old, base, whole["loss_weights"], rl.beta
            )
        if rl.updates > 1:
            whole["old"] = old
        if not updates_with_base(rl):
            whole["base"] = base
        whole["advantages"] = (
            # [rows] -> [prompts, samples] -> [rows]
            advantages(total.reshape(-1, rl.samples), rl.loss)
            .ravel()
            .astype(np.float32)
        )
        if self._is_shown(number):
            show = partial(self._shown_sample, samples, whole["advantages"])
            self._write(number + 1, prompts, show)
        return self._rows(whole), figures

    def _ask_ahead(
        self, servers: ServerPool, state: TrainState, number: int, places: np.ndarray
    ) -> None:
        """Loads the adapter and asks for the samples of the next rollouts, ``rl.staleness`` of
        them; forgets samples that no checkpoint needs.

        Args:
          servers: that draw the samples.
          state: with the adapter.
          number: of steps done.
          places: of this step's prompts; the next ones follow in the order of the data.
        """
        rl = self._config.rl
        servers.load(state.lora, number)
        ahead = rl.staleness * rl.updates
        self._forget_served(servers, ahead)
        stream = self._data
        for later in range(ahead + 1)[:: rl.updates]:
            row = (number + later) * stream.batch_size
            rows = list(range(row, row + stream.batch_size))
            of_step = stream.arrays(rows)["prompt"][:: rl.samples]
            if later == 0 and not np.array_equal(of_step, places):
                return  # another batch size before: the order of the data has moved
            last = self._config.steps
            if number + later < last:
                prompts = stream.prompts(of_step.tolist())
                servers.ahead(self._sampler.requests(number + later, prompts))

    def _is_shown(self, number: int) -> bool:
        """Returns True if a step of the rollout that starts after ``number`` steps is logged."""
        served = range(number + 1, number + self._config.rl.updates + 1)
        return any(map(Schedule.of(self._config).logs, served))

    def _needs_base(self, number: int) -> bool:
        """Returns True if the rollout that starts after ``number`` steps needs the base's
        log-probabilities, for its loss or to log the divergence.

        With an initialization that changes the frozen weights, the base is not the model with the
        adapter off, and the divergence is not measured.
        """
        if self._config.lora.init not in UNCHANGED:
            return False
        return self._config.rl.beta > 0 or self._is_shown(number)

    def _by_training_program(
        self,
        params: Any,
        state: TrainState,
        whole: Mapping[str, np.ndarray],
        *,
        of_base: bool,
    ) -> np.ndarray:
        """Returns log-probabilities ``[rows, seq]`` of policy or base before the update, by the
        training program."""
        batch = distributed.make_global_batch(
            self._rows(whole), self._mesh, rows_axis=1
        )
        log_probs = []
        # [accumulate, rows, ...]: a micro-batch at a time, as in the update, to bound memory.
        for micro in range(self._data.accumulate):
            rows = {name: value[micro] for name, value in batch.items()}
            scores = self._scores(params, state.lora, rows, of_base=of_base)
            log_probs.append(np.asarray(processes.fetch(scores)))
        return np.concatenate(log_probs)

    def _shown_sample(
        self, samples: Samples, advantages: np.ndarray, row: int
    ) -> dict[str, Any]:
        """Returns a sample's completion, rewards by setting (None if unknown) and advantage, for
        JSON."""
        rewards: dict[str, float | None] = {}
        for name, reward in zip(
            self._config.rl.reward_names, samples.rewards[row].tolist(), strict=True
        ):
            rewards[name] = None
            if not math.isnan(reward):
                rewards[name] = reward
        decode = self._sampler.tokenizer.decode
        ids = self._ids(samples, row)
        sample: dict[str, Any] = {
            "completion": decode(ids),
            "rewards": rewards,
            "advantage": float(advantages[row]),
            "version": int(samples.version[row]),
        }
        if self._config.rl.environment:
            sample["turns"] = []
            inserted = samples.inserted[row, : len(ids)]
            for is_inserted, part in segments(ids, inserted.tolist()):
                author = "environment" if is_inserted else "model"
                content = decode(part, skip_special=False)
                sample["turns"].append({"author": author, "text": content})
        return sample


class EarlyWarnings:
    """Logs once each that all rewards are equal, that samples grow, that no entropy is left, or a
    large mismatch.

    Args:
      limit: largest number of tokens of a sample.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._alike = deque[bool](maxlen=_PATIENCE)
        self._first: dict[str, float] = {}
        self._logged: set[str] = set()

    def __call__(self, figures: Mapping[str, Any]) -> None:
        """Reads the log metrics of a step and logs each warning that applies for the first time.

        It uses ``groups_alike``, ``length``, ``entropy`` and ``mismatch_bound``; lengths and
        entropies are compared with those of the first step that this process ran.
        """
        names = ("groups_alike", "length", "entropy", "mismatch_bound")
        now = {name: float(figures[name]) for name in names}
        first = self._first = self._first or now
        self._alike.append(now["groups_alike"] == 1)
        texts = {
            "the rewards of each group were all equal in %d steps: nothing is learned; look at %s, "
            "take easier or harder prompts, or more --rl.samples": (
                len(self._alike) == _PATIENCE and all(self._alike),
                (_PATIENCE, ROLLOUTS),
            ),
            "samples have grown from %.0f to %.0f tokens, of at most %d": (
                now["length"] > max(2 * first["length"], 0.8 * self._limit),
                (first["length"], now["length"], self._limit),
            ),
            "the entropy of the policy fell from %.3f to %.3f: samples hardly differ; lower the "
            "learning rate": (
                now["entropy"] < 0.1 * first["entropy"],
                (first["entropy"], now["entropy"]),
            ),
            "generator and training program differ by %.2f in the probabilities of a token, more "
            "than %g: train with --compute.dtype float32": (
                now["mismatch_bound"] > _MISMATCH,
                (now["mismatch_bound"], _MISMATCH),
            ),
        }
        # Message -> (condition, arguments of the message).
        for text_of, (applies, values) in texts.items():
            if applies and text_of not in self._logged:
                self._logged.add(text_of)
                log.warning(text_of, *values)


def _is_flat(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Returns True for groups whose known rewards are all equal, bool ``[prompts]``.

    Groups without a known reward, whose initial values -inf and inf remain, are flat, too.
    ``rewards`` is ``[prompts * samples]``.
    """
    groups = rewards.reshape(-1, samples)
    return np.nanmax(groups, 1, initial=-np.inf) <= np.nanmin(groups, 1, initial=np.inf)


def scores_of(config: RunConfig, assembly: Assembly) -> Callable[..., jax.Array]:
    """Returns the training program's log-probabilities ``(params, lora, rows, of_base=...) ->
    [rows, seq]``.

    ``rows`` is a batch of `nalora_jax.kinds.rl.policy`; with ``of_base`` the adapter is off.
    """
    plain = next_token(assembly.model.config, assembly.model, config.compute)
    return partial(_scored, _policy(config.rl, plain))


@partial(jax.jit, static_argnames=("objective", "of_base"))
def _scored(
    objective: Policy, params: Any, lora: Any, batch: Batch, *, of_base: bool
) -> jax.Array:
    """Returns the log-probabilities ``[rows, seq]`` of a batch's targets, see `scores_of`."""
    # A view in a faster layout (`Assembly.view`) has its collections at the top.
    frozen = params if "params" in params else {"params": params}
    variables = {**frozen, "lora": lora}
    if of_base:
        return objective.base_log_probs(variables, frozen["params"], batch)
    key = jax.random.key(0)  # of dropout, which a run with rewards does not have
    return objective.log_probs(variables, frozen["params"], batch, key)


KIND = register_kind(
    replace(
        text.KIND,
        name="rl",
        open_inputs=open_inputs,
        build_step=build_step,
        evaluator=evaluator,
        program_parts=program_parts,
        limits=limits,
        # As long as --rl.beta is 0 and a step has one update; docs/rl.md has the runs.
        rate=1 / 8,
        batch_arrays=batch_arrays,
        draws_samples=lambda config: True,
        subject="nalora_jax.study.reward_subject:Rewards",
    )
)
