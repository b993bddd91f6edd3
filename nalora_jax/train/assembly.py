"""Assembles a base model and a config: adapters, optimizer and the compiled step on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.layout import distributed
from nalora_jax.method.step import Step, TrainState
from nalora_jax.method.transform import Mechanisms, find_gates
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import init_lora as init_dual_lora
from nalora_jax.ops.storage import prepare
from nalora_jax.train.decoder_program import check_decoder, decoder_program
from nalora_jax.train.dual import check_dual, dual_program, resolve_dual
from nalora_jax.train.jitted import PureStep
from nalora_jax.train.program import Program
from nalora_jax.train.state_metrics import StateMetrics
from nalora_jax.weights.allocated import remaining_ranks
from nalora_jax.weights.nonzero_start import difference_as_lora, lower_kernels
from nalora_jax.weights.pissa import pissa_split


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
    pure: PureStep | None = None  # builds the step that is not compiled

    @property
    def eval_model(self) -> Decoder:
        """Returns the decoder for evaluation and generation.

        It has no rematerialization and no sharding constraints except for the expert routing.
        """
        stats = None
        if self.model.stats:
            stats = replace(self.model.stats, sharding=None)
        return self.model.clone(remat="none", stats=stats, activation_sharding=None)

    def view(self, params: Any) -> Any:
        """Returns ``params`` in the layout that the step runs fastest on, without a copy.

        See `nalora_jax.ops.storage.prepare`.
        """
        return prepare({"params": params}, self.model.numerics)


def assemble(
    config: RunConfig,
    base: ModelConfig | DualConfig,
    params: Any,
    mesh: Mesh,
    *,
    last: optax.GradientTransformation | None = None,
    processor: ImageProcessor | None = None,
    like: Assembly | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run.

    Args:
      config: the run's settings, checked.
      base: architecture of the base model.
      params: its weights on ``mesh``; of a dual encoder with the class prompts
        (`nalora_jax.train.dual_objectives.Classify`).
      mesh: the run's devices.
      last: transform applied to the updates after all transforms of the config.
      processor: image processor of a model with images.
      like: an assembly with the same program. With the same adapters, its compiled functions are
        shared.

    Raises:
      NaloraError: rules that match nothing or ask for impossible ranks, a variant that the model
        does not have, rows that the tables do not have, or a tensor axis that splits a head.
    """
    spec, params, lora, initial = _start(config, base, params, mesh)
    shared = None
    if like is not None and like.spec == spec and initial is None:
        shared = like
    program = _program(config, base, lora, spec, mesh, last, processor, shared)
    if shared is not None:
        changes: dict[str, Any] = {"state": shared.begin(lora, config.seed), "params": params}
        changes |= {"mechanisms": program.mechanisms, "pure": program.pure, "initial": None}
        return replace(shared, config=config, **changes)
    places = program.places(lora)
    compiled = jax.jit(program.fresh, out_shardings=places)

    def begin(lora: Any, seed: int) -> TrainState:
        # The seed is an argument, so that all seeds share one program.
        return compiled(lora, jax.random.key_data(jax.random.key(seed)))

    return Assembly(
        config,
        program.model,
        spec,
        mesh,
        program.mechanisms,
        program.optimizer,
        begin(lora, config.seed),
        params,
        program.step(places),
        begin,
        StateMetrics(program.mechanisms, spec, mesh),
        initial,
        program.pure,
    )


def _start(
    config: RunConfig, base: ModelConfig | DualConfig, params: Any, mesh: Mesh
) -> tuple[AdapterSpec, Any, Any, Any]:
    """Returns the adapters' spec, the frozen weights, and the first adapters, also on the host.

    The copy on the host is None if B is 0.
    """
    key = jax.random.key(config.seed)
    if isinstance(base, DualConfig):
        check_dual(config, base, mesh)
        spec = resolve_dual(config, base)
        return spec, params, init_dual_lora(base, spec, key, params), None
    check_decoder(config, base, mesh)
    spec = adapter_spec(config, base)
    if config.lora.init == "pissa":
        params, lora = pissa_split(params, spec)
        return spec, _with_starts(params, lora, mesh), lora, jax.tree.map(distributed.fetch, lora)
    return spec, params, init_lora(base, spec, key, params), None


def _program(
    config: RunConfig,
    base: ModelConfig | DualConfig,
    lora: Any,
    spec: AdapterSpec,
    mesh: Mesh,
    last: optax.GradientTransformation | None,
    processor: ImageProcessor | None,
    shared: Assembly | None,
) -> Program:
    if isinstance(base, DualConfig):
        assert processor is not None, "a dual encoder has an image processor"
        return dual_program(config, base, spec, lora, mesh, processor, last=last)
    options: dict[str, Any] = {"last": last, "processor": processor}
    if shared is not None:
        options["model"] = shared.model
    return decoder_program(config, base, spec, mesh, **options)


def _with_starts(params: Any, lora: Any, mesh: Mesh) -> Any:
    """Adds the gates' initial adapters to ``params``; the probe measures updates from them."""
    leaves, adapters = trees.flatten(params), trees.flatten(lora)
    starts = {
        f"{gate}/start_{name}": adapters[f"{gate}/{name}"] for gate in find_gates(lora) for name in "ab"
    }
    starts = {
        path: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf for path, leaf in starts.items()
    }
    start_shardings = distributed.shardings(starts, mesh, distributed.PARAM_RULES)
    return trees.unflatten(leaves | jax.device_put(starts, start_shardings))


def starting_at(assembly: Assembly, lora: Any) -> Assembly:
    """Returns the assembly with initial adapters ``lora``, non-zero B, on lowered kernels.

    The kernels are lowered by the initial update of ``lora``, so the model's outputs stay the same.
    The step function is shared, and must not be compiled yet: its params now include the initial
    adapters of the gates.
    """
    initial = jax.tree.map(distributed.fetch, lora)  # a resumed run must start from the same bits
    params = _with_starts(lower_kernels(assembly.params, initial, assembly.spec), initial, assembly.mesh)
    return replace(
        assembly, params=params, state=assembly.begin(initial, assembly.config.seed), initial=initial
    )


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
