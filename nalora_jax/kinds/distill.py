"""Runs that learn a teacher's next-token distributions, see `nalora_jax.ops.divergences`.

The teacher is a second, frozen decoder in the compiled step: another adapter of the same base, the
base after a longer prompt, or another model with the same vocabulary (`nalora_jax.kinds.teachers`).
Weights that it has in common with the student are the same arrays. The divergence's gradient by the
student's hidden states is computed in chunks of logits together with its value; a surrogate has
this gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import ADAPTED, NextToken, through_surrogate
from nalora_jax.assembly.program import Assembly, next_token, teacher_tokens
from nalora_jax.common.folders import RunFolder
from nalora_jax.config import DistillConfig, RunConfig
from nalora_jax.config.checks import Limits, check_divides, require
from nalora_jax.config.settings import UNCHANGED
from nalora_jax.data.forms import uses_chat_template
from nalora_jax.data.prompts import held_out_prompts
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_held_out
from nalora_jax.data.taught_text import held_out_taught, taught_data, taught_digest
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.distillation_evaluation import (
    DistillationEvaluator,
    ScoreTokens,
    TaughtRows,
)
from nalora_jax.evaluate.evaluator import variables_of
from nalora_jax.kinds import text
from nalora_jax.kinds.inputs import (
    check_longest,
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.on_policy import (
    OnPolicyEvaluator,
    SampledStep,
    StudentPrompts,
    student_prompts,
    write_prompts,
)
from nalora_jax.kinds.record import Arrays, Built, Inputs, Job, register_kind
from nalora_jax.kinds.rl.kind import (
    prompts_digest,
    server_limits,
    server_pool,
    tried_servers,
)
from nalora_jax.kinds.teachers import (
    OpenedTeacher,
    describe_teacher,
    load_teacher,
    open_teacher,
)
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.divergences import Divergences, TeacherLogits, token_divergences
from nalora_jax.ops.split_rows import join_parts
from nalora_jax.weights.model_files import LoadedModel, ModelFiles, open_files

# The frozen collection of a teacher.
TEACHER = "teacher"
# Characters of a token, to estimate the length of a system prompt that is not tokenized.
_CHARACTERS = 4


@dataclass(frozen=True)
class Distillation:
    """`nalora_jax.method.step.Objective`: the divergence from a teacher, per loss token.

    Attributes:
      student: the next tokens of the model in training.
      teacher: those of the teacher.
      config: the divergence.
    """

    student: NextToken
    teacher: NextToken
    config: DistillConfig

    def loss(
        self,
        variables: Mapping[str, Any],
        params: Any,
        batch: Batch,
        key: jax.Array,
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has the arrays of text; if the teacher reads other rows, also those of
        `nalora_jax.data.taught_text`. ``agreement`` is measured: the share of tokens at which both
        models' most likely token is the same.
        """
        hidden = self.student.hidden(_without_teacher(variables), batch, key)
        results = self.divergences(variables, params, batch, hidden)
        # Its gradient by the hidden states is the divergence's.
        surrogate = jnp.sum(hidden.astype(jnp.float32) * results.gradient)
        measured = {"agreement": jnp.sum(results.agreements)}
        return through_surrogate(jnp.sum(results.losses), surrogate, measured)

    def divergences(
        self,
        variables: Mapping[str, Any],
        params: Any,
        batch: Batch,
        hidden: jax.Array,
        *,
        grad: bool = True,
    ) -> Divergences:
        """Returns the results of `token_divergences` in the layout of `NextToken.parts`.

        Args:
          variables, params, batch: see `loss`.
          hidden: the student's hidden states.
          grad: also compute the gradient.
        """
        student = self.student
        return token_divergences(
            hidden,
            student.kernel(params),
            self._teacher(variables, batch),
            student.parts(batch["loss_weights"]),
            self.config.beta,
            self._tempered(student),
            student.numerics,
            grad=grad,
            chunk=student.loss_chunk,
            compact=student.is_compact,
            shards=student.batch_shards,
        )

    def scores(
        self, variables: Mapping[str, Any], params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Returns divergence and agreement of every loss token, ``[rows, seq]`` each, without
        dropout."""
        hidden = self.student.exact_hidden(_without_teacher(variables), batch)
        results = self.divergences(variables, params, batch, hidden, grad=False)
        rows = self.student.shardings.rows
        seq = batch["tokens"].shape[1]
        losses = join_parts(results.losses, rows, seq)
        return losses, join_parts(results.agreements, rows, seq)

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the numbers of real tokens and of loss tokens."""
        return self.student.counts(batch)

    def _teacher(self, variables: Mapping[str, Any], batch: Batch) -> TeacherLogits:
        """Returns the teacher's hidden states at the student's positions, and its head."""
        teacher = self.teacher
        collections = variables.get(TEACHER, {})
        weights = collections.get("weights")
        if weights is None:
            weights = {}
            for name, tree in _without_teacher(variables).items():
                if name not in ADAPTED:
                    weights[name] = tree
        of_teacher = dict(weights)
        if "lora" in collections:
            lora = collections["lora"]
            if teacher.shardings.adapters is not None:  # gathered once, for all layers
                lora = lax.with_sharding_constraint(lora, teacher.shardings.adapters)
            of_teacher["lora"] = lora
        rows: Batch = batch
        if "teacher_tokens" in batch:
            rows = {
                name: batch[f"teacher_{name}"]
                for name in ("tokens", "positions", "segment_ids")
            }
        hidden = teacher.exact_hidden(of_teacher, rows)
        if "teacher_tokens" in batch:
            # [rows, teacher's seq, d_model] -> [rows, seq, d_model]
            places = batch["teacher_places"][:, :, None]
            hidden = jnp.take_along_axis(hidden, places, axis=1)
        kernel = teacher.kernel(weights["params"])
        return TeacherLogits(hidden, kernel, self._tempered(teacher))

    def _tempered(self, model: NextToken) -> Any:
        """Returns a head whose logits are divided by the temperature: c tanh(s x / c) / T has
        scale s / T and cap c / T."""
        head = model.head
        t = self.config.temperature
        return head._replace(scale=head.scale / t, softcap=head.softcap / t)


def _without_teacher(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of the student."""
    return {name: tree for name, tree in variables.items() if name != TEACHER}


def program_parts(config: RunConfig, processor: Any) -> dict[str, Any]:
    """Returns the arguments of `nalora_jax.assembly.program.assemble` for a distillation, besides
    its teacher."""
    return {"objective": partial(Distillation, config=config.distill)}


# ---------------------------------------------------------------- functions of a kind


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the files of the model and of the teacher, and the data; tokenizes the data and settles
    the settings.

    Raises:
      NaloraError: a model, a teacher or data that cannot be read or do not fit each other.
    """
    files = open_files(resolve_base(config))
    base, tokenizer, adapters = describe_base(config, files)
    teacher = open_teacher(config, files, base)
    train, held = open_records(config.data, source)
    if config.distill.on_policy:
        return _open_prompts(config, files, teacher, train, held)
    turns = uses_chat_template(train.read([0])[0], config.data)
    system = config.distill.system
    shape = stream_shape(config) | {"context": base.max_positions}
    longest = teacher.program.base.max_positions
    data = taught_data(
        train, config.data, tokenizer, system, teacher_context=longest, **shape
    )
    for model in (base, teacher.program.base):
        check_longest(int(data.store.lengths().max()), model)
    config = replace(
        config, data=replace(config.data, max_length=data.pattern.capacity)
    )
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "rows")
    items = held_out_taught(
        held, config.data, tokenizer, system, data.pattern.capacity, longest
    )
    questions = {
        "reported": taught_digest(items[0]),
        "selecting": taught_digest(items[1]),
    }
    return Inputs(config, base, files, data, items, questions, turns, adapters, teacher)


def _open_prompts(
    config: RunConfig,
    files: ModelFiles,
    teacher: OpenedTeacher,
    train: Source,
    held: Source,
) -> Inputs:
    """Returns the inputs of an on-policy distillation, see `open_inputs`."""
    base, tokenizer, adapters = describe_base(config, files)
    first = train.read([0])[0]
    written = write_prompts(config, tokenizer, first)
    turns = written is not None or uses_chat_template(first, config.data)
    data = student_prompts(
        train,
        config,
        tokenizer,
        teacher_context=teacher.program.base.max_positions,
        written=written,
        context=base.max_positions,
        **stream_shape(config),
    )
    config = replace(config, data=replace(config.data, max_length=data.length))
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "samples")
    limit = data.length - config.rl.max_new_tokens
    prompts = held_out_prompts(held, config.data, tokenizer, limit, written)
    questions = {
        "reported": prompts_digest(prompts[0]),
        "selecting": prompts_digest(prompts[1]),
    }
    return Inputs(
        config, base, files, data, prompts, questions, turns, adapters, teacher
    )


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: RunFolder, like: Job | None
) -> Built:
    """Loads base and teacher, and builds adapters and the step, on-policy with its samples; see
    `text.build_step`."""
    exports = None
    if placed.rl.servers:
        exports = tried_servers(inputs, placed, output)
    built = text.build_step(inputs, placed, mesh, output, like)
    if like is not None:
        frozen = like.assembly.frozen
    else:
        loaded = cast(LoadedModel, built.loaded)
        numerics = built.assembly.model.numerics
        frozen = load_teacher(inputs.teacher, placed, loaded, mesh, numerics)
    assembly = replace(built.assembly, frozen=frozen)
    if placed.distill.on_policy:
        loaded = cast(LoadedModel, built.loaded)
        data = cast(StudentPrompts, built.data)
        folder = output.folder
        pool = None
        if exports is not None:
            pool = server_pool(placed, exports, loaded, assembly, data, folder)
        step = SampledStep(placed, loaded, assembly, data, folder, pool)
        assembly = replace(assembly, step=step)
    return built._replace(assembly=assembly)


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, items: Any
) -> DistillationEvaluator:
    """Returns the evaluator of some held-out examples."""
    config = assembly.config
    student = next_token(loaded.config, assembly.model, config.compute)
    teacher = teacher_tokens(config, inputs.teacher.program, assembly.mesh)
    objective = Distillation(student, teacher, config.distill)
    return _make_evaluator(
        inputs.config,
        assembly.eval_model,
        loaded.tokenizer,
        items,
        _scorer(objective, assembly.frozen),
        distributed.multi_device_mesh(assembly.mesh),
    )


def _make_evaluator(
    config: RunConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    items: Any,
    score: ScoreTokens,
    mesh: Mesh | None,
) -> DistillationEvaluator:
    """Returns the evaluator of held-out examples, or of held-out prompts on-policy, for settings
    with a concrete row length."""
    rows = TaughtRows(config.data.max_length, bool(config.distill.system))
    if config.distill.on_policy:
        return OnPolicyEvaluator(
            model, tokenizer, items, rows, score, config, mesh=mesh
        )
    return DistillationEvaluator(model, tokenizer, items, rows, score, mesh=mesh)


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> DistillationEvaluator:
    """Returns the evaluator of a trained adapter on held-out examples.

    See `text.adapter_evaluator`.
    """
    base = model.base.config
    files = open_files(resolve_base(config))
    opened = open_teacher(config, files, base)
    numerics = model.module.numerics
    frozen = load_teacher(opened, config, model.base, mesh, numerics)
    of_teacher = opened.program
    module = Decoder(
        of_teacher.base,
        of_teacher.adapters,
        numerics,
        shardings=model.module.shardings,
    )
    objective = Distillation(
        next_token(base, model.module, config.compute),
        next_token(of_teacher.base, module, config.compute),
        config.distill,
    )
    data = config.data
    system = config.distill.system
    records = open_held_out(data, data.eval_split)
    tokenizer = model.base.tokenizer
    items: Any
    if config.distill.on_policy:
        written = write_prompts(config, tokenizer, records.read([0])[0])
        limit = data.max_length - config.rl.max_new_tokens
        items, _ = held_out_prompts(records, data, tokenizer, limit, written)
    else:
        longest = of_teacher.base.max_positions
        items, _ = held_out_taught(
            records, data, tokenizer, system, data.max_length, longest
        )
    score = _scorer(objective, frozen)
    return _make_evaluator(config, model.module, tokenizer, items, score, mesh)


def _scorer(objective: Distillation, frozen: Mapping[str, Any]) -> ScoreTokens:
    """Returns the function that scores a batch with frozen collections of a teacher."""

    def score(
        params: Any, lora: Any | None, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        student = objective
        if lora is None:
            model = objective.student.model.clone(adapters=AdapterSpec())
            student = replace(
                objective, student=replace(objective.student, model=model)
            )
        return _scored(student, {**variables_of(params, lora), **frozen}, batch)

    return score


@partial(jax.jit, static_argnames=("objective",))
def _scored(
    objective: Distillation, variables: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns `Distillation.scores`."""
    return objective.scores(variables, variables["params"], batch)


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a distillation.

    Raises:
      NaloraError: there is no teacher.
    """
    distill = config.distill
    require(
        "--distill.teacher",
        bool(distill.kind),
        "a model or an adapter, or --distill.system",
        "none",
    )
    whole = (
        "the teacher and the divergence read the base's weights: train adapters only"
    )
    yield Limits(
        "--distill.teacher or --distill.system",
        {
            "tune": ((),),
            "lora.modules_to_save": ((),),
            "lora.trainable_token_indices": ((),),
        },
        whole,
    )
    yield Limits(
        "--distill.teacher or --distill.system",
        {
            "rl.rewards": ((),),
            "rl.environment": ("",),
            "preference.loss": ("none",),
            "vision.task": ("",),
        },
        "a run has one objective: leave one of both out",
    )
    remedy = "the teacher reads the base's kernels, which these initial adapters change"
    yield Limits(
        "--distill.teacher or --distill.system", {"lora.init": UNCHANGED}, remedy
    )
    yield from _limits_of_samples(config)
    if distill.system:
        values: dict[str, tuple[Any, ...]] = {
            "data.loss_on": ("answer", "assistant"),
            "data.loss_last": (0.0,),
            "data.too_long": ("drop", "truncate", "error"),
            # The teacher's tokens are at other places than the student's.
            "mesh.context": (0, 1),
        }
        remedy = "the teacher's rows have the same targets as the model's"
        yield Limits("--distill.system", values, remedy)


def _limits_of_samples(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that settings of samples may have; see `limits`."""
    rl = config.rl
    if not config.distill.on_policy:
        remedy = "servers draw the samples of --distill.on-policy"
        yield Limits("no --distill.on-policy", {"rl.servers": ((),)}, remedy)
        return
    values: dict[str, tuple[Any, ...]] = {
        "rl.updates": (1,),
        "rl.resample": (0,),
        "rl.staleness": (0,),
        "rl.replay_routing": (False,),
        "rl.beta": (0.0,),
        "data.loss_on": ("answer",),
        "data.loss_last": (0.0,),
    }
    remedy = "each step has new samples, and all of their tokens are in the loss"
    yield Limits("--distill.on-policy", values, remedy)
    yield from server_limits(rl)
    check_divides(config.train.batch_size, "rl.samples", rl.samples)


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the arrays of a batch besides those of text, see `Kind`.

    The length of a system prompt is estimated from its characters, once for each row.
    """
    if not config.distill.system:
        return {}
    seq = config.data.max_length
    longer = seq + -(-len(config.distill.system) // _CHARACTERS)
    row = (-(-longer // 8) * 8,)
    arrays: Arrays = {"teacher_places": ((seq,), "int32")}
    for name in ("tokens", "positions", "segment_ids"):
        arrays[f"teacher_{name}"] = (row, "int32")
    return arrays


KIND = register_kind(
    replace(
        text.KIND,
        name="distill",
        open_inputs=open_inputs,
        build_step=build_step,
        evaluator=evaluator,
        evaluate=adapter_evaluator,
        program_parts=program_parts,
        limits=limits,
        batch_arrays=batch_arrays,
        teacher=describe_teacher,
        draws_samples=lambda config: config.distill.on_policy,
        subject="",
    )
)
