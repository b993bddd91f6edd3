"""Runs that train vectors of texts: texts that belong together get similar vectors.

    nalora train --kind embed --data.dataset pairs.jsonl
        {"anchor": ..., "positive": ...}, with "negative" or "negative_1", "negative_2", ...
        {"sentence1": ..., "sentence2": ..., "score": 0.7}

Losses are those of sentence-transformers on normalized vectors: MultipleNegativesRankingLoss
(InfoNCE) of pairs and triplets, CoSENTLoss or CosineSimilarityLoss of scored pairs, and
MatryoshkaLoss around either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.config.checks import Limits
from nalora_jax.data.chat_text import Rendered, text_field
from nalora_jax.data.pooled_texts import PooledItem, RecordForm, whole_text
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.embedding_evaluation import (
    PairSimilarityEvaluator,
    TextRetrievalEvaluator,
)
from nalora_jax.evaluate.pooled_evaluation import PooledEvaluator
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
from nalora_jax.ops.pooled_losses import (
    POOLINGS,
    contrastive_losses,
    cosent_loss,
    cosine_losses,
)
from nalora_jax.weights.embedding_files import write_embedding_files
from nalora_jax.weights.model_files import LoadedModel
from nalora_jax.weights.new_tokens import tokenizer_writer

LOSSES_OF_SCORES = ("cosent", "cosine")
EMBEDDING_LOSSES = ("auto", "infonce", *LOSSES_OF_SCORES)
# Names of the fields of an anchor and its positive, in the order in which they are looked for.
_PAIRS = (
    ("anchor", "positive"),
    ("sentence1", "sentence2"),
    ("query", "positive"),
    ("query", "answer"),
    ("question", "answer"),
)
_NEGATIVE = "negative"


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of ``--kind embed:NAME=VALUE,...``."""

    # One of `EMBEDDING_LOSSES`; auto: "cosent" for records with a score
    loss: str = "auto"
    pooling: str = "last"  # how tokens become a vector: "last", "mean" or "first"
    scale: float = 20.0  # of cosines in the loss, the inverse of a temperature
    # Matryoshka sizes, such as 576/256/64; 0: the whole vector
    sizes: tuple[int, ...] = (0,)
    fields: tuple[str, ...] = ("auto",)  # with the texts: anchor/positive/negative/...
    score: str = "score"  # field with the score of a pair


@dataclass(frozen=True)
class TextGroups(RecordForm):
    """Records with an anchor, its positive and its negatives, or two texts and their score."""

    fields: tuple[str, ...]
    score: str  # field of the score; "" without scores

    @property
    def group(self) -> int:
        """Returns the number of texts of a record."""
        return len(self.fields)

    @property
    def options(self) -> dict[str, Any]:
        """Returns the settings that change the texts."""
        return {"texts": "groups", "fields": "/".join(self.fields)}

    def render(
        self, record: Record, config: DataConfig, tokenizer: Tokenizer, where: str
    ) -> list[Rendered]:
        """Returns the texts of a record in the order of the fields."""
        texts = []
        for field in self.fields:
            written = text_field(record, field, where, "--kind embed:fields=", "")
            texts.append(whole_text(written))
        return texts

    def label(self, record: Record, where: str) -> list[float]:
        """Returns the score of a pair; nothing without scores."""
        if not self.score:
            return []
        value = record.get(self.score)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NaloraError(
                f"{where}: {self.score}",
                expected="a number, the score of a pair",
                found=repr(value)[:80],
                remedy="name the field of the score: --kind embed:score=NAME",
            )
        return [float(value)]


class TextVectors(PooledTask):
    """One vector of each text, without a head."""

    name = "embed"
    settings = EmbedSettings

    def limits(self, config: RunConfig) -> Iterator[Limits]:
        """Yields the values that other settings may have in a run on vectors.

        Raises:
          NaloraError: an unknown loss or pooling, or a scale or sizes below their range.
        """
        settings = kind_settings(config)
        named = settings.loss in EMBEDDING_LOSSES and settings.pooling in POOLINGS
        # One size of 0 is the whole vector.
        sized = settings.sizes == (0,) or min(settings.sizes) >= 1
        if not named or not sized or not settings.scale > 0:
            raise NaloraError(
                f"--kind {config.kind}",
                expected=f"a loss of {', '.join(EMBEDDING_LOSSES)}, a pooling of "
                f"{', '.join(POOLINGS)}, a scale above 0 and sizes of 1 or more",
                found=f"loss={settings.loss}, pooling={settings.pooling}, "
                f"scale={settings.scale:g}, sizes={'/'.join(map(str, settings.sizes))}",
            )
        yield from super().limits(config)
        if settings.loss != "cosine":
            remedy = "use a smaller batch, more devices, or --compute.remat full"
            cause = "--kind embed: texts are compared within their micro-batch only"
            yield Limits(cause, {"train.accumulate": (1,)}, remedy)

    def open_form(
        self, config: RunConfig, train: Source, base: ModelConfig
    ) -> tuple[RunConfig, TextGroups]:
        """Returns settings that state the loss and the fields of the records, and their form.

        Raises:
          NaloraError: the first record has no pair of texts or not the score that the loss needs,
            or a size is larger than the vectors.
        """
        settings = kind_settings(config)
        if max(settings.sizes) > base.d_model:
            raise NaloraError(
                "--kind embed:sizes",
                expected=f"at most {base.d_model}, the size of the model's vectors",
                found=max(settings.sizes),
            )
        first = train.read([0])[0]
        where = train.where(0)
        fields = settings.fields
        if fields == ("auto",):
            fields = find_fields(first, where)
        loss = settings.loss
        if loss == "auto":
            loss = "infonce"
            if settings.score in first:
                loss = "cosent"
        form = TextGroups(fields, settings.score if loss in LOSSES_OF_SCORES else "")
        expected = 2 if form.score else max(len(fields), 2)
        if len(fields) != expected:
            raise NaloraError(
                f"{where}: --kind embed:loss={loss}",
                expected=f"{expected} fields with texts",
                found=f"{len(fields)}: {', '.join(fields)}",
                remedy="name the fields with the texts: --kind embed:fields=FIRST/SECOND",
            )
        return with_settings(config, loss=loss, fields=fields), form

    def pooling(self, config: RunConfig) -> str:
        """Returns the pooling of the settings."""
        pooling: str = kind_settings(config).pooling
        return pooling

    def texts(self, config: RunConfig) -> int:
        """Returns the number of texts of a record; a plan without records assumes two."""
        return max(len(kind_settings(config).fields), 2)

    def labels(self, config: RunConfig) -> int:
        """Returns 1 for scored pairs."""
        return int(kind_settings(config).loss in LOSSES_OF_SCORES)

    def losses(self, config: RunConfig, plain: NextToken) -> PooledLosses:
        """Returns the losses of groups, summed over the Matryoshka sizes."""
        settings = kind_settings(config)
        of_vectors = partial(group_losses, settings.loss, settings.scale)

        def losses(
            vectors: jax.Array, batch: Batch
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            """Returns the loss of each group, ``[rows, records]``, and its metrics."""
            rows, records, texts, width = vectors.shape
            # [rows, records, texts, d] -> [groups, texts, d], groups of all devices
            groups = vectors.reshape(rows * records, texts, width)
            real = batch["records"].reshape(-1)
            scores = jnp.zeros_like(real)
            if "labels" in batch:
                scores = batch["labels"].reshape(-1)
            total = jnp.zeros_like(real)
            measured: dict[str, jax.Array] = {}
            # The metrics are of the largest size, the last one.
            for size in sorted(size or width for size in settings.sizes):
                losses, measured = of_vectors(groups[..., :size], real, scores)
                total += losses
            shape = (rows, records)
            by_row = {name: values.reshape(shape) for name, values in measured.items()}
            return total.reshape(shape), by_row

        return losses

    def evaluator(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        form: RecordForm,
        config: RunConfig,
        mesh: Mesh | None,
    ) -> PooledEvaluator:
        """Returns the evaluator of retrieval, or of scored pairs their rank correlation."""
        settings = kind_settings(config)
        if cast(TextGroups, form).score:
            return PairSimilarityEvaluator(model, items, settings.pooling, mesh=mesh)
        return TextRetrievalEvaluator(
            model, items, settings.pooling, settings.scale, mesh=mesh
        )

    def trained_form(self, model: AdaptedModel, config: RunConfig) -> TextGroups:
        """Returns the form of the run's records."""
        settings = kind_settings(config)
        if settings.fields == ("auto",):
            raise NaloraError(
                str(model.located.adapter or model.located.base),
                expected="an adapter of a run with --kind embed",
                found="no fields of texts in its settings",
                remedy="name the folder of the run",
            )
        scored = settings.loss in LOSSES_OF_SCORES
        return TextGroups(settings.fields, settings.score if scored else "")

    def export_options(self, job: Job) -> dict[str, Any]:
        """Returns the target and the function that writes sentence-transformers' files."""
        loaded = cast(LoadedModel, job.loaded)
        write = partial(
            _write_files,
            tokenizer_writer(loaded),
            d_model=loaded.config.d_model,
            pooling=kind_settings(job.config).pooling,
            max_length=loaded.config.max_positions,
        )
        return {"target": "embedding", "write_extra": write}


def _write_files(
    write_tokenizer: Callable[[Path], None], folder: Path, **options: Any
) -> None:
    """Writes the tokenizer and sentence-transformers' files."""
    write_tokenizer(folder)
    write_embedding_files(folder, **options)


def find_fields(record: Record, where: str) -> tuple[str, ...]:
    """Returns the fields of a record's anchor, positive and negatives.

    Raises:
      NaloraError: no pair of known names.
    """
    for pair in _PAIRS:
        if all(isinstance(record.get(name), str) for name in pair):
            negatives = []
            for name in record:
                number = name.removeprefix(f"{_NEGATIVE}_")
                if name == _NEGATIVE or (number != name and number.isdecimal()):
                    negatives.append(name)
            return (*pair, *negatives)
    known = ", ".join("/".join(pair) for pair in _PAIRS)
    raise NaloraError(
        where,
        expected=f"two fields with texts, of {known}",
        found=f"the fields {', '.join(record)}",
        remedy="name the fields with the texts: --kind embed:fields=FIRST/SECOND",
    )


def group_losses(
    loss: str, scale: float, vectors: jax.Array, real: jax.Array, scores: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of each group, ``[groups]``, whose mean over real groups is the batch's, and
    metrics of the same shape.

    Args:
      loss: one of `EMBEDDING_LOSSES` except "auto", which plans without records read as "infonce".
      scale: of the cosines.
      vectors: ``[groups, texts, d]``.
      real: ``[groups]``, 0 for padding.
      scores: ``[groups]``, of scored pairs.
    """
    if loss == "cosine":
        return cosine_losses(vectors, scores), {}
    if loss == "cosent":
        # One number for all pairs, which is its own mean.
        return jnp.full_like(real, cosent_loss(vectors, scores, real, scale)), {}
    losses, nearest = contrastive_losses(vectors, real, scale)
    return losses, {"accuracy": nearest}


KIND = pooled_kind(TextVectors())
