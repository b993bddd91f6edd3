"""Held-out loss and rewards of preference pairs, for a run's log and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.config import PreferenceConfig
from nalora_jax.data.preference_pairs import PreferencePair
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import (
    SAMPLE_TOKENS,
    SAMPLES,
    Evaluator,
    ItemRecord,
    sample_records,
    variables_of,
)
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.intervals import bootstrap
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.preference_losses import (
    LOSSES,
    AnswerScores,
    chosen_nll,
    label_figures,
    pair_losses,
)


class PreferenceEvaluator(Evaluator):
    """Evaluates adapters on the same pairs; the base is scored once, if it is the reference.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      pairs: the held-out pairs.
      config: settings of the loss.
      mesh: mesh of the weights, if they are sharded.
    """

    metric = "loss"
    mode = "min"

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        pairs: Sequence[PreferencePair],
        config: PreferenceConfig,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Stores the arguments, and counts the tokens of the completions.

        Raises:
          NaloraError: there are no pairs.
        """
        if not pairs:
            raise NaloraError(
                "evaluation data", expected="at least one pair", found="none"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._config = config
        self._mesh = mesh
        # log-probabilities of the base, [pairs, 2] as from `_scores`; None: not computed yet
        self._base: np.ndarray | None = None
        lengths = []
        for pair in pairs:
            chosen = pair.chosen.divided[1]
            rejected = pair.rejected.divided[1]
            lengths.append((len(chosen), len(rejected)))
        self._tokens = np.array(lengths)  # [pairs, 2]

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt``, ``loss``, ``rewards_chosen``, ``rewards_rejected`` and
        ``chosen_nll`` of every pair, see `nalora_jax.ops.preference_losses`.

        A loss without a reference scores the base only if ``lora`` is None.
        """
        has_reference = LOSSES[self._config.loss].has_reference
        if lora is None:
            scores = self._base_scores(params)
        else:
            scores = self._scores(self._model, variables_of(params, lora))
        ratios = np.zeros_like(scores)
        if has_reference:
            ratios = scores - self._base_scores(params)
        labels = None
        if not LOSSES[self._config.loss].has_pairs:
            desirable = np.array([float(pair.desirable) for pair in self._pairs])
            labels = label_figures(desirable, ratios, np.ones_like(desirable))
        # [pairs, 2], chosen first
        answers = AnswerScores(scores, ratios, self._tokens, labels)
        losses = pair_losses(answers, self._config)
        nll = chosen_nll(answers)
        records = []
        for row, pair in enumerate(self._pairs):
            chosen, rejected = losses.rewards[row].tolist()
            records.append(
                {
                    "prompt": pair.prompt,
                    "loss": losses.loss[row].item(),
                    "rewards_chosen": chosen,
                    "rewards_rejected": rejected,
                    "chosen_nll": nll[row].item(),
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns means over pairs.

        Returns:
          ``loss`` per pair with its 95% interval ``low`` and ``high``, ``n``, ``rewards_chosen``,
          ``rewards_rejected``, ``rewards_margin``, ``rewards_accuracy``, the share of pairs
          whose chosen completion has the larger reward, and ``chosen_nll``, in nats per token of
          the chosen completion.
        """
        losses = np.array([record["loss"] for record in records])
        chosen = np.array([record["rewards_chosen"] for record in records])
        rejected = np.array([record["rewards_rejected"] for record in records])
        nll = np.array([record["chosen_nll"] for record in records])
        low, high = bootstrap(losses)
        return {
            "loss": float(losses.mean()),
            "low": low,
            "high": high,
            "n": len(losses),
            "rewards_chosen": float(chosen.mean()),
            "rewards_rejected": float(rejected.mean()),
            "rewards_margin": float((chosen - rejected).mean()),
            "rewards_accuracy": float((chosen > rejected).mean()),
            "chosen_nll": float(nll.mean()),
        }

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns a few prompts with the model's completion and the chosen one."""
        sampled = self._pairs[:SAMPLES]
        generator = Generator(
            self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh
        )
        prompts = [pair.chosen.divided[0] for pair in sampled]
        answers = generator.generate(prompts, max_new_tokens=SAMPLE_TOKENS)
        references = [pair.texts[0] for pair in sampled]
        return sample_records([pair.prompt for pair in sampled], answers, references)

    def _base_scores(self, params: Any) -> np.ndarray:
        """Returns the result of `_scores` for the model without adapters, computed once."""
        if self._base is None:
            base = self._model.clone(adapters=AdapterSpec())
            self._base = self._scores(base, {"params": params})
        return self._base

    def _scores(self, model: Decoder, variables: Mapping[str, Any]) -> np.ndarray:
        """Returns log-probabilities ``[pairs, 2]`` of both completions, chosen first."""
        groups = [[pair.chosen.divided, pair.rejected.divided] for pair in self._pairs]
        scored = score_groups(model, variables, groups, mesh=self._mesh)
        log_probs = [
            (chosen.log_prob, rejected.log_prob) for chosen, rejected in scored
        ]
        return np.array(log_probs)
