"""Held-out loss and rewards of preference pairs, for a run's log and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from nalora_jax.config import PreferenceConfig
from nalora_jax.data.preference import Pair
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.heldout import SAMPLE_TOKENS, SAMPLES, variables_of
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.evaluate.statistics import bootstrap
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec


class PreferenceEvaluator:
    """Evaluator of different adapters on the same pairs; the base is scored once.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      pairs: the held-out pairs.
      config: settings of the loss.
      mesh: mesh of the weights, if they are sharded.

    Attributes:
      metric: name of the headline metric.
      mode: "min", since a smaller loss is better.
    """

    metric: Literal["loss"] = "loss"
    mode: Literal["min"] = "min"

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        pairs: Sequence[Pair],
        config: PreferenceConfig,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        if not pairs:
            raise NaloraError("evaluation data", expected="at least one pair", found="none")
        self._model, self._tokenizer, self._pairs, self._config = model, tokenizer, pairs, config
        self._mesh = mesh
        self._reference: np.ndarray | None = None
        self._tokens = np.array(
            [[len(example.divided[1]) for example in (p.chosen, p.rejected)] for p in pairs]
        )

    def measure(self, params: Any, lora: Any | None, *, samples: bool = False) -> dict[str, Any]:
        """Returns the metrics of ``params`` with adapter ``lora`` (None: the base, rewards 0).

        Returns:
          ``loss`` per pair with its 95% interval ``low`` and ``high``, ``n``, and means over pairs:
          ``rewards_chosen``, ``rewards_rejected``, ``rewards_margin``, and ``rewards_accuracy``,
          the share of pairs whose chosen completion has the larger reward; with ``samples`` a few
          prompts with the model's completion.
        """
        if self._reference is None:
            self._reference = self._scores(self._model.clone(adapters=AdapterSpec()), {"params": params})
        variables = variables_of(params, lora)
        scores = self._reference if lora is None else self._scores(self._model, variables)
        ratios = scores - self._reference
        if self._config.per_token:
            ratios = ratios / self._tokens
        rewards = self._config.beta * ratios
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = self._config.label_smoothing
        losses = (1 - smoothing) * np.logaddexp(0.0, -margin) + smoothing * np.logaddexp(0.0, margin)
        low, high = bootstrap(losses)
        values: dict[str, Any] = {
            "loss": float(losses.mean()),
            "low": low,
            "high": high,
            "n": len(losses),
            "rewards_chosen": float(rewards[:, 0].mean()),
            "rewards_rejected": float(rewards[:, 1].mean()),
            "rewards_margin": float(margin.mean()),
            "rewards_accuracy": float((margin > 0).mean()),
        }
        if samples:
            values["samples"] = self._answers(variables)
        return values

    def _scores(self, model: Decoder, variables: Mapping[str, Any]) -> np.ndarray:
        """Returns log-probabilities ``[pairs, 2]`` of both completions, chosen first."""
        groups = [[pair.chosen.divided, pair.rejected.divided] for pair in self._pairs]
        scored = score_groups(model, variables, groups, mesh=self._mesh)
        return np.array([[score.log_prob for score in row] for row in scored])

    def _answers(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        sampled = self._pairs[:SAMPLES]
        generator = Generator(self._model, variables, self._tokenizer, mesh=self._mesh)
        prompts = [pair.chosen.divided[0] for pair in sampled]
        answers = generator.generate(prompts, max_new_tokens=SAMPLE_TOKENS)
        return [
            {"prompt": pair.prompt, "answer": answer.strip(), "expected": pair.texts[0].strip()}
            for pair, answer in zip(sampled, answers, strict=True)
        ]
