"""The program of a run: model, mechanisms, optimizer and step; its assembly adds weights and a
state.

A program computes nothing, so that its devices may be abstract. Kinds of runs give the program of a
decoder their objective and their module.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import chex
import jax
import optax
from jax.sharding import Mesh

from nalora_jax.assembly.adalora import adalora
from nalora_jax.assembly.mechanisms import layer_metrics, mechanisms_of
from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.optimizers import make_optimizer, resolve_learning_rate
from nalora_jax.assembly.state_metrics import StateMetrics
from nalora_jax.common.devices import TENSOR
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed, sharding
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.measurement import (
    CHECK_FAILED,
    CHECKS,
    GateChecks,
    GateStatsConfig,
    require_sound,
)
from nalora_jax.method.step import (
    Objective,
    Step,
    StepConfig,
    TrainState,
    init_state,
    make_train_step,
)
from nalora_jax.method.transform import Mechanisms, nalora
from nalora_jax.method.tuned import keep_other_layers, remove_tuned
from nalora_jax.models.adapters import adapter_shapes, adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.remat import select_expert_kernel, select_remat
from nalora_jax.models.stacks import gate_blocks, key_heads, stacks
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.ops.losses import Head
from nalora_jax.ops.shardings import Shardings
from nalora_jax.ops.split_rows import block_length
from nalora_jax.ops.storage import prepare

_STEPS = itertools.count()


# Builds the step of an assembly, not compiled, for other values of its settings: adapters of its
# projections with other scales or larger ranks, mechanisms with its memory, and numbers of the
# optimizer (`make_optimizer`).
PureStep = Callable[[AdapterSpec, Mechanisms, Mapping[str, Any]], Step]


@dataclass(frozen=True)
class RunProgram:
    """The parts of a run that compute nothing, so that devices may be abstract."""

    config: RunConfig
    model: Any  # Decoder or DualEncoder
    spec: AdapterSpec
    mesh: Mesh
    mechanisms: Mechanisms
    optimizer: optax.GradientTransformationExtraArgs
    blocks: dict[str, tuple[int, ...]]  # channel shape of each measured block
    pure: PureStep  # builds the step that is not compiled

    @property
    def eval_model(self) -> Any:
        """Returns the decoder for evaluation and generation.

        It has no rematerialization and no sharding constraints except for the expert routing.
        """
        stats = None
        if self.model.stats:
            stats = replace(self.model.stats, sharding=None)
        routed = Shardings(routed=self.model.shardings.routed)
        return self.model.clone(remat="none", stats=stats, shardings=routed)

    def fresh(self, lora: Any, key: jax.Array) -> TrainState:
        """Returns the state before the first step, for adapters and the data of a random key."""
        # The seed 0 of `init_state` is replaced by the key, which may be traced.
        return init_state(lora, self.optimizer, 0)._replace(key=key)

    def places(self, lora: Any) -> Any:
        """Returns the shardings of the state; ``lora`` has the adapters or their shapes."""
        # Nothing is computed: only shapes are needed, and devices may be abstract.
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        state = jax.eval_shape(self.fresh, lora, key)
        return sharding.shardings(state, self.mesh, sharding.STATE_RULES)

    def compiled_step(self, places: Any) -> Step:
        """Returns the step, which is traced once, compiled on first use, and donates the state.

        It checks values if gates are checked. ``places`` are the shardings of the state.
        """
        step = self.pure(self.spec, self.mechanisms, {})
        # Chex counts traces by name and call site; a process may run twice.
        step.__name__ = f"train_step_{next(_STEPS)}"
        step = chex.assert_max_traces(step, n=1)
        step.__name__ = "train_step"  # the name is part of the compilation cache's key
        compiled = jax.jit(
            step,
            # The state.
            donate_argnums=(1,),
            out_shardings=(places, distributed.replicated_sharding(self.mesh)),
            compiler_options=distributed.compiler_options(self.mesh),
        )
        if self.config.debug.check_gates:
            return _checked(compiled)
        return compiled


def _is_no_reminder(record: logging.LogRecord) -> bool:
    """Returns False for Chex's reminder at exit of unawaited checks; here all are awaited."""
    return "chexify assertion statuses were not inspected" not in str(record.msg)


def _checked(step: Step) -> Step:
    """Returns the step with value checks; a failed check raises this library's error."""
    armed = chex.chexify(step, async_check=False)
    logging.getLogger("absl").addFilter(_is_no_reminder)

    def run(params: Any, state: TrainState, batch: Any) -> Any:
        """Runs the step and converts the errors of failed checks; other assertions pass."""
        try:
            return armed(params, state, batch)
        except AssertionError as error:
            if CHECK_FAILED not in str(error):
                raise
            raise NaloraError(
                "--debug.check-gates",
                expected="the formulas of docs/method.md in every gate",
                found=str(error).split("[failed at")[0].strip(),
                remedy="report this with the model's name and the settings of the run",
            ) from error

    return run


# Returns a kind's objective, given the cross-entropy of the next token, and that of a teacher if
# there is one.
MakeObjective = Callable[..., Objective]


@dataclass(frozen=True)
class Teacher:
    """A second decoder of a step, whose weights and adapters are not trained."""

    base: ModelConfig
    adapters: AdapterSpec = field(default_factory=AdapterSpec)
    is_base: bool = True  # its weights are the run's base, and are not stored again


def check_decoder(config: RunConfig, base: ModelConfig, mesh: Mesh) -> None:
    """Checks that the mesh splits no attention head and no row that must be whole, and that
    adapters of a vision-language model have the default initialization."""
    distributed.check_heads(
        mesh.shape[TENSOR], n_heads=base.n_heads, n_kv_heads=key_heads(base)
    )
    check_context(config, base, mesh)
    if base.vision is None:
        return
    if config.lora.init != "default":
        expected = "default for a vision-language model"
        raise NaloraError("--lora.init", expected=expected, found=config.lora.init)
    heads = base.vision.tower.n_heads
    distributed.check_heads(mesh.shape[TENSOR], n_heads=heads, n_kv_heads=heads)


def decoder_program(
    config: RunConfig,
    base: ModelConfig,
    spec: AdapterSpec,
    mesh: Mesh,
    *,
    last: optax.GradientTransformation | None = None,
    objective: MakeObjective | None = None,
    module: type[Decoder] = Decoder,
    model: Decoder | None = None,
    teacher: Teacher | None = None,
) -> RunProgram:
    """Returns the program of a decoder.

    Args:
      config, base, mesh, last, objective, module, teacher: see `assemble`.
      spec: the adapters.
      model: of another program that this one shares it with.
    """
    if model is None:
        model = build_model(config, base, spec, mesh, module)

    def objective_of(model: Decoder) -> Objective:
        plain = next_token(base, model, config.compute)
        if objective is None:
            return plain
        if teacher is None:
            return objective(plain)
        return objective(plain, teacher_tokens(config, teacher, mesh))

    lora = adapter_shapes(base, spec)
    blocks = measured_blocks(base, spec)
    config = resolve_learning_rate(config, base.d_model)
    return run_program(
        config, model, lora, mesh, objective_of, blocks, base.activation, last=last
    )


def teacher_tokens(config: RunConfig, teacher: Teacher, mesh: Mesh) -> NextToken:
    """Returns the next tokens of a teacher, with the layout of a model in training."""
    model = build_model(config, teacher.base, teacher.adapters, mesh)
    return next_token(teacher.base, model, config.compute)


def build_model(
    config: RunConfig,
    base: ModelConfig,
    spec: AdapterSpec,
    mesh: Mesh,
    module: type[Decoder] = Decoder,
) -> Decoder:
    """Builds the decoder for training steps.

    Args:
      config, base, spec, mesh: settings, architecture, adapters and devices.
      module: its class, with an image tower for a ``base`` with one.
    """
    compute = config.compute
    numerics = numerics_for(compute.dtype, platform_of(mesh), compute.implementation)
    channels = [shape for shape, _ in measured_blocks(base, spec).values()]
    shardings = sharding.step_shardings(
        mesh, adapter_shapes(base, spec), channels, base
    )
    return module(
        base,
        spec,
        numerics,
        remat=select_remat(compute.remat, base.d_model, numerics),
        stats=gate_stats(config, shardings),
        shardings=shardings,
        experts=select_expert_kernel(compute.experts, compute.remat),
    )


def gate_stats(config: RunConfig, shardings: Shardings) -> GateStatsConfig:
    """Returns the measurements of a run's gates, with the checks of ``--debug.check-gates`` if they
    are on."""
    compute = config.compute
    debug = config.debug
    return GateStatsConfig(
        compute.stats_stride,
        compute.probe_stride,
        compute.stats_positions,
        checks=GateChecks(debug.tolerance) if debug.check_gates else None,
        sharding=shardings.rows,
    )


def run_program(
    config: RunConfig,
    model: Any,
    lora: Any,
    mesh: Mesh,
    objective: Callable[[Any], Objective],
    blocks: Mapping[str, tuple[tuple[int, ...], str]],
    activation: str,
    *,
    last: optax.GradientTransformation | None = None,
) -> RunProgram:
    """Returns the program of a model.

    Args:
      config: the run's settings, with a concrete learning rate.
      model: for training steps, with the run's adapters.
      lora: the adapters, or their shapes.
      mesh, last: see `assemble`.
      objective: makes the objective of a model that differs from ``model`` in the values of its
        adapters.
      blocks: channel shape and activation of each measured block, by path.
      activation: of most blocks.
    """
    gates = find_gates(lora)
    spec = model.adapters
    optimizer_settings = config.optimizer
    shapes = {path: shape for path, (shape, _) in blocks.items()}
    activations = {path: name for path, (_, name) in blocks.items()}
    mechanisms = mechanisms_of(config, activation, activations, gates)

    def optimizer(
        mechanisms: Mechanisms, numbers: Mapping[str, Any]
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the run's optimizer: base optimizer, mechanisms, ``last``, and AdaLoRA around
        all.

        ``numbers`` are values that a sweep varies, see `make_optimizer`.
        """
        inner = make_optimizer(
            optimizer_settings, config.steps, config.lora.plus_ratio, numbers
        )
        whole = nalora(inner, mechanisms, gates)
        if last is not None:
            whole = optax.with_extra_args_support(optax.chain(whole, last))
        if spec.tuned_layers:
            others = keep_other_layers(spec.tuned_layers)
            whole = optax.with_extra_args_support(optax.chain(whole, others))
        if spec.adalora:
            clip = optimizer_settings.clip_norm
            return adalora(whole, config.adalora, spec, config.steps, clip_norm=clip)
        return whole

    options: dict[str, Any] = {}
    if config.debug.check_gates:
        # Experts count their own tokens, and blocks of image and text towers read others than the
        # batch's.
        flat = [path for path, shape in shapes.items() if len(shape) == 2]
        readers = [path for path in flat if path.startswith("layers/")]
        options["checks"] = tuple(CHECKS)
        options["verify"] = partial(require_sound, config=model.stats, readers=readers)

    def pure(
        adapters: AdapterSpec, mechanisms: Mechanisms, numbers: Mapping[str, Any]
    ) -> Step:
        """Builds the step of `PureStep`, not compiled."""
        # In a sweep whose runs have a device each, the step is a program of one device.
        numerics = replace(model.numerics, platform=distributed.platform_of_step(mesh))
        module = model.clone(adapters=adapters, numerics=numerics)
        metrics = layer_metrics(mechanisms)
        settings = StepConfig(
            mechanisms,
            shapes,
            model.shardings,
            metrics=metrics,
            tuned_layers=spec.tuned_layers,
            **options,
        )
        return make_train_step(
            optimizer(mechanisms, numbers), settings, objective(module)
        )

    return RunProgram(
        config, model, spec, mesh, mechanisms, optimizer(mechanisms, {}), shapes, pure
    )


def measured_blocks(
    base: ModelConfig, spec: AdapterSpec
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns channel shape and activation by path of each block whose gates are measured.

    These are the blocks of the decoder's layers, and other blocks, as of an image tower, only if
    they have adapters.
    """
    adapted = {path.rpartition("/")[0] for path, _ in spec.targets}
    blocks = gate_blocks(base).items()
    return {
        path: block
        for path, block in blocks
        if path.startswith("layers/") or path in adapted
    }


def next_token(base: ModelConfig, model: Decoder, compute: ComputeConfig) -> NextToken:
    """Returns the cross-entropy of a model's next tokens, with the model's shardings."""
    return NextToken(
        model,
        Head(base.tie_embeddings, base.final_softcap, base.logit_scale),
        model.numerics,
        compute.loss_chunk,
        model.shardings,
    )


log = logging.getLogger(__name__)


def check_context(config: RunConfig, base: ModelConfig, mesh: Mesh) -> None:
    """Checks that an axis "context" can split the rows of a run; logs a line if it pads them.

    Raises:
      NaloraError: a part of the model or of the run needs whole rows, or rows are too short.
    """
    shards = distributed.context_size(mesh)
    if shards == 1:
        return
    # Layers that are no attention, e.g. recurrent ones, may need whole rows.
    mixers = {stack.config.mixer for stack in stacks(base)} - {None}
    whole = sorted(
        mixer.name for mixer in mixers if mixer is not None and not mixer.splits_rows
    )
    if whole:
        raise context_error(
            shards, f"the layers {', '.join(whole)} of {base.model_type}"
        )
    if base.attn_dropout:
        raise context_error(
            shards, f"the attention dropout of {base.model_type} ({base.attn_dropout})"
        )
    # Causal attention is balanced if each device has an early and a late block of a row.
    seq = config.data.max_length
    if seq and (padded := 2 * shards * block_length(seq, shards)) != seq:
        log.info(
            "rows of %d tokens are padded to %d: two blocks on each of --mesh.context %d",
            seq,
            padded,
            shards,
        )


def context_error(shards: int, cause: str) -> NaloraError:
    """Returns the error of a run that cannot split rows."""
    return NaloraError(
        "--mesh.context",
        expected=f"1: {cause} cannot be split along the tokens of a row",
        found=shards,
        remedy="use --mesh.fsdp or --mesh.tensor for these devices",
    )


@dataclass(frozen=True)
class Assembly(RunProgram):
    """A compiled training run: a program with weights and an initial state."""

    state: TrainState  # before the first step, on the mesh
    params: Any  # frozen base weights, minus the initial update of adapters with B != 0
    step: Step  # compiled on first use; donates the state
    begin: Callable[[Any, int], TrainState]  # initial state for an adapter and a seed
    state_metrics: StateMetrics  # compiled on first use
    initial: Any = None  # adapters before the first step in host memory, if B != 0
    # Further frozen collections of the step by name, such as those of a teacher.
    frozen: Mapping[str, Any] = field(default_factory=dict)

    def view(self, params: Any) -> Any:
        """Returns ``params`` in the layout that the step runs fastest on, without a copy.

        See `nalora_jax.ops.storage.prepare`.
        """
        return {**prepare({"params": params}, self.model.numerics), **self.frozen}


def assemble(
    config: RunConfig,
    base: ModelConfig,
    params: Any,
    mesh: Mesh,
    *,
    spec: AdapterSpec | None = None,
    last: optax.GradientTransformation | None = None,
    objective: MakeObjective | None = None,
    module: type[Decoder] = Decoder,
    like: Assembly | None = None,
    teacher: Teacher | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run on a decoder; the adapters start at zero
    (`nalora_jax.assembly.start`).

    Args:
      config: the run's settings, checked.
      base: architecture of the base model.
      params: its weights on ``mesh``.
      mesh: the run's devices.
      spec: the adapters, if they are known; by the rules of the settings by default.
      last: transform applied to the updates after all transforms of the config.
      objective: makes the run's objective of the cross-entropy of the next token, which is the
        objective by default, and of the teacher's if there is one.
      module: class of the model.
      like: an assembly with the same program. With the same adapters, its compiled functions are
        shared.
      teacher: a second model of the step; its arrays are in `Assembly.frozen`.

    Raises:
      NaloraError: rules that match nothing or ask for impossible ranks, a variant that the model
        does not have, rows that the tables do not have, or a tensor axis that splits a head.
    """
    check_decoder(config, base, mesh)
    if spec is None:
        spec = adapter_spec(config, base)
    lora = init_lora(base, spec, jax.random.key(config.seed), params)
    params = remove_tuned(params, lora)
    if like is None or like.spec != spec:
        program = decoder_program(
            config,
            base,
            spec,
            mesh,
            last=last,
            objective=objective,
            module=module,
            teacher=teacher,
        )
        return build_assembly(program, params, lora)
    program = decoder_program(
        config,
        base,
        spec,
        mesh,
        last=last,
        objective=objective,
        model=like.model,
        teacher=teacher,
    )
    # The compiled functions of `like` are shared; the values belong to this run.
    changes: dict[str, Any] = {"state": like.begin(lora, config.seed), "params": params}
    changes |= {"mechanisms": program.mechanisms, "pure": program.pure, "initial": None}
    return replace(like, config=config, **changes)


def build_assembly(program: RunProgram, params: Any, lora: Any) -> Assembly:
    """Returns the assembly of a program with weights and initial adapters, whose B is 0."""
    places = program.places(lora)
    seed = program.config.seed
    compiled = jax.jit(program.fresh, out_shardings=places)

    def begin(lora: Any, seed: int) -> TrainState:
        # The seed is an argument, so that all seeds share one program.
        return compiled(lora, jax.random.key_data(jax.random.key(seed)))

    return Assembly(
        **vars(program),
        state=begin(lora, seed),
        params=params,
        step=program.compiled_step(places),
        begin=begin,
        state_metrics=StateMetrics(program.mechanisms, program.spec, program.mesh),
    )
