"""The held-out metric of a run, for its log and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from nalora_jax.data.items import CompletionItem, Item
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.generate import Completion, Generator
from nalora_jax.evaluate.items import by_kind
from nalora_jax.evaluate.multiple_choice import multiple_choice
from nalora_jax.evaluate.perplexity import PerplexityResult, completion_loss
from nalora_jax.models.decoder import Decoder

SAMPLES = 4  # examples that are shown with generated completions
CHOICES = 48  # questions from which the report draws its samples
SAMPLE_TOKENS = 96  # length limit of a sample completion


def variables_of(params: Any, lora: Any | None) -> dict[str, Any]:
    """Returns a model's variables; without adapters if ``lora`` is None."""
    if lora is None:
        return {"params": params}
    return {"params": params, "lora": lora}


class Evaluator:
    """Evaluator of one model with different adapters on the same examples; compiles once.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      items: examples of one kind: multiple choice (metric: accuracy) or completions (metric: loss
        per token).
      mesh: mesh of the weights, if they are sharded.

    Attributes:
      metric: name of the headline metric, "accuracy" or "loss".
      mode: "max" if a larger value of it is better, "min" if a smaller one is.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, items: Sequence[Item], *, mesh: Mesh | None = None
    ) -> None:
        self.choices, self.completions = by_kind(items)
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self.metric: Literal["accuracy", "loss"] = "loss"
        self.mode: Literal["max", "min"] = "min"
        if self.choices:
            self.metric, self.mode = "accuracy", "max"

    def measure(self, params: Any, lora: Any | None, *, samples: bool = False) -> dict[str, Any]:
        """Returns the metrics of ``params`` with adapter ``lora`` (None: the base alone).

        Returns:
          ``accuracy`` (of multiple choice, by log-likelihood per character) and its ``chance`` level,
          ``loss`` per completion token, ``low`` and ``high`` (95% interval of the headline metric), and ``n``.
          With ``samples`` also a few examples with the model's answers, and for multiple choice
          ``right``: for each question, True if it was answered correctly.
        """
        variables = variables_of(params, lora)
        if self.choices:
            return self._choose(variables, samples)
        return self._complete(variables, samples)

    def _choose(self, variables: Mapping[str, Any], samples: bool) -> dict[str, Any]:
        # Per character, because the summed log-likelihood favours short choices. It makes no
        # difference for choices of equal length.
        result = multiple_choice(
            self._model, variables, self.choices, per="character", mesh=self._mesh, samples=CHOICES
        )
        names = ("accuracy", "low", "high", "accuracy_per_choice", "loss", "n")
        values = {name: getattr(result, name) for name in names}
        values["chance"] = sum(1 / len(item.choices) for item in self.choices) / len(self.choices)
        if samples:
            values |= {
                "samples": [vars(sample) for sample in result.samples],
                "right": result.correct.tolist(),
            }
        return values

    def _complete(self, variables: Mapping[str, Any], samples: bool) -> dict[str, Any]:
        result = self._losses(variables)
        values = {name: getattr(result, name) for name in ("loss", "low", "high", "perplexity", "n")}
        if samples:
            values["samples"] = self._answers(variables)
        return values

    def _losses(self, variables: Mapping[str, Any]) -> PerplexityResult:
        return completion_loss(self._model, variables, self.completions, mesh=self._mesh)

    def _answers(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        sampled = self.completions[:SAMPLES]
        return [
            {
                "prompt": self._shown(item.prompt),
                "turns": [{"role": role, "text": text} for role, text in item.turns],
                "answer": answer.text.strip(),
                "cut": answer.reason == "length",
                "expected": item.completion.strip(),
            }
            for item, answer in zip(sampled, self._generated(variables, sampled), strict=True)
        ]

    def _generated(self, variables: Mapping[str, Any], items: Sequence[CompletionItem]) -> list[Completion]:
        generator = Generator(self._model, variables, self._tokenizer, mesh=self._mesh)
        return generator.complete([item.prompt_ids for item in items], max_new_tokens=SAMPLE_TOKENS)

    def _shown(self, prompt: str) -> str:
        return prompt


def describe(values: Mapping[str, Any]) -> str:
    """Returns one line for the log.

    Example:
      >>> describe({"accuracy": 0.51, "low": 0.46, "high": 0.56, "loss": 3.6, "n": 400})
      'held-out accuracy 0.510 (95% interval 0.460 to 0.560, n 400), loss 3.600'
    """
    interval = f"95% interval {values['low']:.3f} to {values['high']:.3f}, n {values['n']}"
    if "recall" in values:
        ways = ", ".join(
            f"{name.replace('_', ' ')} {values[name]:.3f}" for name in values if "_recall_" in name
        )
        return f"held-out recall at 1 {values['recall']:.3f} ({interval}), {ways}"
    if "rewards_margin" in values:
        rewards = (
            f"reward margin {values['rewards_margin']:+.3f}, preferred {values['rewards_accuracy']:.1%}"
        )
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
