"""Samples of several turns: the model and an environment take turns until a reward or a limit.

A sample is one row of tokens after its prompt. The model's turns are the tokens that the engine
drew, with their log-probabilities; the environment's messages between them are inserted as the chat
template writes them, and marked, because they are not trained on:

    [written ... stop] [inserted ...] [written ... stop]
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from nalora_jax.config import RLConfig
from nalora_jax.data.chat_text import Message
from nalora_jax.data.chat_turns import CallForm
from nalora_jax.data.prompts import PromptRecord
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl.engine import DrawnCompletion, Request
from nalora_jax.kinds.rl.environments import Arena, Environment, Opening
from nalora_jax.kinds.rl.rewards import Scorer
from nalora_jax.mesh.processes import run_on_first_process

log = logging.getLogger(__name__)

_LOGGED_EVERY = 60.0  # seconds between two lines on the progress of a rollout


class RolloutProgress:
    """Logs how far a long rollout is, at most once a minute."""

    def __init__(self) -> None:
        self._logged = time.monotonic()

    def __call__(self, noun: str, done: int, total: int) -> None:
        """Logs ``done`` of ``total``, if the last line is a minute ago."""
        now = time.monotonic()
        if now - self._logged >= _LOGGED_EVERY:
            self._logged = now
            log.info("rollout: %d of %d %s are done", done, total, noun)


class TurnEngine(Protocol):
    """Draws turns: an `nalora_jax.kinds.rl.engine.Engine` whose adapter is loaded."""

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        """Returns a completion of each request."""


@dataclass(eq=False)
class Episode:
    """A sample in progress."""

    prompt: PromptRecord
    seed: int
    opening: Opening
    form: CallForm | None  # of calls; None without tools
    environment: Environment | None  # only in the first process
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)  # after the prompt
    log_probs: list[float] = field(default_factory=list)  # 0 for inserted tokens
    inserted: list[bool] = field(default_factory=list)
    turns: int = 0  # of the model
    reward: float | None = None  # None until the sample ends
    cut: bool = False  # True if a limit ended it
    version: int | None = None  # the oldest adapter that wrote a turn
    # experts of the tokens of prompt and sample, see `DrawnCompletion`
    routing: np.ndarray | None = None

    def request(self, rl: RLConfig) -> Request:
        """Returns the request of the next turn; its seed differs by turn."""
        seed = self.seed
        if self.turns:
            sequence = np.random.SeedSequence((self.seed, self.turns))
            seed = int(sequence.generate_state(1)[0])
        left = rl.max_new_tokens - len(self.tokens)
        limit = min(rl.max_turn_tokens or left, left)
        return Request([*self.prompt.ids, *self.tokens], seed, limit)

    def add_turn(self, drawn: DrawnCompletion, tokenizer: Tokenizer) -> None:
        """Adds a turn of the model; one without a stop token ends the sample."""
        ids = [int(token) for token in drawn.tokens]
        self.tokens += ids
        self.log_probs += [float(value) for value in drawn.log_probs]
        self.inserted += [False] * len(ids)
        self.turns += 1
        if self.version is None or drawn.version < self.version:
            self.version = drawn.version
        if self.routing is None:
            self.routing = drawn.routing
        elif drawn.routing is not None:
            # Tokens of earlier turns keep the experts with which they were written.
            later = drawn.routing[len(self.routing) :]
            self.routing = np.concatenate([self.routing, later])
        self.cut = not ids or ids[-1] not in tokenizer.eos_ids
        message: Message = {"role": "assistant", "content": tokenizer.decode(ids)}
        if self.form is not None:
            raw = ids if self.cut else ids[:-1]
            text = tokenizer.decode(raw, skip_special=False)
            content, calls = self.form.parse(text)
            if calls:
                message = {
                    "role": "assistant",
                    "content": content,
                    "tool_calls": calls,
                }
        self.messages.append(message)

    def add_messages(
        self, messages: Sequence[Message], arena: Arena, limit: int
    ) -> None:
        """Adds messages of the environment; the sample is cut if they leave no room for a turn."""
        ids = arena.insert(self.messages, messages, self.opening.tools)
        if len(self.tokens) + len(ids) >= limit:
            self.end()
            return
        self.messages += messages
        self.tokens += ids
        self.log_probs += [0.0] * len(ids)
        self.inserted += [True] * len(ids)

    def end(self) -> None:
        """Ends the sample at a limit, without a reward of the environment."""
        self.cut = True
        self.reward = 0.0


def play(
    engine: TurnEngine,
    arena: Arena,
    prompts: Sequence[PromptRecord],
    seeds: Sequence[int],
) -> list[Episode]:
    """Plays the episodes of prompts to their ends.

    All turns of a round are drawn together. In a run of several processes the environments are in
    the first one.

    Args:
      engine: draws the turns.
      arena: the environments.
      prompts: one of each sample.
      seeds: one of each sample.

    Raises:
      NaloraError: an environment fails, or ``start`` returns other messages than before.
    """
    rl = arena.rl
    episodes = _begin(arena, prompts, seeds)
    active = episodes
    progress = RolloutProgress()
    while active:
        progress("samples", len(episodes) - len(active), len(episodes))
        drawn = engine.sample([episode.request(rl) for episode in active])
        for episode, completion in zip(active, drawn, strict=True):
            episode.add_turn(completion, arena.tokenizer)
        outcomes = _in_all_processes(lambda: _outcomes(arena, active))  # noqa: B023
        for episode, outcome in zip(active, outcomes, strict=True):
            if not isinstance(outcome, list):
                episode.reward = float(outcome)
            elif episode.cut or episode.turns >= rl.max_turns:
                episode.end()
            else:
                episode.add_messages(outcome, arena, rl.max_new_tokens)
        active = [episode for episode in active if episode.reward is None]
    return episodes


def _begin(
    arena: Arena, prompts: Sequence[PromptRecord], seeds: Sequence[int]
) -> list[Episode]:
    """Returns the episodes before their first turns; samples of a prompt are next to each
    other."""
    episodes: list[Episode] = []
    first_process = jax.process_index() == 0
    pairs = list(zip(prompts, seeds, strict=True))
    for _, group in groupby(pairs, key=lambda pair: id(pair[0])):
        opening: Opening | None = None
        form = None
        for prompt, seed in group:
            environment = None
            if first_process or opening is None:
                environment, begun = arena.begin(prompt.record, prompt.where)
                if opening is None:
                    _require_prompt(arena, prompt, begun)
                    form = arena.form(begun) if begun.tools else None
                    opening = begun
                elif begun != opening:
                    raise _refusal_of_start(prompt, begun)
            messages = [dict(message) for message in opening.messages]
            episode = Episode(prompt, seed, opening, form, environment, messages)
            episodes.append(episode)
    return episodes


def _require_prompt(arena: Arena, prompt: PromptRecord, opening: Opening) -> None:
    """Checks that an environment starts with the prompt that was tokenized when the run began."""
    ids = arena.tokenizer.encode(arena.render(opening), special=False)
    if list(prompt.ids) != ids:
        raise _refusal_of_start(prompt, opening)


def _refusal_of_start(prompt: PromptRecord, opening: Opening) -> NaloraError:
    """Returns the error of an environment that starts with other messages than before."""
    return NaloraError(
        f"environment, start of {prompt.where}",
        expected="the same messages for a record each time",
        found=str(opening.messages[-1]["content"])[:80],
        remedy="draw random values in `step`, or from a seed in the record",
    )


def _outcomes(arena: Arena, episodes: Sequence[Episode]) -> list[list[Message] | float]:
    """Returns the environment's messages or its reward for each episode."""
    outcomes = []
    for episode in episodes:
        environment = episode.environment
        assert environment is not None
        where = episode.prompt.where
        outcomes.append(arena.step(environment, episode.messages, where))
    return outcomes


def _in_all_processes(action: Callable[[], list[Any]]) -> list[Any]:
    """Returns the list of JSON values that ``action`` returns in the first process."""
    values = run_on_first_process(action)
    if jax.process_count() == 1:
        assert values is not None
        return values
    content = np.frombuffer(json.dumps(values).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
    padded = np.zeros(int(size), np.uint8)
    if values is not None:
        padded = content
    shared = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    received: list[Any] = json.loads(shared.tobytes())
    return received


def episode_rewards(scorer: Scorer, episodes: Sequence[Episode]) -> np.ndarray:
    """Returns the rewards of environment and scorer, float64 ``[samples, rewards]``.

    A reward is given the prompt, the last turn as the completion, and all messages.
    """
    of_environment = [episode.reward for episode in episodes]
    values = scorer(
        [episode.prompt.text for episode in episodes],
        [str(episode.messages[-1]["content"]) for episode in episodes],
        [episode.prompt.record for episode in episodes],
        [episode.prompt.where for episode in episodes],
        [episode.messages for episode in episodes],
    )
    return np.column_stack([np.array(of_environment, np.float64), values])


# ---------------------------------------------------------------- parts of a sample


def segments(
    tokens: Sequence[int], inserted: Sequence[bool]
) -> Iterator[tuple[bool, list[int]]]:
    """Yields the parts of a sample: whether the environment's text was inserted, and its tokens."""
    pairs = zip(tokens, inserted, strict=True)
    for is_inserted, part in groupby(pairs, key=lambda pair: bool(pair[1])):
        yield is_inserted, [token for token, _ in part]


def follows_template(arena: Arena, episode: Episode) -> bool:
    """Returns True if the chat template renders the messages before the last turn as the sample's
    tokens.

    It differs if the model wrote a text by other tokens than the tokenizer, if a turn ended by
    another stop token than the template's, or if the template removes thoughts or white space.
    """
    before = Opening(episode.messages[:-1], episode.opening.tools)
    ids = arena.tokenizer.encode(arena.render(before), special=False)
    places = np.flatnonzero(episode.inserted)
    end = 0  # of the last inserted token
    if len(places):
        end = int(places[-1]) + 1
    return [*episode.prompt.ids, *episode.tokens[:end]] == ids
