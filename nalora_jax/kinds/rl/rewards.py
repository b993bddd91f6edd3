"""Rewards of completions: built in, registered by name, or any function of a module.

    @register_reward("short")
    def short(prompt, completion, record):
        return -len(completion) / 100

``--rl.rewards number short my_package.rewards:judge`` adds three; ``--rl.reward-weights`` weighs
them. A reward is a function ``(prompt, completion, record) -> float``: the texts of the prompt and
of the sample, and the record of the data set, in which ``answer`` is the reference completion
unless the record has a field of that name. A function with a further parameter ``messages`` gets
the whole conversation; ``completion`` is the last turn of a sample of several turns.
``model:FOLDER`` is a trained reward model (`nalora_jax.kinds.rl.reward_models`).
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from nalora_jax.common.registry import Registry, parse_instance
from nalora_jax.config import RLConfig
from nalora_jax.errors import NaloraError, describe_error
from nalora_jax.evaluate.answers import last_number, matches, normalize_text

if TYPE_CHECKING:
    from nalora_jax.kinds.rl.reward_models import ModelReward

RewardRecord = Mapping[str, Any]
# (prompt, completion, record), and messages=... if it has that parameter.
Reward = Callable[..., float]
_Rule = TypeVar("_Rule", bound=Callable[..., Any])

MODEL_REWARD = "model"  # name of rewards by trained reward models
_REWARDS: Registry[Any] = Registry("reward", "nalora_jax.rewards", "--rl.rewards")


def register_reward(name: str) -> Callable[[_Rule], _Rule]:
    """Returns a decorator that registers a reward under ``name``.

    It decorates a function ``(prompt, completion, record) -> float``, or a dataclass whose
    instances are such functions: ``name:field=value`` sets its fields.
    """
    return _REWARDS.decorator(name)


@register_reward("exact")
def exact_reward(prompt: str, completion: str, record: RewardRecord) -> float:
    """Returns 1 if the completion is the answer, apart from case, punctuation, articles and white
    space."""
    return float(matches(completion, str(record["answer"]), normalize_text))


@register_reward("number")
def number_reward(prompt: str, completion: str, record: RewardRecord) -> float:
    """Returns 1 if the last number of the completion is the last number of the answer."""
    return float(matches(completion, str(record["answer"]), last_number))


@register_reward("choice")
def choice_reward(prompt: str, completion: str, record: RewardRecord) -> float:
    """Returns 1 if the completion names the right choice: by its letter, or by its text.

    Of several letters or texts of choices that stand alone, the first counts; "A" before a word in
    lower case is an article. The right choice is ``record["gold"]``, an index of
    ``record["choices"]``, else the letter in ``record["answer"]``.
    """
    texts = [str(text) for text in record.get("choices", ())]
    letters = [chr(ord("A") + index) for index in range(len(texts) or 26)]
    if texts:
        gold = letters[record["gold"]]
    else:
        gold = str(record["answer"]).strip().upper()[:1]
    # Regular expression -> letter of the choice.
    named = {"A(?! [a-z])" if letter == "A" else letter: letter for letter in letters}
    named |= {
        re.escape(text): letter for letter, text in zip(letters, texts, strict=False)
    }
    places = []
    for text, letter in named.items():
        match = re.search(rf"(?<!\w){text}(?!\w)", completion)
        if match is not None:
            # The earliest match, and of those at one place the longest.
            places.append((match.start(), -len(match.group()), letter))
    if not places:
        return 0.0
    return float(min(places)[2] == gold)


@register_reward("regex")
@dataclass(frozen=True)
class Regex:
    """Reward of completions that match a pattern."""

    pattern: str = ""

    def __call__(self, prompt: str, completion: str, record: RewardRecord) -> float:
        """Returns 1 if the pattern occurs in the completion."""
        return float(re.search(self.pattern, completion, re.DOTALL) is not None)


@register_reward("format")
@dataclass(frozen=True)
class ThoughtFormat:
    """Reward of completions with thoughts in tags."""

    tag: str = "think"

    def __call__(self, prompt: str, completion: str, record: RewardRecord) -> float:
        """Returns 1 if the completion is one block of thoughts in tags, then an answer."""
        opening = f"<{self.tag}>"
        closing = f"</{self.tag}>"
        thought, _, answer = completion.strip().removeprefix(opening).partition(closing)
        once = completion.count(opening) == completion.count(closing) == 1
        return float(
            once
            and completion.strip().startswith(opening)
            and bool(thought.strip() and answer.strip())
        )


@register_reward("length")
@dataclass(frozen=True)
class Length:
    """Penalty of long completions, "soft overlong punishment" of arXiv 2503.14476 over
    characters."""

    limit: int = 400

    def __call__(self, prompt: str, completion: str, record: RewardRecord) -> float:
        """Returns 0 up to the limit of characters, then falls linearly to -1 at twice the limit."""
        return -min(max(len(completion) / self.limit - 1.0, 0.0), 1.0)


@register_reward("reasoning_gym")
def reasoning_gym_reward(prompt: str, completion: str, record: RewardRecord) -> float:
    """Returns the score of reasoning-gym, for records of ``--data.dataset reasoning_gym:TASK``."""
    tasks = importlib.import_module("nalora_jax.data.reasoning_gym_tasks")
    score: float = tasks.score_completion(record, completion)
    return score


def make_reward(text: str) -> Reward | ModelReward:
    """Returns the reward called ``NAME``, ``NAME:setting=value,...``, ``MODULE:FUNCTION`` or
    ``model:FOLDER``.

    Raises:
      NaloraError: an unknown name or setting, a module or function that cannot be imported, or a
        folder without an adapter.
    """
    name, _, rest = text.partition(":")
    if name == MODEL_REWARD:
        # It loads models, which other rewards do not need.
        reward_models = importlib.import_module("nalora_jax.kinds.rl.reward_models")
        model: ModelReward = reward_models.ModelReward(rest)
        model.check()
        return model
    # MODULE:FUNCTION, since built-in rewards have settings (with "=") after the colon.
    if name not in _REWARDS and rest and "=" not in rest:
        try:
            reward: Reward = getattr(importlib.import_module(name), rest)
        # Importing runs the user's code, which may raise anything or call sys.exit.
        except (Exception, SystemExit) as error:
            expected = "MODULE:FUNCTION that can be imported"
            raise NaloraError(
                f"--rl.rewards {text}", expected=expected, found=describe_error(error)
            ) from error
        return reward
    kind = _REWARDS.get(name)
    reward = parse_instance(_REWARDS, text) if isinstance(kind, type) else kind
    return reward


class Scorer:
    """Computes the rewards of samples.

    A call of a reward is interrupted after ``rl.reward_seconds`` in the main thread of a process on
    systems with interval timers; code that never returns to Python is not.

    Raises:
      NaloraError: see `make_reward`.
    """

    def __init__(self, rl: RLConfig) -> None:
        self._rl = rl
        self._rewards: list[Any] = [make_reward(name) for name in rl.rewards]
        self._read_messages = [_reads_messages(reward) for reward in self._rewards]
        self._models = [name.startswith(f"{MODEL_REWARD}:") for name in rl.rewards]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        records: Sequence[RewardRecord],
        where: Sequence[str],
        messages: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> np.ndarray:
        """Returns float64 ``[samples, rewards]``; NaN for a reward that failed.

        Args:
          prompts: text of each sample's prompt.
          completions: text of each sample.
          records: of the data set, of each sample.
          where: name of each record in errors.
          messages: of each sample; None: prompt and completion are two messages.

        Raises:
          NaloraError: a reward raises, takes too long or returns no finite number.
        """
        rl = self._rl
        expected = "a finite number"
        if rl.reward_seconds:
            expected += f" within {rl.reward_seconds:g} s"
        values = np.full((len(completions), len(rl.rewards)), np.nan)
        for row, sample in enumerate(zip(prompts, completions, records, strict=True)):
            for column, (name, reward) in enumerate(
                zip(rl.rewards, self._rewards, strict=True)
            ):
                if self._models[column]:
                    continue
                options: dict[str, Any] = {}
                if self._read_messages[column]:
                    options["messages"] = _two_messages(*sample[:2])
                    if messages is not None:
                        options["messages"] = [dict(each) for each in messages[row]]
                try:
                    values[row, column] = self._value(reward, *sample, **options)
                except Exception as error:
                    if rl.ignore_reward_errors:
                        continue
                    raise NaloraError(
                        f"reward {name} of {where[row]}",
                        expected=expected,
                        found=f"{describe_error(error)} for the completion {sample[1][:80]!r}",
                        remedy="mend the reward, or pass --rl.ignore-reward-errors: such samples "
                        "have no reward",
                    ) from error
        for column, reward in enumerate(self._rewards):
            if self._models[column]:
                values[:, column] = reward.score_samples(
                    prompts, completions, records, where, messages
                )
        return values

    def _value(
        self,
        reward: Reward,
        prompt: str,
        completion: str,
        record: RewardRecord,
        **options: Any,
    ) -> float:
        """Returns a sample's reward within the time limit.

        Raises:
          ValueError: it is not finite; and any exception of the reward.
        """
        with time_limit(self._rl.reward_seconds):
            value = float(reward(prompt, completion, record, **options))
        if not math.isfinite(value):
            raise ValueError(f"the value {value}")
        return value


def _reads_messages(reward: Reward) -> bool:
    """Returns True if a reward has a parameter ``messages``."""
    try:
        return "messages" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _two_messages(prompt: str, completion: str) -> list[dict[str, Any]]:
    """Returns the messages of a sample of one turn."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after ``seconds``; never with 0, or outside of the main
    thread, where Python handles no signals."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"no value after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
