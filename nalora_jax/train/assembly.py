"""Assembles a base model and a config: adapters, optimizer and the compiled step on a mesh."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed, trees
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.distributed import platform_of
from nalora_jax.errors import NaloraError
from nalora_jax.gate_checks import BROKEN, GateChecks, require_compensated
from nalora_jax.measurement import GateStatsConfig
from nalora_jax.method import statistics
from nalora_jax.method.optimizer import find_gates, nalora
from nalora_jax.method.state import Mechanisms
from nalora_jax.method.step import Objective, Step, StepConfig, TrainState, init_state, make_train_step
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.remat import chosen_remat
from nalora_jax.models.stacks import gate_blocks
from nalora_jax.models.targets import ROWS, TABLES, AdapterSpec
from nalora_jax.models.vision.decoder import decoder_for
from nalora_jax.ops.cross_entropy import Head
from nalora_jax.ops.numerics import numerics_for
from nalora_jax.ops.storage import prepare
from nalora_jax.train.adalora import adalora
from nalora_jax.train.gate_metrics import layer_metrics
from nalora_jax.train.learning_rate import with_learning_rate
from nalora_jax.train.mechanisms import make_mechanisms
from nalora_jax.train.objectives import NextToken, SeenNextToken
from nalora_jax.train.optimizers import make_optimizer
from nalora_jax.train.state_metrics import StateMetrics
from nalora_jax.weights.allocated import remaining_ranks
from nalora_jax.weights.nonzero_start import difference_as_lora, lower_kernels
from nalora_jax.weights.pissa import pissa_split

log = logging.getLogger(__name__)

_STEPS = itertools.count()


@dataclass(frozen=True)
class Assembly:
    """A compiled training run: model, optimizer, step function and initial state."""

    config: RunConfig
    model: Decoder
    spec: AdapterSpec
    mesh: Mesh
    mechanisms: Mechanisms
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState  # before the first step, on the mesh
    params: Any  # frozen base weights, minus the initial update of adapters with B != 0
    step: Step  # compiled on first use; donates the state
    begin: Callable[[Any, int], TrainState]  # initial state for an adapter and a seed
    state_metrics: StateMetrics  # compiled on first use
    initial: Any = None  # adapters before the first step in host memory, if B != 0

    @property
    def eval_model(self) -> Decoder:
        """Returns the decoder for evaluation and generation.

        It has no rematerialization and no sharding constraints except for the expert routing.
        """
        stats = replace(self.model.stats, sharding=None) if self.model.stats else None
        return self.model.clone(remat="none", stats=stats, activation_sharding=None)

    def view(self, params: Any) -> Any:
        """Returns ``params`` in the layout that the step runs fastest on, without a copy.

        See `nalora_jax.ops.storage.prepare`.
        """
        return prepare({"params": params}, self.model.numerics)


def assemble(
    config: RunConfig,
    base: ModelConfig,
    params: Any,
    mesh: Mesh,
    *,
    last: optax.GradientTransformation | None = None,
    processor: ImageProcessor | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run.

    Args:
      config: the run's settings, checked.
      base: architecture of the base model.
      params: its weights on ``mesh``.
      mesh: the run's devices.
      last: transform applied to the updates after all transforms of the config.
      processor: image processor of a vision-language model.

    Raises:
      NaloraError: rules that match nothing or ask for impossible ranks, rows that the tables do not
        have, or a tensor axis that splits a head.
    """
    distributed.check_heads(mesh, n_heads=base.n_heads, n_kv_heads=base.n_kv_heads)
    if base.sight is not None:
        if config.lora.init != "default":
            raise NaloraError("--lora.init", expected="default for a model that sees", found=config.lora.init)
        distributed.check_heads(mesh, n_heads=base.sight.tower.n_heads, n_kv_heads=base.sight.tower.n_heads)
    spec = adapter_spec(config, base)
    mechanisms = build_mechanisms(config, base, spec)
    model = build_model(base, spec, config.compute, mesh, checks=gate_checks_of(config), measured=mechanisms.statistics)
    optimizer = build_optimizer(config, base, spec, mechanisms, last)

    initial = None
    if config.lora.init == "pissa":
        params, lora = pissa_split(params, spec)
        initial = jax.tree.map(distributed.fetch, lora)
        params = _with_starts(params, lora, mesh)
    else:
        lora = init_lora(base, spec, jax.random.key(config.seed), params if spec.starts_from_base else None)

    def fresh(lora: Any, key: jax.Array) -> TrainState:
        state = init_state(lora, optimizer, measured_blocks(base, spec), mechanisms, 0)
        return state._replace(key=key)

    def begin(lora: Any, seed: int) -> TrainState:
        return compiled(lora, jax.random.key_data(jax.random.key(seed)))  # one program for all seeds

    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    placed = distributed.shardings(jax.eval_shape(fresh, lora, key), mesh, distributed.STATE_RULES)
    compiled = jax.jit(fresh, out_shardings=placed)
    step = compile_step(config, base, model, optimizer, mechanisms, mesh, placed, processor)
    state, metrics = begin(lora, config.seed), StateMetrics(mechanisms, spec, mesh)
    return Assembly(config, model, spec, mesh, mechanisms, optimizer, state, params, step, begin, metrics, initial)


def _with_starts(params: Any, lora: Any, mesh: Mesh) -> Any:
    """Adds the gates' initial adapters to ``params``; the probe measures updates from them."""
    leaves, adapters = trees.flatten(params), trees.flatten(lora)
    starts = {f"{gate}/start_{name}": adapters[f"{gate}/{name}"] for gate in find_gates(lora) for name in "ab"}
    starts = {path: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf for path, leaf in starts.items()}
    placed = distributed.shardings(starts, mesh, distributed.PARAM_RULES)
    return trees.unflatten(leaves | jax.device_put(starts, placed))


def starting_at(assembly: Assembly, lora: Any) -> Assembly:
    """Returns the assembly with initial adapters ``lora``, non-zero B, on lowered kernels.

    The kernels are lowered by the initial update of ``lora``, so the model's outputs stay the same.
    The step function is shared, and must not be compiled yet: its params now include the initial
    adapters of the gates.
    """
    initial = jax.tree.map(distributed.fetch, lora)  # a resumed run must start from the same bits
    params = _with_starts(lower_kernels(assembly.params, initial, assembly.spec), initial, assembly.mesh)
    return replace(assembly, params=params, state=assembly.begin(initial, assembly.config.seed), initial=initial)


def exportable_adapter(assembly: Assembly, lora: Any) -> tuple[Any, AdapterSpec]:
    """Returns the trained adapter as plain LoRA of the original base, in host memory.

    It is the adapter, its difference from its non-zero initialization, or the components that
    AdaLoRA kept.
    """
    lora = jax.tree.map(distributed.fetch, lora)
    if assembly.spec.adalora:
        return remaining_ranks(lora, assembly.spec)
    if assembly.initial is None:
        return lora, assembly.spec
    return difference_as_lora(lora, assembly.initial, assembly.spec)


def build_model(
    base: ModelConfig,
    spec: AdapterSpec,
    compute: ComputeConfig,
    mesh: Mesh,
    *,
    checks: GateChecks | None = None,
    measured: tuple[str, ...] = (),
) -> Decoder:
    """Builds the decoder for training steps.

    Args:
      base, spec, compute, mesh: architecture, adapters, compute settings and devices.
      checks: value checks of the gates.
      measured: statistics that mechanisms need.
    """
    numerics = numerics_for(compute.dtype, platform_of(mesh), compute.implementation)
    return decoder_for(
        base,
        spec,
        numerics,
        remat=chosen_remat(compute.remat, base.d_model, numerics),
        stats=GateStatsConfig(
            compute.stats_stride,
            compute.probe_stride,
            compute.stats_positions,
            checks=checks,
            extra=statistics.extra(measured),
            sharding=distributed.row_sharding(mesh),
        ),
        activation_sharding=distributed.row_sharding(mesh),
        routing_sharding=distributed.row_sharding(mesh) if base.n_experts else None,
        experts=compute.experts,
    )


def build_mechanisms(config: RunConfig, base: ModelConfig, spec: AdapterSpec) -> Mechanisms:
    """Returns the mechanisms of a run; none, with a warning, if no adapter is on a gate."""
    found = make_mechanisms(
        config.mechanisms,
        activation=base.activation,
        total_steps=config.steps,
        seed=config.seed,
    )
    if found.entries and not _gates(base, spec):
        labels = ", ".join(label for label, _ in found.entries)
        log.warning("no adapter sits on a gate (gate_proj or in_proj): no mechanism acts (%s)", labels)
        return replace(found, entries=())
    measured = measured_blocks(base, spec)
    others = {path: name for path, (_, name) in gate_blocks(base).items() if path in measured}
    return replace(found, others=tuple((path, name) for path, name in others.items() if name != base.activation))


def build_optimizer(
    config: RunConfig,
    base: ModelConfig,
    spec: AdapterSpec,
    mechanisms: Mechanisms,
    last: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chains inner optimizer, mechanisms on gates, ``last``, and AdaLoRA's rank allocation."""
    settings = with_learning_rate(config, base.d_model).optimizer
    inner = make_optimizer(settings, config.steps, config.lora.plus_ratio)
    optimizer = nalora(inner, _gates(base, spec), mechanisms)
    if last is not None:
        optimizer = optax.with_extra_args_support(optax.chain(optimizer, last))
    if spec.adalora:
        return adalora(optimizer, config.adalora, spec, config.steps, clip_norm=settings.clip_norm)
    return optimizer


def _gates(base: ModelConfig, spec: AdapterSpec) -> dict[str, str]:
    # `spec.linear` leaves out DoRA's magnitudes, which need the weights and are not gates.
    return find_gates(jax.eval_shape(lambda key: init_lora(base, spec.linear, key), jax.random.key(0)))


def gate_checks_of(config: RunConfig) -> GateChecks | None:
    """Returns the checks of ``--debug.check-gates``; None if they are off."""
    return GateChecks(config.debug.tolerance) if config.debug.check_gates else None


def measured_blocks(base: ModelConfig, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Returns channel shapes by block, of the decoder and of other blocks with adapters."""
    adapted = {path.rpartition("/")[0] for path, _ in spec.targets}
    blocks = gate_blocks(base).items()
    return {path: shape for path, (shape, _) in blocks if path.startswith("layers/") or path in adapted}


def head_of(base: ModelConfig) -> Head:
    """Returns the settings that map hidden states to logits."""
    return Head(base.tie_embeddings, base.final_softcap, base.logit_scale)


def head_sharding(base: ModelConfig, mesh: Mesh) -> NamedSharding | None:
    """Returns the layout of the head's kernel in the loss; None on one device.

    The kernel is split over "tensor" along the vocabulary only. The loss processes the batch in
    chunks, and a kernel that is split over "fsdp" would be gathered in each of them.
    """
    if mesh.size == 1:
        return None
    by_vocabulary = P("tensor", None) if base.tie_embeddings else P(None, "tensor")
    shape = (base.vocab_size, base.d_model) if base.tie_embeddings else (base.d_model, base.vocab_size)
    return NamedSharding(mesh, distributed.fit_spec(by_vocabulary, shape, mesh))


def _step_shardings(base: ModelConfig, spec: AdapterSpec, mesh: Mesh) -> dict[str, Any]:
    """Returns the layouts of adapters and masks within a step; empty on one device."""
    if mesh.size == 1:
        return {}
    shapes = trees.flatten(jax.eval_shape(lambda key: init_lora(base, spec.linear, key), jax.random.key(0)))
    for name in spec.saved:
        sizes = (base.vocab_size, base.d_model)
        shapes[TABLES[name]] = jax.ShapeDtypeStruct(sizes if name == "embed_tokens" else sizes[::-1], "float32")
    for name, ids in spec.own_rows(tied=base.tie_embeddings).items():
        shapes[ROWS[name]] = jax.ShapeDtypeStruct((len(ids), base.d_model), "float32")
    for path, _ in spec.targets if spec.dora else ():
        b = shapes[f"{path}/b"].shape
        shapes[f"{path}/magnitude"] = jax.ShapeDtypeStruct((*b[:-2], b[-1]), "float32")
    return {
        "lora_sharding": distributed.shardings(trees.unflatten(shapes), mesh, distributed.STEP_RULES),
        "mask_sharding": NamedSharding(mesh, _mask_spec(measured_blocks(base, spec), mesh)),
    }


def _mask_spec(blocks: dict[str, tuple[int, ...]], mesh: Mesh) -> P:
    """Returns one layout for the masks of all blocks."""
    specs = {distributed.fit_spec(P("tensor"), shape, mesh) for shape in blocks.values()}
    return specs.pop() if len(specs) == 1 else P()


def compile_step(
    config: RunConfig,
    base: ModelConfig,
    model: Decoder,
    optimizer: optax.GradientTransformationExtraArgs,
    mechanisms: Mechanisms,
    mesh: Mesh,
    placed: Any,
    processor: ImageProcessor | None = None,
) -> Step:
    """Jits the step: one trace per run, state donated, chexified if gates are checked."""
    settings = StepConfig(
        mechanisms=mechanisms,
        stats_sharding=distributed.row_sharding(mesh),
        **_step_shardings(base, model.adapters, mesh),
        metrics=layer_metrics(mechanisms),
        verify=require_compensated if config.debug.check_gates else None,
    )
    objective = text_objective(config, base, model, mesh, processor)
    return jit_step(config, make_train_step(optimizer, settings, objective), mesh, placed)


def next_token(base: ModelConfig, model: Decoder, compute: ComputeConfig, mesh: Mesh) -> NextToken:
    """Returns the cross-entropy of a model's next tokens, with the layout of the loss on a mesh."""
    return NextToken(
        model,
        head_of(base),
        model.numerics,
        compute.loss_chunk,
        distributed.batch_shards(mesh),
        head_sharding(base, mesh),
    )


def text_objective(
    config: RunConfig,
    base: ModelConfig,
    model: Decoder,
    mesh: Mesh,
    processor: ImageProcessor | None = None,
) -> Objective:
    """Returns the objective of a run on text, on conversations about images, or on preference pairs."""
    plain = next_token(base, model, config.compute, mesh)
    if config.preference.loss != "none":
        from nalora_jax.train.preference import Preference

        return Preference(plain, config.preference)
    if base.sight is None:
        return plain
    blocks = tuple(measured_blocks(base, model.adapters))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return SeenNextToken(**fields, processor=processor, measured=blocks)


def jit_step(config: RunConfig, step: Step, mesh: Mesh, placed: Any) -> Step:
    """Jits a pure step like `compile_step`; ``placed`` is the sharding of the state."""
    step.__name__ = f"train_step_{next(_STEPS)}"  # chex counts traces by name and call site; a process may run twice
    step = chex.assert_max_traces(step, n=1)
    step.__name__ = "train_step"  # the name is part of the compilation cache's key
    compiled = jax.jit(
        step,
        donate_argnums=(1,),
        out_shardings=(placed, NamedSharding(mesh, P())),
        compiler_options=distributed.compiler_options(mesh),
    )
    return compiled if not config.debug.check_gates else _checked(compiled)


def _is_no_reminder(record: logging.LogRecord) -> bool:
    """Returns False for Chex's reminder at exit of unawaited checks; here all are awaited."""
    return "chexify assertion statuses were not inspected" not in str(record.msg)


def _checked(step: Step) -> Step:
    """Returns the step with value checks; a failed check raises this library's error."""
    armed = chex.chexify(step, async_check=False)
    logging.getLogger("absl").addFilter(_is_no_reminder)

    def run(params: Any, state: TrainState, batch: Any) -> Any:
        try:
            return armed(params, state, batch)
        except AssertionError as error:
            if BROKEN not in str(error):
                raise
            raise NaloraError(
                "--debug.check-gates",
                expected="phi(z + dz) - phi(z) = F + S in every layer",
                found=str(error).split("[failed at")[0].strip(),
                remedy="a gate computes something else than its activation says; report this with the model's name",
            ) from error

    return run
