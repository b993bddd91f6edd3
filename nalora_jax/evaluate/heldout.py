"""The held-out metric of a run, for its log and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.multiple_choice import multiple_choice
from nalora_jax.evaluate.perplexity import completion_loss
from nalora_jax.generate import Generator
from nalora_jax.models.decoder import Decoder
from nalora_jax.tokenizer import Tokenizer

_SAMPLE_TOKENS = 96  # length limit of a sample completion


class Evaluator:
    """Evaluator of one model with different adapters on the same examples; compiles once.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      items: examples of one kind: multiple choice (metric: accuracy) or completions (metric: loss
        per token).
      mesh: mesh of the weights, if they are sharded.
      samples: number of examples to show with their answers.

    Attributes:
      metric: name of the headline metric, "accuracy" or "loss".
      mode: "max" if a larger value of it is better, "min" if a smaller one is.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        items: Sequence[Item],
        *,
        mesh: Mesh | None = None,
        samples: int = 4,
    ) -> None:
        self.choices = [item for item in items if isinstance(item, ChoiceItem)]
        self.completions = [item for item in items if isinstance(item, CompletionItem)]
        if bool(self.choices) == bool(self.completions):
            actual = "both" if self.choices else "no questions"
            raise NaloraError(
                "evaluation data", expected="questions with choices, or all without", found=actual
            )
        self._model, self._tokenizer, self._mesh, self._samples = model, tokenizer, mesh, samples
        self.metric: Literal["accuracy", "loss"] = "accuracy" if self.choices else "loss"
        self.mode: Literal["max", "min"] = "max" if self.choices else "min"

    def measure(self, params: Any, lora: Any | None, *, samples: bool = False) -> dict[str, Any]:
        """Returns the metrics of ``params`` with adapter ``lora`` (None: the base alone).

        Returns:
          ``accuracy`` (of multiple choice, by log-likelihood per character), ``loss`` per
          completion token, ``low`` and ``high`` (95% interval of the headline metric), and ``n``.
          With ``samples`` also a few
          examples with the model's answers, and for multiple choice ``right``: for each question,
            True if it was answered correctly.
        """
        variables = {"params": params} | ({} if lora is None else {"lora": lora})
        if self.choices:
            return self._choose(variables, samples)
        return self._complete(variables, samples)

    def _choose(self, variables: Mapping[str, Any], samples: bool) -> dict[str, Any]:
        count = self._samples if samples else 0
        # Per character, because the summed log-likelihood favours short choices. It makes no
        # difference for choices of equal length.
        result = multiple_choice(
            self._model, variables, self.choices, per="character", mesh=self._mesh, samples=count
        )
        names = ("accuracy", "low", "high", "accuracy_per_choice", "loss", "n")
        values = {name: getattr(result, name) for name in names}
        if samples:
            values |= {
                "samples": [vars(sample) for sample in result.samples],
                "right": result.correct.tolist(),
            }
        return values

    def _complete(self, variables: Mapping[str, Any], samples: bool) -> dict[str, Any]:
        result = completion_loss(self._model, variables, self.completions, mesh=self._mesh)
        values = {name: getattr(result, name) for name in ("loss", "low", "high", "perplexity", "n")}
        return values | ({"samples": self._answers(variables)} if samples else {})

    def _answers(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        sampled = self.completions[: self._samples]
        generator = Generator(self._model, variables, self._tokenizer, mesh=self._mesh)
        answers = generator.complete([item.prompt_ids for item in sampled], max_new_tokens=_SAMPLE_TOKENS)
        return [
            {
                "prompt": item.prompt,
                "turns": [{"role": role, "text": text} for role, text in item.turns],
                "answer": answer.text.strip(),
                "cut": answer.reason == "length",
                "expected": item.completion.strip(),
            }
            for item, answer in zip(sampled, answers, strict=True)
        ]


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
    if "accuracy" in values:
        return f"held-out accuracy {values['accuracy']:.3f} ({interval}), loss {values['loss']:.3f}"
    return f"held-out loss {values['loss']:.3f} ({interval})"
