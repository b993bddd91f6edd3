"""Runs on one vector of each text: heads that classify or give rewards, and embeddings.

The kinds share their data (`nalora_jax.data.pooled_texts`), the objective of this module, and what
they do not support. A kind is a `PooledTask`, of which `pooled_kind` makes a `Kind`. A head is a
float32 array at `nalora_jax.models.targets.SCORE` among the trained leaves. So optimizer,
checkpoints and resumption treat it as they treat adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.program import Assembly
from nalora_jax.config import RunConfig
from nalora_jax.config.checks import Limits, trained_tables
from nalora_jax.data.pooled_texts import (
    PooledItem,
    RecordForm,
    digest_items,
    held_out_texts,
    pooled_data,
)
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_held_out
from nalora_jax.evaluate.pooled_evaluation import PooledEvaluator
from nalora_jax.kinds import text
from nalora_jax.kinds.inputs import (
    check_longest,
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.record import (
    Arrays,
    Inputs,
    Job,
    Kind,
    kind_settings,
    register_kind,
    run_kind,
)
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch, Evaluated, TrainState
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.pooled_losses import apply_score, pool_segments
from nalora_jax.weights.model_files import LoadedModel, open_files

# Returns the loss of each record of a batch, ``[rows, records]``, and metrics of the same shape,
# of the vectors or outputs ``[rows, records, texts, width]``.
PooledLosses = Callable[[jax.Array, Batch], tuple[jax.Array, Mapping[str, jax.Array]]]


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


class PooledTask(ABC):
    """The parts in which kinds on vectors of texts differ; their order is that of a run.

    Attributes:
      name: of the kind.
      settings: dataclass of its settings.
      rate: factor of the automatic learning rate.
    """

    name: ClassVar[str]
    settings: ClassVar[type]
    rate: ClassVar[float] = 1 / 4

    def limits(self, config: RunConfig) -> Iterator[Limits]:
        """Yields the values that other settings may have, or raises NaloraError for settings of the
        kind."""
        yield from pooled_limits(config, self.name)

    @abstractmethod
    def open_form(
        self, config: RunConfig, train: Source, base: ModelConfig
    ) -> tuple[RunConfig, RecordForm]:
        """Returns settings that state what the training records decide, and the form of the
        records.

        Raises:
          NaloraError: records that contradict each other or the settings.
        """

    def pooling(self, config: RunConfig) -> str:
        """Returns how tokens become a vector, one of `nalora_jax.ops.pooled_losses.POOLINGS`."""
        return "last"

    def texts(self, config: RunConfig) -> int:
        """Returns the number of texts of a record."""
        return 1

    def outputs(self, config: RunConfig) -> int:
        """Returns the number of outputs of the head; 0 without a head."""
        return 0

    def labels(self, config: RunConfig) -> int:
        """Returns the number of labels of a record."""
        return 0

    @abstractmethod
    def losses(self, config: RunConfig, plain: NextToken) -> PooledLosses:
        """Returns the losses of records."""

    @abstractmethod
    def evaluator(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        form: RecordForm,
        config: RunConfig,
        mesh: Mesh | None,
    ) -> PooledEvaluator:
        """Returns the evaluator of held-out records."""

    @abstractmethod
    def trained_form(self, model: AdaptedModel, config: RunConfig) -> RecordForm:
        """Returns the form of the records that a trained adapter reads.

        Raises:
          NaloraError: the adapter is of another kind.
        """

    def export_options(self, job: Job) -> dict[str, Any]:
        """Returns further arguments of `nalora_jax.kinds.text.export_run`."""
        return {}


def pooled_kind(task: PooledTask) -> Kind:
    """Registers and returns the kind of run of a task."""
    return register_kind(
        replace(
            text.KIND,
            name=task.name,
            open_inputs=partial(open_texts, task),
            evaluator=partial(run_evaluator, task),
            export_run=partial(export_pooled, task),
            evaluate=partial(trained_evaluator, task),
            program_parts=partial(objective_parts, task),
            settings=task.settings,
            limits=task.limits,
            rate=task.rate,
            outputs=task.outputs,
            batch_arrays=partial(record_arrays, task),
            subject="",
        )
    )


def open_texts(
    task: PooledTask, config: RunConfig, source: Mapping[str, Source] | None
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
    config, form = task.open_form(config, train, base)
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


def objective_parts(
    task: PooledTask, config: RunConfig, processor: Any
) -> dict[str, Any]:
    """Returns the objective of a task, for `nalora_jax.assembly.program.assemble`."""
    pooling = task.pooling(config)
    texts = task.texts(config)

    def objective(plain: NextToken) -> PooledObjective:
        """Returns the objective on a model."""
        return PooledObjective(plain, pooling, texts, task.losses(config, plain))

    return {"objective": objective}


def run_evaluator(
    task: PooledTask,
    inputs: Inputs,
    loaded: LoadedModel,
    assembly: Assembly,
    items: Any,
) -> PooledEvaluator:
    """Returns the evaluator of some held-out records of a run."""
    mesh = distributed.multi_device_mesh(assembly.mesh)
    form = inputs.data.form
    return task.evaluator(assembly.eval_model, items, form, inputs.config, mesh)


def trained_evaluator(
    task: PooledTask,
    model: AdaptedModel,
    config: RunConfig,
    mesh: Mesh | None,
    named: bool,
) -> PooledEvaluator:
    """Returns the evaluator of a trained adapter on held-out records.

    See `nalora_jax.kinds.text.adapter_evaluator`.
    """
    form = task.trained_form(model, config)
    data = config.data
    records = open_held_out(data, data.eval_split)
    context = model.base.config.max_positions
    tokenizer = model.base.tokenizer
    items, others = held_out_texts(records, data, tokenizer, form, context)
    if named and not data.eval_limit:
        # All of another data set: no record selects a checkpoint.
        items = [*items, *others]
    return task.evaluator(model.module, items, form, config, mesh)


def export_pooled(
    task: PooledTask,
    job: Job,
    folder: Path,
    state: TrainState,
    share: Callable[[str], None],
) -> AdapterSpec:
    """Writes PEFT files of the adapter and its head; see `nalora_jax.kinds.text.export_run`."""
    return text.export_run(job, folder, state, share, **task.export_options(job))


def record_arrays(
    task: PooledTask, config: RunConfig, base: ModelConfig, images: int
) -> Arrays:
    """Returns the arrays of a batch besides those of text, see `Kind`."""
    arrays: Arrays = {"records": ((1,), "float32")}
    labels = task.labels(config)
    if labels:
        arrays["labels"] = ((1, labels), "float32")
    return arrays


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
