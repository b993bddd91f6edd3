"""Runs that train a head to label texts: one label, several, or scores.

    nalora train --kind classify --data.dataset reviews.jsonl      {"text": ..., "label": ...}

The head reads the hidden state of a text's last token after the final norm, as transformers'
``LlamaForSequenceClassification`` does, and losses are those of its ``problem_type``.
"""

from __future__ import annotations

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
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.config.checks import Limits
from nalora_jax.data.chat_text import Rendered
from nalora_jax.data.labels import FORMS, LabelSet, find_labels, raw_label
from nalora_jax.data.pooled_texts import RecordForm, held_out_texts, render_input
from nalora_jax.data.source import Record, Source
from nalora_jax.data.sources import open_held_out
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import LabelEvaluator
from nalora_jax.kinds import text
from nalora_jax.kinds.pooled import (
    PooledObjective,
    open_texts,
    pooled_limits,
    with_settings,
)
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
from nalora_jax.ops.pooled_losses import label_losses
from nalora_jax.weights.model_files import LoadedModel


@dataclass(frozen=True)
class ClassifySettings:
    """Settings of ``--kind classify:NAME=VALUE,...``."""

    labels: int = 0  # number of outputs; 0: as many as the training records have
    form: str = "auto"  # "one", "several", "score", or that of the first record
    field: str = "label"  # that has the label


@dataclass(frozen=True)
class LabeledTexts(RecordForm):
    """Records with a text and a label."""

    field: str
    labels: LabelSet

    @property
    def options(self) -> dict[str, Any]:
        """Returns the settings that change the texts."""
        return {"texts": "labeled"}

    def render(
        self, record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
    ) -> list[Rendered]:
        """Returns the text of a record."""
        return [render_input(record, config, tokenizer, where)]

    def label(self, record: Record, where: str) -> list[float]:
        """Returns the target of each output."""
        value = raw_label(record, self.field, where)
        return self.labels.encode(value, f"{where}: {self.field}")


def open_labels(config: RunConfig, train: Source) -> tuple[RunConfig, LabeledTexts]:
    """Returns the labels of the training records, and settings that state them.

    Raises:
      NaloraError: records without labels, or labels that contradict the settings.
    """
    settings = kind_settings(config)
    indices = range(len(train))
    labels = find_labels(train, indices, settings.field, settings.form, settings.labels)
    config = with_settings(config, labels=len(labels.names), form=labels.form)
    return config, LabeledTexts(settings.field, labels)


def program_parts(config: RunConfig, processor: Any) -> dict[str, Any]:
    """Returns the objective of labels, for `nalora_jax.assembly.program.assemble`."""
    form = kind_settings(config).form

    def losses(
        outputs: jax.Array, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of each text, ``[rows, records]``, and for one label of each its
        accuracy."""
        logits = outputs[:, :, 0]  # [rows, records, outputs]
        labels = batch["labels"]
        measured = {}
        if form == "one":
            right = jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1)
            measured["accuracy"] = right.astype(jnp.float32)
        return label_losses(logits, labels, form), measured

    def objective(plain: NextToken) -> PooledObjective:
        """Returns the objective on a model."""
        return PooledObjective(plain, pooling="last", texts=1, losses=losses)

    return {"objective": objective}


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, items: Any
) -> LabelEvaluator:
    """Returns the evaluator of some held-out texts."""
    mesh = distributed.multi_device_mesh(assembly.mesh)
    labels = inputs.data.form.labels
    return LabelEvaluator(assembly.eval_model, items, labels, mesh=mesh)


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> LabelEvaluator:
    """Returns the evaluator of a trained head on held-out texts.

    See `text.adapter_evaluator`.
    """
    labels = labels_of(model)
    data = config.data
    form = LabeledTexts(kind_settings(config).field, labels)
    records = open_held_out(data, data.eval_split)
    context = model.base.config.max_positions
    tokenizer = model.base.tokenizer
    items, _ = held_out_texts(records, data, tokenizer, form, context)
    return LabelEvaluator(model.module, items, labels, mesh=mesh)


def labels_of(model: AdaptedModel) -> LabelSet:
    """Returns the labels of a model with a trained head.

    Raises:
      NaloraError: it has no head, or its labels cannot be read.
    """
    adapter = model.located.adapter
    if adapter is None or not model.spec.score:
        raise NaloraError(
            str(adapter or model.located.base),
            expected="an adapter with a head, as --kind classify trains it",
            found="none",
        )
    return LabelSet.read(adapter)


def export_run(
    job: Job, folder: Path, state: TrainState, share: Callable[[str], None]
) -> AdapterSpec:
    """Writes PEFT files of the adapter and its head, with the names of the labels.

    See `text.export_run`.
    """
    labels = job.inputs.data.form.labels
    return text.export_run(job, folder, state, share, write_extra=labels.write)


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on labels.

    Raises:
      NaloraError: an unknown form, or a number of labels below 0.
    """
    settings = kind_settings(config)
    allowed = ("auto", *FORMS)
    if settings.form not in allowed or settings.labels < 0:
        raise NaloraError(
            f"--kind {config.kind}",
            expected=f"a form of {', '.join(allowed)}, and labels of 0 or more",
            found=f"form={settings.form}, labels={settings.labels}",
        )
    yield from pooled_limits(config, "classify")


def count_outputs(config: RunConfig) -> int:
    """Returns the number of labels; a plan without records assumes two."""
    return kind_settings(config).labels or 2


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the arrays of a batch besides those of text, see `Kind`."""
    outputs = count_outputs(config)
    return {"records": ((1,), "float32"), "labels": ((1, outputs), "float32")}


KIND = register_kind(
    replace(
        text.KIND,
        name="classify",
        open_inputs=partial(open_texts, open_form=open_labels),
        evaluator=evaluator,
        export_run=export_run,
        evaluate=adapter_evaluator,
        program_parts=program_parts,
        settings=ClassifySettings,
        limits=limits,
        rate=1 / 4,
        outputs=count_outputs,
        batch_arrays=batch_arrays,
        subject="",
    )
)
