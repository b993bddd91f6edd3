"""Runs that train a head to label texts: one label, several, or scores.

    nalora train --kind classify --data.dataset reviews.jsonl      {"text": ..., "label": ...}

The head reads the hidden state of a text's last token after the final norm, as transformers'
``LlamaForSequenceClassification`` does, and losses are those of its ``problem_type``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.config.checks import Limits
from nalora_jax.data.chat_text import Rendered, text_field
from nalora_jax.data.labels import FORMS, LabelSet, find_labels, raw_label
from nalora_jax.data.pooled_texts import (
    PooledItem,
    RecordForm,
    render_input,
    whole_text,
)
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import LabelEvaluator
from nalora_jax.kinds.pooled import (
    PooledLosses,
    PooledTask,
    pooled_kind,
    with_settings,
)
from nalora_jax.kinds.record import Job, kind_settings
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.method.step import Batch
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.pooled_losses import label_losses


@dataclass(frozen=True)
class ClassifySettings:
    """Settings of ``--kind classify:NAME=VALUE,...``."""

    labels: int = 0  # number of outputs; 0: as many as the training records have
    # "one", "several", "score", "binary", or that of the first record
    form: str = "auto"
    field: str = "label"  # that has the label
    # Fields whose texts are read as one, joined by a newline: query/document; "": one text
    texts: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class LabeledTexts(RecordForm):
    """Records with a text and a label."""

    field: str
    labels: LabelSet
    texts: tuple[str, ...] = ("",)

    @property
    def options(self) -> dict[str, Any]:
        """Returns the settings that change the texts."""
        return {"texts": f"labeled {'/'.join(self.texts)}".strip()}

    def render(
        self, record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
    ) -> list[Rendered]:
        """Returns the text of a record."""
        if self.texts == ("",):
            return [render_input(record, config, tokenizer, where)]
        parts = []
        for field in self.texts:
            parts.append(text_field(record, field, where, "--kind classify:texts="))
        return [whole_text("\n".join(parts))]

    def label(self, record: Record, where: str) -> list[float]:
        """Returns the target of each output."""
        value = raw_label(record, self.field, where)
        return self.labels.encode(value, f"{where}: {self.field}")


class Classification(PooledTask):
    """A head of one output for each label, or for each score."""

    name = "classify"
    settings = ClassifySettings

    def limits(self, config: RunConfig) -> Iterator[Limits]:
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
        yield from super().limits(config)

    def open_form(
        self, config: RunConfig, train: Source, base: ModelConfig
    ) -> tuple[RunConfig, LabeledTexts]:
        """Returns settings that state the labels of the training records, and their form.

        Raises:
          NaloraError: records without labels, or labels that contradict the settings.
        """
        settings = kind_settings(config)
        indices = range(len(train))
        labels = find_labels(
            train, indices, settings.field, settings.form, settings.labels
        )
        config = with_settings(config, labels=len(labels.names), form=labels.form)
        return config, LabeledTexts(settings.field, labels, settings.texts)

    def outputs(self, config: RunConfig) -> int:
        """Returns the number of labels; a plan without records assumes two."""
        settings = kind_settings(config)
        if settings.form == "binary":
            return 1
        return settings.labels or 2

    def labels(self, config: RunConfig) -> int:
        """Returns the number of labels."""
        return self.outputs(config)

    def losses(self, config: RunConfig, plain: NextToken) -> PooledLosses:
        """Returns the losses of texts."""
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

        return losses

    def evaluator(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        form: RecordForm,
        config: RunConfig,
        mesh: Mesh | None,
    ) -> LabelEvaluator:
        """Returns the evaluator of some held-out texts."""
        labels = cast(LabeledTexts, form).labels
        return LabelEvaluator(model, items, labels, mesh=mesh)

    def trained_form(self, model: AdaptedModel, config: RunConfig) -> LabeledTexts:
        """Returns the form of texts with the labels of a trained head."""
        settings = kind_settings(config)
        return LabeledTexts(settings.field, labels_of(model), settings.texts)

    def export_options(self, job: Job) -> dict[str, Any]:
        """Returns the function that writes the names of the labels."""
        return {"write_extra": job.inputs.data.form.labels.write}


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


KIND = pooled_kind(Classification())
