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
from nalora_jax.layout import distributed
from nalora_jax.method.step import Step, TrainState
from nalora_jax.method.transform import find_gates
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.storage import prepare
from nalora_jax.train.decoder_program import MakeObjective, check_decoder, decoder_program
from nalora_jax.train.program import RunProgram
from nalora_jax.train.state_metrics import StateMetrics
from nalora_jax.weights.adapter_forms import difference_as_lora, lower_kernels, pissa_split, remaining_ranks


@dataclass(frozen=True)
class Assembly(RunProgram):
    """A compiled training run: a program with weights and an initial state."""

    state: TrainState  # before the first step, on the mesh
    params: Any  # frozen base weights, minus the initial update of adapters with B != 0
    step: Step  # compiled on first use; donates the state
    begin: Callable[[Any, int], TrainState]  # initial state for an adapter and a seed
    state_metrics: StateMetrics  # compiled on first use
    initial: Any = None  # adapters before the first step in host memory, if B != 0

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
    objective: MakeObjective | None = None,
    module: type[Decoder] = Decoder,
    like: Assembly | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run on a decoder.

    Args:
      config: the run's settings, checked.
      base: architecture of the base model.
      params: its weights on ``mesh``.
      mesh: the run's devices.
      last: transform applied to the updates after all transforms of the config.
      objective: makes the run's objective of the cross-entropy of the next token, which is the
        objective by default.
      module: class of the model.
      like: an assembly with the same program. With the same adapters, its compiled functions are
        shared.

    Raises:
      NaloraError: rules that match nothing or ask for impossible ranks, a variant that the model
        does not have, rows that the tables do not have, or a tensor axis that splits a head.
    """
    check_decoder(config, base, mesh)
    spec = adapter_spec(config, base)
    initial = None
    if config.lora.init == "pissa":
        params, lora = pissa_split(params, spec)
        params, initial = _with_starts(params, lora, mesh), jax.tree.map(distributed.fetch, lora)
    else:
        lora = init_lora(base, spec, jax.random.key(config.seed), params)
    if like is None or like.spec != spec or initial is not None:
        program = decoder_program(config, base, spec, mesh, last=last, objective=objective, module=module)
        return assembled(program, params, lora, initial)
    program = decoder_program(config, base, spec, mesh, last=last, objective=objective, model=like.model)
    changes: dict[str, Any] = {"state": like.begin(lora, config.seed), "params": params}
    changes |= {"mechanisms": program.mechanisms, "pure": program.pure, "initial": None}
    return replace(like, config=config, **changes)


def assembled(program: RunProgram, params: Any, lora: Any, initial: Any = None) -> Assembly:
    """Returns the assembly of a program with weights and initial adapters.

    ``initial`` are the adapters in host memory if their B is not 0.
    """
    places, seed = program.places(lora), program.config.seed
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
        initial=initial,
    )


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
