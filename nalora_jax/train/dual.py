"""Assembles a dual encoder and a config, like `nalora_jax.train.assembly.assemble`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed
from nalora_jax.config import RunConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.distributed import platform_of
from nalora_jax.errors import NaloraError
from nalora_jax.gate_checks import require_compensated
from nalora_jax.measurement import GateStatsConfig
from nalora_jax.method import statistics
from nalora_jax.method.optimizer import find_gates, nalora
from nalora_jax.method.state import Mechanisms
from nalora_jax.method.step import Step, StepConfig, TrainState, init_state, make_train_step
from nalora_jax.models.remat import chosen_remat
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.models.vision.config import TOWERS, DualConfig
from nalora_jax.models.vision.dual import DualEncoder, init_lora
from nalora_jax.ops.numerics import numerics_for
from nalora_jax.train.assembly import Assembly, gate_checks_of
from nalora_jax.train.dual_objectives import Classify, Contrast, Towers
from nalora_jax.train.gate_metrics import layer_metrics
from nalora_jax.train.jitted import PureStep, jit_step
from nalora_jax.train.learning_rate import with_learning_rate
from nalora_jax.train.mechanisms import make_mechanisms
from nalora_jax.train.optimizers import make_optimizer
from nalora_jax.train.state_metrics import StateMetrics

log = logging.getLogger(__name__)


def assemble_dual(
    config: RunConfig,
    base: DualConfig,
    params: Any,
    mesh: Mesh,
    processor: ImageProcessor,
    *,
    last: optax.GradientTransformation | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run on images.

    Args:
      config: the run's settings, checked; ``config.vision.task`` chooses the objective.
      base: architecture of the dual encoder.
      params: its weights on ``mesh``; with the class prompts (`nalora_jax.train.dual_objectives.Classify`).
      mesh: the run's devices.
      processor: converts images to pixels.
      last: transform applied to the updates after all transforms of the config.

    Raises:
      NaloraError: rules that match nothing or ask for impossible ranks, a variant that these models do not have, or a
        tensor axis that splits a head.
    """
    spec = resolve_dual(config, base)
    lora = init_lora(base, spec, jax.random.key(config.seed), params)
    made = dual_program(config, base, spec, lora, mesh, processor, last=last)

    def begin(lora: Any, seed: int) -> TrainState:
        return compiled(lora, jax.random.key_data(jax.random.key(seed)))  # one program for all seeds

    compiled = jax.jit(made.fresh, out_shardings=made.places)
    return Assembly(
        config,
        made.model,
        spec,
        mesh,
        made.mechanisms,
        made.optimizer,
        begin(lora, config.seed),
        params,
        made.step,
        begin,
        StateMetrics(made.mechanisms, spec, mesh),
        pure=made.pure,
    )


@dataclass(frozen=True)
class DualProgram:
    """The compiled parts of a run on images."""

    model: DualEncoder
    mechanisms: Mechanisms
    optimizer: optax.GradientTransformationExtraArgs
    fresh: Callable[[Any, jax.Array], TrainState]  # initial state for adapters and a key's data
    places: Any  # shardings of the state
    step: Step
    pure: PureStep


def dual_program(
    config: RunConfig,
    base: DualConfig,
    spec: AdapterSpec,
    lora: Any,
    mesh: Mesh,
    processor: ImageProcessor,
    *,
    last: optax.GradientTransformation | None = None,
) -> DualProgram:
    """Builds the step of `assemble_dual` without computing anything, so devices may be abstract.

    Args:
      config, base, mesh, processor, last: see `assemble_dual`.
      spec: the adapters.
      lora: the trained leaves, or their shapes.

    Raises:
      NaloraError: see `assemble_dual`.
    """
    for tower in base.towers.values():
        distributed.check_heads(mesh, n_heads=tower.n_heads, n_kv_heads=tower.n_heads)
    if config.lora.init != "default":
        raise NaloraError("--lora.init", expected="default for image and text encoders", found=config.lora.init)
    adapted = adapted_towers(spec)
    gates = find_gates(lora)
    mechanisms = _mechanisms(config, base, adapted, gates)
    model = _model(config, base, spec, mechanisms, mesh)

    def optimizer_of(mechanisms: Mechanisms, numbers: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        inner = make_optimizer(with_learning_rate(config).optimizer, config.steps, config.lora.plus_ratio, numbers)
        optimizer = nalora(inner, gates, mechanisms)
        return optimizer if last is None else optax.with_extra_args_support(optax.chain(optimizer, last))

    optimizer = optimizer_of(mechanisms, {})
    parts = {tower: base.towers[tower] for tower in adapted}
    shapes: dict[str, tuple[int, ...]] = {f"{t}/layers/ffn": (c.n_layers, c.d_ff) for t, c in parts.items()}

    def fresh(lora: Any, key: jax.Array) -> TrainState:
        return init_state(lora, optimizer, shapes, mechanisms, 0)._replace(key=key)

    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    places = distributed.shardings(jax.eval_shape(fresh, lora, key), mesh, distributed.STATE_RULES)

    def pure(adapters: AdapterSpec, mechanisms: Mechanisms, numbers: Mapping[str, Any]) -> Step:
        shared = mesh if distributed.devices_per_run(mesh) > 1 else None
        towers = Towers(model.clone(adapters=adapters), processor, adapted, shared)
        objective = Classify(towers) if config.vision.task == "classify" else Contrast(towers, base.loss)
        settings = StepConfig(
            mechanisms,
            stats_sharding=distributed.row_sharding(mesh),
            **_shardings(lora, mesh),
            metrics=layer_metrics(mechanisms),
            verify=require_compensated if config.debug.check_gates else None,
        )
        return make_train_step(optimizer_of(mechanisms, numbers), settings, objective)

    step = jit_step(config, pure(spec, mechanisms, {}), mesh, places)
    return DualProgram(model, mechanisms, optimizer, fresh, places, step, pure)


def _model(config: RunConfig, base: DualConfig, spec: AdapterSpec, mechanisms: Mechanisms, mesh: Mesh) -> DualEncoder:
    """Builds the module of both towers for training."""
    compute = config.compute
    numerics = numerics_for(compute.dtype, platform_of(mesh), compute.implementation)
    return DualEncoder(
        base,
        spec,
        numerics,
        remat=chosen_remat(compute.remat, base.image.d_model, numerics, gated=base.image.gated),
        stats=GateStatsConfig(
            compute.stats_stride,
            compute.probe_stride,
            compute.stats_positions,
            checks=gate_checks_of(config),
            extra=statistics.extra(mechanisms.statistics),
            sharding=distributed.row_sharding(mesh),
        ),
        activation_sharding=distributed.row_sharding(mesh),
    )


def resolve_dual(config: RunConfig, base: DualConfig) -> AdapterSpec:
    """Returns both towers' adapters; none if every rule has rank 0 and projections are trained."""
    if base.trained and all(rule.rank == 0 for rule in config.lora.rules):
        return AdapterSpec()
    numbers = {path: range(depth) for path, depth in base.depths().items()}
    return resolve(config.lora, base.projection_shapes(), numbers)


def adapted_towers(spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the towers that have adapters."""
    return tuple(tower for tower in TOWERS if any(path.startswith(f"{tower}/") for path, _ in spec.targets))


def trains_text(spec: AdapterSpec, base: DualConfig) -> bool:
    """Returns True if training changes the output of the text tower."""
    return "text" in adapted_towers(spec) or "text/projection" in base.trained


def _mechanisms(config: RunConfig, base: DualConfig, adapted: tuple[str, ...], gates: dict[str, str]) -> Mechanisms:
    """Returns the mechanisms of a run; none, with a warning, if no adapter is on a gate."""
    first = base.towers[adapted[0] if adapted else "image"].activation
    found = make_mechanisms(
        config.mechanisms,
        activation=first,
        total_steps=config.steps,
        seed=config.seed,
    )
    if found.entries and not gates:
        labels = ", ".join(label for label, _ in found.entries)
        log.warning("no adapter sits on a gate (gate_proj or in_proj): no mechanism acts (%s)", labels)
        return replace(found, entries=())
    others = {f"{t}/layers/ffn": base.towers[t].activation for t in adapted}
    return replace(found, others=tuple((path, name) for path, name in others.items() if name != first))


def _shardings(lora: Any, mesh: Mesh) -> dict[str, Any]:
    """Returns the layouts of adapters and masks within a step; empty on one device."""
    if distributed.devices_per_run(mesh) == 1:
        return {}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lora)
    return {
        "lora_sharding": distributed.shardings(shapes, mesh, distributed.STEP_RULES),
        "mask_sharding": NamedSharding(mesh, P()),
    }
