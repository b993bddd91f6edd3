"""Runs on one vector of each text: heads that classify or give rewards, and embeddings.

The kinds share their data (`nalora_jax.data.pooled_texts`), the objective of this module, and what
they do not support. A head is a float32 array at `nalora_jax.models.targets.SCORE` among the
trained leaves. So optimizer, checkpoints and resumption treat it as they treat adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.config import RunConfig
from nalora_jax.config.checks import Limits, trained_tables
from nalora_jax.data.pooled_texts import (
    RecordForm,
    digest_items,
    held_out_texts,
    pooled_data,
)
from nalora_jax.data.source import Source
from nalora_jax.kinds.inputs import (
    check_longest,
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.record import Inputs, kind_settings, run_kind
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.ops.pooled_losses import apply_score, pool_segments
from nalora_jax.weights.model_files import open_files

# Returns the loss of each record of a batch, ``[rows, records]``, and metrics of the same shape,
# of the vectors or outputs ``[rows, records, texts, width]``.
PooledLosses = Callable[[jax.Array, Batch], tuple[jax.Array, Mapping[str, jax.Array]]]
# Returns the form of the records and the settled settings, of the training records.
OpenForm = Callable[[RunConfig, Source], tuple[RunConfig, RecordForm]]


@dataclass(frozen=True)
class PooledObjective:
    """`nalora_jax.method.step.Objective` of texts that are read as one vector each.

    Attributes:
      text: the model.
      pooling: see `nalora_jax.ops.pooled_losses.pool_segments`.
      texts: number of texts of a record.
      losses: of the vectors, or of a head's outputs.
    """

    text: NextToken
    pooling: str
    texts: int
    losses: PooledLosses

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has the arrays of text and those of `nalora_jax.data.pooled_texts.PooledData`.
        """
        hidden = self.text.hidden(variables, batch, key)
        real = batch["records"]
        rows, records = real.shape
        outputs = pool_segments(
            hidden,
            batch["segment_ids"],
            batch["positions"],
            records * self.texts,
            self.pooling,
        )
        if "score" in variables["lora"]:
            outputs = apply_score(outputs, variables["lora"]["score"]["kernel"])
        # [rows, records * texts, width] -> [rows, records, texts, width]
        grouped = outputs.reshape(rows, records, self.texts, -1)
        losses, measured = self.losses(grouped, batch)
        sums = {name: jnp.sum(real * values) for name, values in measured.items()}
        return Evaluated(jnp.sum(real * losses), jax.lax.stop_gradient(sums))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of real tokens and of records."""
        return self.text.counts(batch)[0], jnp.sum(batch["records"])


def open_texts(
    config: RunConfig, source: Mapping[str, Source] | None, open_form: OpenForm
) -> Inputs:
    """Opens the model's files and the records, tokenizes them and settles the settings.

    Raises:
      NaloraError: a model or records that cannot be read, texts that do not fit, or too few held
        out.
    """
    files = open_files(resolve_base(config))
    # raises for rules that match nothing, before data is tokenized
    base, tokenizer, _ = describe_base(config, files)
    context = base.max_positions
    train, held = open_records(config.data, source)
    config, form = open_form(config, train)
    shape = stream_shape(config) | {"context": context}
    data = pooled_data(train, config.data, tokenizer, form, **shape)
    check_longest(int(data.store.lengths().max()), base)
    config = replace(
        config, data=replace(config.data, max_length=data.pattern.capacity)
    )
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "rows of texts")
    items = held_out_texts(held, config.data, tokenizer, form, context)
    questions = {
        "reported": digest_items(items[0]),
        "selecting": digest_items(items[1]),
    }
    # The number of outputs of the head is known now.
    adapters = run_kind(config).adapters(config, base)
    return Inputs(config, base, files, data, items, questions, adapters=adapters)


def with_settings(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns a config whose ``--kind`` has these settings of the kind, in place of open ones."""
    settings = replace(kind_settings(config), **changes)
    texts = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            texts.append(f"{field.name}={_written(value)}")
    name = run_kind(config).name
    if texts:
        name += f":{','.join(texts)}"
    return replace(config, kind=name)


def _written(value: Any) -> str:
    """Returns the text of a setting, as `nalora_jax.common.registry.settings_from` reads it."""
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value)


def pooled_limits(config: RunConfig, name: str) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on vectors of texts."""
    rows: dict[str, tuple[Any, ...]] = {
        "data.loss_last": (0,),
        "data.too_long": ("drop", "truncate", "error"),
        "vision.task": ("",),
        "mesh.context": (0, 1),
        "lora.init": ("default", "zero_a", "pissa"),
    }
    yield Limits(f"--kind {name}, which reads whole texts", rows)
    trained = {"adapter": ("",), "tune": ((),)}
    yield Limits(f"--kind {name}, which trains new adapters", trained)
    tables = {"lora.modules_to_save": ((),), "lora.trainable_token_indices": ((),)}
    if trained_tables(config):
        yield Limits(f"--kind {name}, which reads no output head", tables)
