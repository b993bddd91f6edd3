"""Runs that train a reward model on pairs of answers, by the loss of Bradley and Terry.

    nalora train --kind reward --data.dataset pairs.jsonl   {"prompt", "chosen", "rejected"}

Records are those of preference pairs, with the names of their fields in ``--preference``. A field
"margin" is a number by which the chosen reward should be larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.config import DataConfig, PreferenceConfig, RunConfig
from nalora_jax.config.checks import Limits
from nalora_jax.data.chat_text import Rendered
from nalora_jax.data.labels import LabelSet
from nalora_jax.data.pooled_texts import PooledItem, RecordForm
from nalora_jax.data.preference_pairs import render_pair
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import RewardPairEvaluator
from nalora_jax.kinds.pooled import PooledLosses, PooledTask, pooled_kind
from nalora_jax.kinds.record import Job, kind_settings
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.method.step import Batch
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.pooled_losses import reward_losses


@dataclass(frozen=True)
class RewardSettings:
    """Settings of ``--kind reward:NAME=VALUE,...``."""

    center: float = 0.0  # weight of the squared sum of a pair's rewards
    margin: str = "margin"  # field with the margin; records without it have 0


@dataclass(frozen=True)
class PairTexts(RecordForm):
    """Records with a prompt, a chosen and a rejected answer."""

    preference: PreferenceConfig
    margin: str

    @property
    def group(self) -> int:
        """Returns the number of texts of a record."""
        return 2

    @property
    def ends(self) -> bool:
        """Returns True: an answer ends with the end-of-sequence id, as in TRL."""
        return True

    @property
    def options(self) -> dict[str, Any]:
        """Returns the settings that change the texts."""
        preference = self.preference
        return {
            "texts": "pairs",
            "chosen": preference.chosen_field,
            "rejected": preference.rejected_field,
        }

    def render(
        self, record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
    ) -> list[Rendered]:
        """Returns the prompt with both answers, the chosen one first."""
        config = replace(config, loss_on="answer")
        texts = render_pair(record, config, self.preference, tokenizer, where)
        chosen, rejected = texts
        if chosen.text == rejected.text:
            raise NaloraError(
                where,
                expected="two answers that differ",
                found="the same one twice",
                remedy="remove it",
            )
        return texts

    def label(self, record: Record, where: str) -> list[float]:
        """Returns the margin of a pair."""
        value = record.get(self.margin)
        if value is None:
            value = 0.0
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NaloraError(
                f"{where}: {self.margin}", expected="a number", found=repr(value)[:80]
            )
        return [float(value)]


class RewardModel(PooledTask):
    """A head of one output, the reward of a prompt with its answer."""

    name = "reward"
    settings = RewardSettings

    def limits(self, config: RunConfig) -> Iterator[Limits]:
        """Yields the values that other settings may have in a run on pairs."""
        yield Limits(
            "--kind reward, which has its own loss", {"preference.loss": ("none",)}
        )
        yield from super().limits(config)

    def open_form(
        self, config: RunConfig, train: Source, base: ModelConfig
    ) -> tuple[RunConfig, PairTexts]:
        """Returns the settings and the form of their records."""
        return config, form_of_run(config)

    def texts(self, config: RunConfig) -> int:
        """Returns 2: a chosen and a rejected answer."""
        return 2

    def outputs(self, config: RunConfig) -> int:
        """Returns 1."""
        return 1

    def labels(self, config: RunConfig) -> int:
        """Returns 1, the margin."""
        return 1

    def losses(self, config: RunConfig, plain: NextToken) -> PooledLosses:
        """Returns the losses of pairs."""
        center = kind_settings(config).center

        def losses(
            outputs: jax.Array, batch: Batch
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            """Returns the loss of each pair, ``[rows, records]``, and its metrics."""
            rewards = outputs[..., 0]  # [rows, records, 2]
            chosen = rewards[..., 0]
            rejected = rewards[..., 1]
            measured = {
                "accuracy": (chosen > rejected).astype(jnp.float32),
                "margin": chosen - rejected,
                "mean_reward": (chosen + rejected) / 2,
            }
            return reward_losses(rewards, batch["labels"][..., 0], center), measured

        return losses

    def evaluator(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        form: RecordForm,
        config: RunConfig,
        mesh: Mesh | None,
    ) -> RewardPairEvaluator:
        """Returns the evaluator of some held-out pairs."""
        return RewardPairEvaluator(model, items, "last", mesh=mesh)

    def trained_form(self, model: AdaptedModel, config: RunConfig) -> PairTexts:
        """Returns the form of the pairs that a trained reward model reads."""
        check_reward_model(model)
        return form_of_run(config)

    def export_options(self, job: Job) -> dict[str, Any]:
        """Returns the function that writes the name of the output."""
        return {"write_extra": LabelSet("score", ("reward",)).write}


def form_of_run(config: RunConfig) -> PairTexts:
    """Returns the form of a run's records."""
    return PairTexts(config.preference, kind_settings(config).margin)


def check_reward_model(model: AdaptedModel) -> None:
    """Raises a NaloraError if a model has no adapter with a head of one output."""
    if model.spec.score != 1:
        raise NaloraError(
            str(model.located.adapter or model.located.base),
            expected="an adapter with a reward head",
            found=f"a head of {model.spec.score} outputs",
        )


KIND = pooled_kind(RewardModel())
