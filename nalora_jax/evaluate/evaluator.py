"""The interface of evaluators: records by example, their summary, and paired comparison of two
models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.statistics import compare, difference_of_means

SAMPLES = 4  # examples that are shown with generated completions
SAMPLE_TOKENS = 96  # length limit of a sample completion

ItemRecord = Mapping[str, Any]


def variables_of(params: Any, lora: Any | None) -> dict[str, Any]:
    """Returns a model's variables; without adapters if ``lora`` is None."""
    if lora is None:
        return {"params": params}
    return {"params": params, "lora": lora}


class Answer(Protocol):
    """A completion of a prompt."""

    @property
    def text(self) -> str:
        """The completion's text."""

    @property
    def reason(self) -> str:
        """Why it ended: "stop", or "length" if it was cut."""


# Completes prompts of token ids, with the images of each if there are any, given a model's
# variables.
Answers = Callable[
    [Mapping[str, Any], Sequence[Sequence[int]], Sequence[Any] | None], Sequence[Answer]
]
# Makes it for a decoder, given the tokenizer, and the mesh of the weights if they are sharded.
Answering = Callable[[Any, Any, Mesh | None], Answers]


class Evaluator:
    """Evaluates one model with different adapters on the same examples; compiles once.

    A subclass defines `records` and `summary`, and `samples` if a report shows some of its
    examples.

    Attributes:
      metric: name of the headline metric, a field of the summary.
      mode: "max" if a larger value of it is better, "min" if a smaller one is.
    """

    metric: Literal["accuracy", "recall", "reward", "loss"]
    mode: Literal["max", "min"]

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns one record of JSON values per example, in order (``lora`` None: the base
        alone)."""
        raise NotImplementedError

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns metrics of `records`: the headline metric, ``low`` and ``high`` (95%), ``loss``,
        ``n``."""
        raise NotImplementedError

    def samples(
        self, params: Any, lora: Any | None, records: Sequence[ItemRecord]
    ) -> dict[str, Any]:
        """Returns ``samples``, a few examples with the model's answers, and what else a report
        shows."""
        raise NotImplementedError

    def measure(
        self, params: Any, lora: Any | None, *, samples: bool = False
    ) -> dict[str, Any]:
        """Returns the summary of ``params`` with adapter ``lora``, with ``samples`` also
        `samples`."""
        records = self.records(params, lora)
        values = self.summary(records)
        if samples:
            values |= self.samples(params, lora, records)
        return values


def describe(values: Mapping[str, Any]) -> str:
    """Returns one line for the log.

    Example:
      >>> describe({"accuracy": 0.51, "low": 0.46, "high": 0.56, "loss": 3.6, "n": 400})
      'held-out accuracy 0.510 (95% interval 0.460 to 0.560, n 400), loss 3.600'
    """
    interval = (
        f"95% interval {values['low']:.3f} to {values['high']:.3f}, n {values['n']}"
    )
    if "recall" in values:
        ways = ", ".join(
            f"{name.replace('_', ' ')} {values[name]:.3f}"
            for name in values
            if "_recall_" in name
        )
        return f"held-out recall at 1 {values['recall']:.3f} ({interval}), {ways}"
    if "rewards_margin" in values:
        rewards = f"reward margin {values['rewards_margin']:+.3f}, preferred {values['rewards_accuracy']:.1%}"
        return f"held-out preference loss {values['loss']:.4f} ({interval}), {rewards}"
    if "reward" in values:
        each = [
            f"{name.removeprefix('reward_')} {values[name]:.3f}"
            for name in values
            if name.startswith("reward_")
        ]
        more = f": {', '.join(each)}" if len(each) > 1 else ""
        return f"held-out reward {values['reward']:.3f} ({interval}){more}"
    if "accuracy" in values:
        return f"held-out accuracy {values['accuracy']:.3f} ({interval}), loss {values['loss']:.3f}"
    return f"held-out loss {values['loss']:.3f} ({interval})"


def compare_records(
    other: Sequence[ItemRecord], model: Sequence[ItemRecord]
) -> dict[str, Any]:
    """Compares two models on the same items in the same order: ``model`` minus ``other``.

    Returns:
      ``loss``, if the records have it: difference per completion token with its paired bootstrap
        interval ``low`` and ``high``.
      ``accuracy``, if the records have ``correct``: the fields of
        `nalora_jax.evaluate.statistics.compare`, which include McNemar's test.

    Raises:
      NaloraError: the two have other items.
    """
    if [record.get("prompt") for record in other] != [
        record.get("prompt") for record in model
    ]:
        remedy = "models whose tokenizers or chat templates differ read other prompts: give --no-chat"
        raise NaloraError(
            "--against",
            expected="answers to the same questions",
            found="other ones",
            remedy=remedy,
        )
    differences: dict[str, Any] = {}
    if "loss" in model[0]:
        before, after = (
            [
                np.array([record[name] for record in each], np.float64)
                for name in ("loss", "tokens")
            ]
            for each in (other, model)
        )
        differences["loss"] = difference_of_means(*before, *after)
    if "correct" in model[0]:
        right = ([record["correct"] for record in each] for each in (other, model))
        differences["accuracy"] = compare(*right)
    return differences


def describe_comparison(values: Mapping[str, Any]) -> str:
    """Returns one line with the result of `compare_records`.

    Example:
      accuracy +0.080 (95% interval 0.028 to 0.133; 55 gained, 23 lost, McNemar p = 0.0004), loss
      -2.52 (-2.61 to -2.43)
    """
    parts = []
    if "accuracy" in values:
        parts.append(f"accuracy {describe_paired(values['accuracy'])}")
    loss = values["loss"]
    parts.append(
        f"loss {loss['difference']:+.4f} ({loss['low']:+.4f} to {loss['high']:+.4f})"
    )
    return ", ".join(parts)


def describe_paired(values: Mapping[str, Any]) -> str:
    """Returns a difference of shares with its interval and test; values as of `compare`."""
    counts = f"{values['gained']} gained, {values['lost']} lost, McNemar p = {values['p_value']:.2g}"
    return f"{values['difference']:+.3f} (95% interval {values['low']:+.3f} to {values['high']:+.3f}; {counts})"
