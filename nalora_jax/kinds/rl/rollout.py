"""Rollouts: groups of samples of the current policy, with their rewards, as a training batch.

The generator shares the frozen weights and the mesh of the training step, without a copy. A rollout
is a pure function of seed, step, attempt, weights and adapter, because each row has its own random
key. Complete groups are stored in the run's folder, so that a run that was killed during a rollout
repeats only the groups of the program call that was interrupted:

    <output>/rollouts/<step>-<attempt>-<digest of the adapter>.npz
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nalora_jax.common import files, trees
from nalora_jax.config import RLConfig
from nalora_jax.data.prompts import PromptRecord
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import (
    NO_TOKEN,
    Prompts,
    padded_rows,
    sample_groups,
    view_weights,
)
from nalora_jax.evaluate.generate.sampling import make_sampling
from nalora_jax.kinds.rl.engine import Request
from nalora_jax.kinds.rl.environments import Arena
from nalora_jax.kinds.rl.episodes import (
    RolloutProgress,
    TurnEngine,
    episode_rewards,
    follows_template,
    play,
)
from nalora_jax.kinds.rl.rewards import Scorer
from nalora_jax.kinds.rl.servers.pool import ServerPool
from nalora_jax.kinds.rl.turn_generator import TurnGenerator, stop_ids
from nalora_jax.mesh.distributed import (
    GENERATED_ROWS,
    place_batch,
    program_shape,
    prompt_shards,
)
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.ropes import switch_length

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Completions of prompts, those of one prompt next to each other."""

    # int32 [prompts * samples, limit], with the stop token; NO_TOKEN after it
    tokens: np.ndarray
    log_probs: np.ndarray  # float32, same shape, by the generator
    # float64 [prompts * samples, rewards]; NaN for a reward that failed
    rewards: np.ndarray
    cut: np.ndarray  # bool [prompts * samples], True for samples without a stop token
    # int32 [prompts * samples], training step of the adapter that wrote each sample
    version: np.ndarray
    # bool [prompts * samples, limit], True for tokens of an environment's messages
    inserted: np.ndarray
    # int32 [prompts * samples, 2]: turns of the model; 1 if the chat template renders the sample's
    # messages as its tokens, else 0
    turns: np.ndarray
    # int16 [prompts * samples, longest prompt + limit, mixtures, top_k], experts of the tokens of
    # prompt and sample (`nalora_jax.models.replay`), -1 after them; None unless they are replayed
    routing: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name, without `routing` if it is None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each sample, with its stop token."""
        lengths: np.ndarray = (self.tokens != NO_TOKEN).sum(1)
        return lengths

    @property
    def written(self) -> np.ndarray:
        """Returns the number of tokens of each sample that the model wrote."""
        return self.lengths - self.inserted.sum(1)

    @staticmethod
    def of_one_turn(
        tokens: np.ndarray,
        log_probs: np.ndarray,
        rewards: np.ndarray,
        cut: np.ndarray,
        version: np.ndarray,
        routing: np.ndarray | None = None,
    ) -> Samples:
        """Returns samples without an environment."""
        turns = np.ones((len(tokens), 2), np.int32)
        inserted = np.zeros(tokens.shape, bool)
        known = (tokens, log_probs, rewards, cut, version)
        return Samples(*known, inserted, turns, routing)

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """Returns the samples of several parts, one after the other."""
        arrays = {}
        for name in parts[0].arrays:
            of_parts = [part.arrays[name] for part in parts]
            arrays[name] = np.concatenate(of_parts)
        return Samples(**arrays)

    def replaced(self, prompts: np.ndarray, by: Samples, samples: int) -> Samples:
        """Returns the samples with those of ``prompts`` replaced by others.

        Args:
          prompts: places of the prompts, int ``[n]``.
          by: the samples of n other prompts.
          samples: of a prompt.
        """
        arrays = {name: array.copy() for name, array in self.arrays.items()}
        for name, array in arrays.items():
            shape = (-1, samples, *array.shape[1:])
            groups = array.reshape(shape)  # a view
            # [prompts * samples, ...] -> [prompts, samples, ...]; writes to `array`.
            groups[prompts] = by.arrays[name].reshape(shape)
        return Samples(**arrays)


@dataclass(frozen=True)
class Sampler:
    """Draws groups of samples and computes their rewards.

    Attributes:
      rl: rewards, number and limit of the samples of a prompt, and their temperature.
      model: the decoder without rematerialization.
      params: its frozen weights.
      tokenizer: of the model.
      mesh: of the weights.
      prompts: number of prompts of a step.
      seed: of the run.
      longest: tokens of the longest prompt of the data set.
      folder: for complete groups; None: they are not stored.
      rows: rows that are generated at once on each shard of a batch.
      servers: that draw the samples; None: the generator of this library does.
      arena: of an environment; None: samples have one turn.
    """

    rl: RLConfig
    model: Decoder
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh
    prompts: int
    seed: int
    longest: int
    folder: Path | None = None
    rows: int = GENERATED_ROWS
    servers: ServerPool | None = None
    arena: Arena | None = None

    def __post_init__(self) -> None:
        """Checks that the longest prompt and its samples fit the model's context.

        Raises:
          NaloraError: they do not fit.
        """
        context = self.model.config.max_positions
        # Length from which LongRoPE rotates all keys by other frequencies.
        switch = switch_length(self.model.config.ropes)
        if switch is not None and switch < context:
            context = switch  # cached keys are invalid beyond
        if self.longest + self.rl.max_new_tokens > context:
            raise NaloraError(
                "--rl.max-new-tokens",
                expected=f"at most {context - self.longest} with prompts of up to {self.longest} "
                "tokens",
                found=self.rl.max_new_tokens,
                remedy="lower it, or leave long prompts out with --data.max-length",
            )

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.rl)

    @cached_property
    def _stops(self) -> np.ndarray:
        return stop_ids(self.tokenizer)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Returns `program_shape` on this mesh."""
        return program_shape(
            self.prompts, self.rl.samples, prompt_shards(self.mesh), self.rows
        )

    def __call__(
        self, lora: Any, step: int, prompts: Sequence[PromptRecord], *, attempt: int = 0
    ) -> Samples:
        """Returns the samples of ``prompts``.

        Args:
          lora: the current adapter.
          step: the training step that the samples are for; with the run's seed it determines the
            keys.
          prompts: any number; a row's key depends on its place in the list.
          attempt: number of the rollout within the step; its keys differ.

        Raises:
          NaloraError: a reward fails.
        """
        if self.servers is not None:
            self.servers.load(lora, step)
            return self._served(self.servers, step, prompts, attempt)
        weights = view_weights(self.model, {"params": self.params, "lora": lora})
        seeds = self._seeds(step, prompts, attempt)
        names = {field.name for field in fields(Samples)}
        if not self.rl.replay_routing:
            names.remove("routing")
        store = _Store(self.folder, f"{step}-{attempt}", lora, names)
        parts: list[Samples] = []
        progress = RolloutProgress()
        for start in range(0, len(prompts), self.shape[0]):
            progress("prompts", start, len(prompts))
            group = prompts[start : start + self.shape[0]]
            if (part := store.read(start)) is None:
                first = start * self.rl.samples
                after = first + len(group) * self.rl.samples
                of_group = seeds[first:after].tolist()
                if self.arena is not None:
                    engine = self._turn_generator(weights, step)
                    part = self._played(self.arena, engine, group, of_group)
                else:
                    part = self._generated(weights, group, of_group, step)
                store.write(start, part)
            parts.append(part)
        return Samples.joined(parts)

    def requests(
        self, step: int, prompts: Sequence[PromptRecord], attempt: int = 0
    ) -> list[Request]:
        """Returns the requests of all samples of ``prompts``, see `__call__`; with an environment
        those of their first turns."""
        seeds = iter(self._seeds(step, prompts, attempt).tolist())
        limit = self._turn_limit
        requests = []
        for prompt in prompts:
            for _ in range(self.rl.samples):
                requests.append(Request(prompt.ids, next(seeds), limit))
        return requests

    @property
    def _turn_limit(self) -> int:
        """Returns the largest number of tokens of a turn."""
        limit = self.rl.max_new_tokens
        if self.arena is not None and self.rl.max_turn_tokens:
            return min(self.rl.max_turn_tokens, limit)
        return limit

    def _turn_generator(self, weights: Any, step: int) -> TurnGenerator:
        """Returns this library's generator as an engine of turns; see `view_weights`."""
        _, count, samples = self.shape
        return TurnGenerator(
            self.model,
            weights,
            self._stops,
            self.mesh,
            self.rl.temperature,
            self._turn_limit,
            step,
            count * samples,
            self.rl.replay_routing,
        )

    def _played(
        self,
        arena: Arena,
        engine: TurnEngine,
        prompts: Sequence[PromptRecord],
        seeds: Sequence[int],
    ) -> Samples:
        """Returns samples of several turns; ``seeds`` has one for each sample."""
        of_rows = [prompt for prompt in prompts for _ in range(self.rl.samples)]
        episodes = play(engine, arena, of_rows, seeds)
        rewards = episode_rewards(self._scorer, episodes)
        if jax.process_count() > 1:
            rewards = multihost_utils.broadcast_one_to_all(rewards)
        shape = (len(episodes), self.rl.max_new_tokens)
        tokens = np.full(shape, NO_TOKEN, np.int32)
        log_probs = np.zeros(shape, np.float32)
        inserted = np.zeros(shape, bool)
        turns = np.zeros((len(episodes), 2), np.int32)
        for row, episode in enumerate(episodes):
            count = len(episode.tokens)
            tokens[row, :count] = episode.tokens
            log_probs[row, :count] = episode.log_probs
            inserted[row, :count] = episode.inserted
            turns[row] = (episode.turns, follows_template(arena, episode))
        return Samples(
            tokens,
            log_probs,
            np.asarray(rewards, np.float64),
            np.array([episode.cut for episode in episodes]),
            np.array([episode.version for episode in episodes], np.int32),
            inserted,
            turns,
            self._padded_routing([episode.routing for episode in episodes]),
        )

    def _padded_routing(
        self, of_rows: Sequence[np.ndarray | None]
    ) -> np.ndarray | None:
        """Returns the routing of `Samples` from that of each row, ``[length, mixtures, top_k]``;
        None if it is not recorded."""
        width = self.longest + self.rl.max_new_tokens
        padded = None
        for row, routing in enumerate(of_rows):
            if routing is None:
                return None
            if padded is None:
                shape = (len(of_rows), width, *routing.shape[1:])
                padded = np.full(shape, -1, routing.dtype)
            padded[row, : len(routing)] = routing
        return padded

    def _seeds(
        self, step: int, prompts: Sequence[PromptRecord], attempt: int
    ) -> np.ndarray:
        """Returns one seed for each sample, uint32 ``[prompts * samples]``."""
        sequence = np.random.SeedSequence((self.seed, step, attempt))
        return sequence.generate_state(len(prompts) * self.rl.samples)

    def _served(
        self,
        servers: ServerPool,
        step: int,
        prompts: Sequence[PromptRecord],
        attempt: int,
    ) -> Samples:
        """Returns the samples of ``prompts`` by servers, see `__call__`."""
        if self.arena is not None:
            seeds = self._seeds(step, prompts, attempt).tolist()
            return self._played(self.arena, servers, prompts, seeds)
        completions = servers.sample(self.requests(step, prompts, attempt))
        shape = (len(completions), self.rl.max_new_tokens)
        tokens = np.full(shape, NO_TOKEN, np.int32)
        log_probs = np.zeros(shape, np.float32)
        for row, completion in enumerate(completions):
            count = len(completion.tokens)
            tokens[row, :count] = completion.tokens
            log_probs[row, :count] = completion.log_probs
        versions = [completion.version for completion in completions]
        version = np.array(versions, np.int32)
        return self._scored(prompts, tokens, log_probs, version)

    def _generated(
        self,
        weights: Any,
        prompts: Sequence[PromptRecord],
        seeds: list[int],
        step: int,
    ) -> Samples:
        """Returns the samples of the prompts of one program, with their rewards.

        Args:
          weights: from `view_weights`.
          prompts: at most the number of prompts of a program, ``shape[0]``.
          seeds: of each sample, ``[prompts * samples]``.
          step: of training, at which the adapter is.
        """
        # Rows of the program, and samples of each: a prompt may be repeated over several rows.
        _, count, samples = self.shape
        parts = [
            prompt.ids for prompt in prompts for _ in range(self.rl.samples // samples)
        ]
        # The additional row has the longest prompt's length, so that all calls share one program.
        padded = padded_rows([*parts, [0] * self.longest], count + 1)
        rows = {name: value[:count] for name, value in padded.items()}
        # Unused rows of an incomplete group: one token, not live.
        rows["lengths"][len(parts) :] = 1
        rows["live"] = np.arange(count) < len(parts)
        sampling = make_sampling(
            count * samples, temperature=self.rl.temperature, seeds=seeds
        )
        placed = place_batch({**rows, "sampling": sampling}, self.mesh)
        results = sample_groups(
            self.model,
            weights,
            Prompts(**placed, stop_ids=self._stops),
            samples=samples,
            limit=self.rl.max_new_tokens,
            records=self.rl.replay_routing,
        ).fetched()
        drawn = len(prompts) * self.rl.samples
        tokens = results.tokens[:drawn]
        routing = []
        for row, length in enumerate((tokens != NO_TOKEN).sum(1)):
            prompt = prompts[row // self.rl.samples]
            routing.append(results.routing(row, len(prompt.ids), int(length)))
        version = np.full(drawn, step, np.int32)
        return self._scored(
            prompts,
            tokens,
            results.log_probs[:drawn],
            version,
            self._padded_routing(routing),
        )

    def _scored(
        self,
        prompts: Sequence[PromptRecord],
        tokens: np.ndarray,
        log_probs: np.ndarray,
        version: np.ndarray,
        routing: np.ndarray | None = None,
    ) -> Samples:
        """Decodes samples ``[prompts * samples, limit]`` and adds their rewards; see `Samples`."""
        texts = [self.tokenizer.decode(row[row != NO_TOKEN].tolist()) for row in tokens]
        of_rows = [prompt for prompt in prompts for _ in range(self.rl.samples)]
        rewards = self._scorer(
            [p.text for p in of_rows],
            texts,
            [p.record for p in of_rows],
            [p.where for p in of_rows],
        )
        if jax.process_count() > 1:
            # A reward may be random or depend on the time: all processes use the first one's.
            rewards = multihost_utils.broadcast_one_to_all(rewards)
        # The limit is reached, and its token is no stop token.
        cut = (tokens[:, -1] != NO_TOKEN) & ~np.isin(tokens[:, -1], self._stops)
        rewards = np.asarray(rewards, np.float64)
        return Samples.of_one_turn(tokens, log_probs, rewards, cut, version, routing)


class _Store:
    """Complete groups of the current rollout; one process reads and writes them."""

    def __init__(
        self, folder: Path | None, name: str, lora: Any, arrays: set[str]
    ) -> None:
        """Reads the file of the rollout, or removes the files of earlier steps if there is none.

        Args:
          folder: the run's folder of rollouts; None: nothing is stored, as with several processes.
          name: ``<step>-<attempt>``.
          lora: the adapter, whose digest is part of the file's name.
          arrays: names of the arrays of complete samples.
        """
        self._arrays = arrays
        self._path: Path | None = None
        self._parts: dict[str, np.ndarray] = {}
        if folder is None or jax.process_count() > 1:
            return
        digest = hashlib.sha256()
        for path, leaf in trees.flatten(lora).items():
            digest.update(path.encode() + np.asarray(leaf).tobytes())
        self._path = folder / f"{name}-{digest.hexdigest()[:16]}.npz"
        self._parts = _read_stored(self._path)
        if not self._parts and name.endswith("-0"):
            # A new step: remove the files of earlier ones.
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, start: int) -> Samples | None:
        """Returns the samples of the prompts starting at ``start``, if they are stored."""
        arrays = {}
        for name in self._arrays:
            if f"{start}-{name}" not in self._parts:
                return None
            arrays[name] = self._parts[f"{start}-{name}"]
        return Samples(**arrays)

    def write(self, start: int, part: Samples) -> None:
        """Adds samples to the file."""
        if self._path is None:
            return
        for name, array in part.arrays.items():
            self._parts[f"{start}-{name}"] = array
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **self._parts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._path, buffer.getvalue())


def _read_stored(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file; none if it is absent or damaged, so that they are sampled
    again."""
    if not path.exists():
        return {}
    try:
        return dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    except Exception:
        # zipfile, zlib, ast and NumPy raise many types for damaged content.
        log.warning("%s cannot be read: its groups are sampled again", path)
        return {}


def sample_batch(
    prompts: Sequence[Sequence[int]],
    samples: Samples,
    length: int,
    *,
    masks_cut: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the arrays ``[rows, ...]`` that `nalora_jax.kinds.rl.policy` reads, except for the
    advantages; each row is one sample.

    With the samples' routing there is an array ``replayed [rows, length, mixtures, top_k]``.

    Args:
      prompts: token ids of each row's prompt.
      samples: of the rows.
      length: positions of a row, at least those of the longest prompt and sample.
      masks_cut: leave samples that the limit cut out of the loss.
    """
    rows = len(prompts)
    # One position more: inputs are all but the last token, targets all but the first.
    ids = np.zeros((rows, length + 1), np.int32)
    sampled = np.zeros((rows, length + 1), np.float32)
    mask = np.zeros_like(sampled)
    segments = np.zeros_like(ids)
    lengths = samples.lengths
    for row, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
        new = slice(len(prompt), len(prompt) + count)
        ids[row, : len(prompt)] = prompt
        ids[row, new] = samples.tokens[row, :count]
        sampled[row, new] = samples.log_probs[row, :count]
        # Messages of an environment are read, and not trained on.
        is_written = ~samples.inserted[row, :count]
        mask[row, new] = is_written & (not (masks_cut and samples.cut[row]))
        segments[row, : new.stop] = 1
    routed = {}
    if samples.routing is not None:
        width = samples.routing.shape[1]
        padding = ((0, 0), (0, max(length - width, 0)), (0, 0), (0, 0))
        padded = np.pad(samples.routing, padding, constant_values=-1)
        routed["replayed"] = padded[:, :length]
    return routed | {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        # 0 at padding.
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        * segments[:, :-1],
        "segment_ids": segments[:, :-1],
        "loss_weights": mask[:, 1:],
        "sampled": sampled[:, 1:],
        "real": np.ones(rows, np.float32),
    }
