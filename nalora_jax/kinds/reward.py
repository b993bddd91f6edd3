"""Runs that train a reward model on pairs of answers, by the loss of Bradley and Terry.

    nalora train --kind reward --data.dataset pairs.jsonl   {"prompt", "chosen", "rejected"}

Records are those of preference pairs, with the names of their fields in ``--preference``. A field
"margin" is a number by which the chosen reward should be larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.program import Assembly
from nalora_jax.config import DataConfig, PreferenceConfig, RunConfig
from nalora_jax.config.checks import Limits
from nalora_jax.data.chat_text import Rendered
from nalora_jax.data.labels import LabelSet
from nalora_jax.data.pooled_texts import RecordForm, held_out_texts
from nalora_jax.data.preference_pairs import render_pair
from nalora_jax.data.source import Record, Source
from nalora_jax.data.sources import open_held_out
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import RewardPairEvaluator
from nalora_jax.kinds import text
from nalora_jax.kinds.pooled import PooledObjective, open_texts, pooled_limits
from nalora_jax.kinds.record import (
    Arrays,
    Inputs,
    Job,
    kind_settings,
    register_kind,
)
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.pooled_losses import reward_losses
from nalora_jax.weights.model_files import LoadedModel


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


def form_of_run(config: RunConfig) -> PairTexts:
    """Returns the form of a run's records."""
    return PairTexts(config.preference, kind_settings(config).margin)


def open_pairs(config: RunConfig, train: Source) -> tuple[RunConfig, PairTexts]:
    """Returns the settings and the form of their records."""
    return config, form_of_run(config)


def program_parts(config: RunConfig, processor: Any) -> dict[str, Any]:
    """Returns the objective of pairs, for `nalora_jax.assembly.program.assemble`."""
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

    def objective(plain: NextToken) -> PooledObjective:
        """Returns the objective on a model."""
        return PooledObjective(plain, pooling="last", texts=2, losses=losses)

    return {"objective": objective}


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, items: Any
) -> RewardPairEvaluator:
    """Returns the evaluator of some held-out pairs."""
    mesh = distributed.multi_device_mesh(assembly.mesh)
    return RewardPairEvaluator(assembly.eval_model, items, "last", mesh=mesh)


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> RewardPairEvaluator:
    """Returns the evaluator of a trained reward model on held-out pairs.

    See `text.adapter_evaluator`.
    """
    if model.spec.score != 1:
        raise NaloraError(
            str(model.located.adapter or model.located.base),
            expected="an adapter with a reward head",
            found=f"a head of {model.spec.score} outputs",
        )
    data = config.data
    records = open_held_out(data, data.eval_split)
    context = model.base.config.max_positions
    tokenizer = model.base.tokenizer
    form = form_of_run(config)
    items, _ = held_out_texts(records, data, tokenizer, form, context)
    return RewardPairEvaluator(model.module, items, "last", mesh=mesh)


def export_run(
    job: Job, folder: Path, state: TrainState, share: Callable[[str], None]
) -> AdapterSpec:
    """Writes PEFT files of the adapter and its head.

    See `text.export_run`.
    """
    write = LabelSet("score", ("reward",)).write
    return text.export_run(job, folder, state, share, write_extra=write)


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on pairs."""
    yield Limits(
        "--kind reward, which has its own loss", {"preference.loss": ("none",)}
    )
    yield from pooled_limits(config, "reward")


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the arrays of a batch besides those of text, see `Kind`."""
    return {"records": ((1,), "float32"), "labels": ((1, 1), "float32")}


KIND = register_kind(
    replace(
        text.KIND,
        name="reward",
        open_inputs=partial(open_texts, open_form=open_pairs),
        evaluator=evaluator,
        export_run=export_run,
        evaluate=adapter_evaluator,
        program_parts=program_parts,
        settings=RewardSettings,
        limits=limits,
        rate=1 / 4,
        outputs=lambda config: 1,
        batch_arrays=batch_arrays,
        subject="",
    )
)
