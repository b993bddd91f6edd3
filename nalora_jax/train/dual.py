"""The program of a run on a dual encoder of images and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.config import RunConfig
from nalora_jax.data.images.files import ImageProcessor
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import platform_of
from nalora_jax.method.measurement import CHECKS, GateStatsConfig, require_sound
from nalora_jax.method.step import Step, StepConfig, make_train_step
from nalora_jax.method.transform import Mechanisms, find_gates, nalora
from nalora_jax.models.remat import chosen_remat
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.models.vision.config import TOWERS, DualConfig
from nalora_jax.models.vision.dual import DualEncoder, init_lora
from nalora_jax.ops.numerics import numerics_for
from nalora_jax.train.assembly import Assembly, assembled
from nalora_jax.train.decoder_program import context_error
from nalora_jax.train.dual_objectives import Classify, Contrast, Towers
from nalora_jax.train.learning_rate import with_learning_rate
from nalora_jax.train.mechanisms import layer_metrics, mechanisms_of
from nalora_jax.train.optimizers import make_optimizer
from nalora_jax.train.program import RunProgram, gate_checks_of


def check_dual(config: RunConfig, base: DualConfig, mesh: Mesh) -> None:
    """Raises an error if an axis splits a head or a row, or for another start of the adapters."""
    if (shards := distributed.context_size(mesh)) > 1:
        raise context_error(shards, "encoders of images and texts")
    for tower in base.towers.values():
        distributed.check_heads(mesh, n_heads=tower.n_heads, n_kv_heads=tower.n_heads)
    if config.lora.init != "default":
        expected = "default for image and text encoders"
        raise NaloraError("--lora.init", expected=expected, found=config.lora.init)


def assemble_dual(
    config: RunConfig,
    base: DualConfig,
    params: Any,
    mesh: Mesh,
    processor: ImageProcessor,
    *,
    last: optax.GradientTransformation | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run on a dual encoder.

    Args:
      config, base, mesh, last: see `nalora_jax.train.assembly.assemble`.
      params: both towers' weights on ``mesh``, with the class prompts
        (`nalora_jax.train.dual_objectives.Classify`).
      processor: its image processor.

    Raises:
      NaloraError: see `check_dual` and `resolve_dual`.
    """
    check_dual(config, base, mesh)
    spec = resolve_dual(config, base)
    lora = init_lora(base, spec, jax.random.key(config.seed), params)
    return assembled(dual_program(config, base, spec, lora, mesh, processor, last=last), params, lora)


def dual_program(
    config: RunConfig,
    base: DualConfig,
    spec: AdapterSpec,
    lora: Any,
    mesh: Mesh,
    processor: ImageProcessor,
    *,
    last: optax.GradientTransformation | None = None,
) -> RunProgram:
    """Returns the program of a dual encoder.

    Args:
      config, base, mesh, processor, last: see `assemble_dual`; ``config.vision.task`` chooses the
        objective.
      spec: the adapters.
      lora: the trained leaves, or their shapes.
    """
    adapted = adapted_towers(spec)
    gates = find_gates(lora)
    names = {f"{tower}/layers/ffn": base.towers[tower].activation for tower in adapted}
    activation = base.towers[next(iter(adapted), "image")].activation
    mechanisms = mechanisms_of(config, activation, names, gates)
    model = _model(config, base, spec, mesh)

    def optimizer_of(
        mechanisms: Mechanisms, numbers: Mapping[str, Any]
    ) -> optax.GradientTransformationExtraArgs:
        inner = make_optimizer(
            with_learning_rate(config).optimizer, config.steps, config.lora.plus_ratio, numbers
        )
        optimizer = nalora(inner, mechanisms, gates)
        if last is None:
            return optimizer
        return optax.with_extra_args_support(optax.chain(optimizer, last))

    optimizer = optimizer_of(mechanisms, {})
    parts = {tower: base.towers[tower] for tower in adapted}
    shapes: dict[str, tuple[int, ...]] = {f"{t}/layers/ffn": (c.n_layers, c.d_ff) for t, c in parts.items()}

    def pure(adapters: AdapterSpec, mechanisms: Mechanisms, numbers: Mapping[str, Any]) -> Step:
        shared = mesh if distributed.devices_per_run(mesh) > 1 else None
        numerics = replace(model.numerics, platform=distributed.platform_of_step(mesh))
        module = model.clone(adapters=adapters, numerics=numerics)
        towers = Towers(module, processor, shared)
        objective = Classify(towers) if config.vision.task == "classify" else Contrast(towers, base.loss)
        verify = partial(require_sound, config=model.stats or GateStatsConfig())
        settings = StepConfig(
            mechanisms,
            shapes,
            stats_sharding=distributed.row_sharding(mesh),
            **_shardings(lora, mesh),
            metrics=layer_metrics(mechanisms),
            checks=tuple(CHECKS) if config.debug.check_gates else (),
            verify=verify if config.debug.check_gates else None,
        )
        return make_train_step(optimizer_of(mechanisms, numbers), settings, objective)

    return RunProgram(config, model, spec, mesh, mechanisms, optimizer, shapes, pure)


def _model(config: RunConfig, base: DualConfig, spec: AdapterSpec, mesh: Mesh) -> DualEncoder:
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


def _shardings(lora: Any, mesh: Mesh) -> dict[str, Any]:
    """Returns the layouts of adapters and masks within a step; empty on one device."""
    if distributed.devices_per_run(mesh) == 1:
        return {}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lora)
    return {
        "lora_sharding": distributed.shardings(shapes, mesh, distributed.STEP_RULES),
        "mask_sharding": NamedSharding(mesh, P()),
    }
