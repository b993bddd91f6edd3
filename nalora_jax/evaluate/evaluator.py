"""The interface of evaluators: records by example, their summary, and paired comparison of two
models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.intervals import compare, difference_of_means
from nalora_jax.method.tuned import join_tuned

SAMPLES = 4  # examples that are shown with generated completions
SAMPLE_TOKENS = 96  # length limit of a sample completion

# Metrics of heads that a line of the log states after the headline metric.
FURTHER_METRICS = ("f1", "average_precision", "ndcg", "pearson", "spearman", "margin")

ItemRecord = Mapping[str, Any]


def variables_of(params: Any, lora: Any | None) -> dict[str, Any]:
    """Returns a model's variables; without adapters if ``lora`` is None."""
    if lora is None:
        return {"params": params}
    weights, adapters = join_tuned(params, lora)
    return {"params": weights, "lora": adapters}


def sample_records(
    prompts: Iterable[str], answers: Iterable[str], references: Iterable[str]
) -> dict[str, Any]:
    """Returns ``samples``, prompts with their completions and the reference completions, for
    display."""
    samples = []
    for prompt, answer, reference in zip(prompts, answers, references, strict=True):
        samples.append(
            {
                "prompt": prompt,
                "answer": answer.strip(),
                "expected": reference.strip(),
            }
        )
    return {"samples": samples}


class Answer(Protocol):
    """A completion of a prompt."""

    @property
    def text(self) -> str:
        """Returns the completion's text."""

    @property
    def reason(self) -> str:
        """Returns why it ended: "stop", or "length" if it was cut."""


# Completes prompts of token ids, with the images of each if there are any, given a model's
# variables.
Answers = Callable[
    [
        Mapping[str, Any],
        Sequence[Sequence[int]],
        Sequence[Any] | None,
    ],
    Sequence[Answer],
]
# Returns `Answers` of a decoder, given the tokenizer, and the mesh of the weights if they are
# sharded.
Answering = Callable[[Any, Any, Mesh | None], Answers]


class Evaluator:
    """Evaluates one model with different adapters on the same examples; compiles once.

    A subclass defines `records`, `summary` and `samples`.

    Attributes:
      metric: name of the headline metric, a field of the summary.
      mode: "max" if a larger value of it is better, "min" if a smaller one is.
    """

    metric: Literal["accuracy", "recall", "reward", "spearman_cosine", "loss"]
    mode: Literal["max", "min"]

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns one record of JSON values per example, in order.

        If ``lora`` is None, the base is evaluated without adapters.
        """
        raise NotImplementedError

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the metrics of all examples, given their `records`.

        They are the headline metric (a field named as `metric`), the ends ``low`` and ``high`` of
        its 95% interval, ``loss``, and ``n``, the number of examples.
        """
        raise NotImplementedError

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns values for the report: ``samples``, a few examples with the model's answers.

        A subclass may add other values.
        """
        raise NotImplementedError

    def measure(
        self,
        params: Any,
        lora: Any | None,
        *,
        samples: bool = False,
    ) -> dict[str, Any]:
        """Returns the summary of the model ``params`` with the adapter ``lora``.

        If ``samples`` is true, the fields of `Evaluator.samples` are added.
        """
        records = self.records(params, lora)
        values = self.summary(records)
        if samples:
            values |= self.samples(params, lora, records)
        return values


def describe(values: Mapping[str, Any]) -> str:
    """Returns one line for the log: the headline metric of a summary, its interval and the loss.

    ``values`` are of `Evaluator.summary`; its fields tell which kind of evaluator it is of.

    Example:
      >>> describe({"accuracy": 0.51, "low": 0.46, "high": 0.56, "loss": 3.6, "n": 400})
      'held-out accuracy 0.510 (95% interval 0.460 to 0.560, n 400), loss 3.600'
    """
    ends = f"{values['low']:.3f} to {values['high']:.3f}"
    interval = f"95% interval {ends}, n {values['n']}"
    further = ""
    for name in FURTHER_METRICS:
        if name in values:
            further += f", {name.replace('_', ' ')} {values[name]:.3f}"
    if "recall" in values:
        text = f"held-out recall at 1 {values['recall']:.3f} ({interval})"
        for name, value in values.items():
            if "_recall_" in name:
                text += f", {name.replace('_', ' ')} {value:.3f}"
        return text + further
    if "spearman_cosine" in values:
        correlation = f"{values['spearman_cosine']:.3f} ({interval})"
        return f"held-out Spearman correlation {correlation}{further}"
    if "rewards_margin" in values:
        text = f"held-out preference loss {values['loss']:.4f} ({interval})"
        text += f", reward margin {values['rewards_margin']:+.3f}"
        return f"{text}, preferred {values['rewards_accuracy']:.1%}"
    if "reward" in values:
        text = f"held-out reward {values['reward']:.3f} ({interval})"
        rewards = []
        for name, value in values.items():
            if name.startswith("reward_"):
                rewards.append(f"{name.removeprefix('reward_')} {value:.3f}")
        if len(rewards) > 1:
            text += f": {', '.join(rewards)}"
        for name, value in values.items():
            if name.startswith("pass_"):
                text += f", pass@{name.removeprefix('pass_')} {value:.3f}"
        return text
    if "agreement" in values:
        text = f"held-out divergence {values['loss']:.4f} ({interval})"
        return f"{text}, the same likeliest token {values['agreement']:.1%}"
    loss = f"loss {values['loss']:.3f}"
    if "accuracy" in values:
        accuracy = f"held-out accuracy {values['accuracy']:.3f} ({interval})"
        return f"{accuracy}{further}, {loss}"
    return f"held-out {loss} ({interval}){further}"


def compare_records(
    other: Sequence[ItemRecord], model: Sequence[ItemRecord]
) -> dict[str, Any]:
    """Compares two models on the same items in the same order: ``model`` minus ``other``.

    Returns:
      ``loss``, if the records have it: difference per completion token with its paired bootstrap
        interval ``low`` and ``high``.
      ``accuracy``, if the records have ``correct``: the fields of
        `nalora_jax.evaluate.intervals.compare`, which include McNemar's test.

    Raises:
      NaloraError: the two have other items.
    """
    if _values(other, "prompt") != _values(model, "prompt"):
        raise NaloraError(
            "--against",
            expected="answers to the same questions",
            found="other ones",
            remedy="models whose tokenizers or chat templates differ read other prompts: "
            "give --no-chat",
        )
    differences: dict[str, Any] = {}
    if "loss" in model[0]:
        units = []  # four arrays [items]: loss and tokens of the other model, then of the model
        for records in (other, model):
            for name in ("loss", "tokens"):
                units.append(np.array(_values(records, name), np.float64))
        differences["loss"] = difference_of_means(*units)
    if "correct" in model[0]:
        was_right = _values(other, "correct")
        is_right = _values(model, "correct")
        differences["accuracy"] = compare(was_right, is_right)
    return differences


def _values(records: Sequence[ItemRecord], name: str) -> list[Any]:
    return [record.get(name) for record in records]


def describe_comparison(values: Mapping[str, Any]) -> str:
    """Returns one line with the result of `compare_records`.

    The loss is in nats per completion token, with its 95% interval.

    Example:
      accuracy +0.080 (95% interval +0.028 to +0.133; 55 gained, 23 lost, McNemar p = 0.0004), loss
      -2.5200 (-2.6100 to -2.4300)
    """
    parts = []
    if "accuracy" in values:
        parts.append(f"accuracy {describe_paired(values['accuracy'])}")
    loss = values["loss"]
    interval = f"{loss['low']:+.4f} to {loss['high']:+.4f}"
    parts.append(f"loss {loss['difference']:+.4f} ({interval})")
    return ", ".join(parts)


def describe_paired(values: Mapping[str, Any]) -> str:
    """Returns a difference of shares with its interval and test; ``values`` are of `compare`."""
    interval = f"95% interval {values['low']:+.3f} to {values['high']:+.3f}"
    counts = f"{values['gained']} gained, {values['lost']} lost"
    test = f"McNemar p = {values['p_value']:.2g}"
    return f"{values['difference']:+.3f} ({interval}; {counts}, {test})"
