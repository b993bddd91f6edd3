"""The training step of a run, compiled for absent hardware."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.axes import BATCH_AXES, WEIGHT_AXES
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.machines import Topology
from nalora_jax.method.step import init_state
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.paths import leaf_dtype
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import gathered, kernels, quantize
from nalora_jax.study.sweeps.program import step_of_runs
from nalora_jax.study.sweeps.stack import stacked_sharding
from nalora_jax.train.decoder_program import build_optimizer, decoder_program, make_step
from nalora_jax.train.kinds import decoder_parts

_BATCH = {
    "tokens": "int32", "targets": "int32", "loss_weights": "float32", "segment_ids": "int32", "positions": "int32",
}  # fmt: skip


def devices(where: Topology) -> Sequence[jax.Device]:
    """Returns abstract devices of a topology, from the real compiler of its platform.

    Raises:
      NaloraError: the compiler is not installed, or it knows no such topology.
    """
    _require(where)
    try:
        with _quiet_tpu():
            described = topologies.get_topology_desc(**where.description())
    except NaloraError:
        raise
    except Exception as error:  # the compilers' refusals have no common type
        raise NaloraError(
            "--topology",
            expected=f"a topology that the {where.chip.platform} compiler knows",
            found=f"{where.name}: {str(error).splitlines()[0][:300]}",
        ) from error
    return list(described.devices)


def _require(where: Topology) -> None:
    module, extra = "jax_plugins.xla_cuda12", "cuda"
    if where.chip.platform == "tpu":
        module, extra = "libtpu", "tpu"
    try:
        missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise NaloraError(
            "nalora plan",
            expected=f"the compiler for {where.chip.name}, which needs no such chip",
            found="that it is not installed",
            remedy=f"pip install 'nalora_jax[{extra}]', best in an environment of its own",
        )


@contextmanager
def _quiet_tpu() -> Iterator[None]:
    """Prepares the TPU compiler for a machine without a TPU.

    It must not search for a TPU or require exclusive access.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def step_and_arguments(
    config: RunConfig, base: ModelConfig, mesh: Mesh, *, seq: int, images: int = 0, runs: int = 0
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted training step of ``config`` and the shapes of its arguments on ``mesh``.

    Args:
      config: the run; its batch size is the number of rows over all devices.
      base: architecture of the base model.
      mesh: real or abstract devices.
      seq: tokens of a row.
      images: images per row, for a vision-language model.
      runs: of a sweep, which differ in their learning rates; 0: the step of one run.
    """
    spec = adapter_spec(config, base)
    parts = decoder_parts(config, base, ImageProcessor())
    program = decoder_program(config, base, spec, mesh, **parts)

    def fresh(params: Any) -> Any:
        lora = init_lora(base, spec, jax.random.key(0), params)
        return init_state(lora, program.optimizer, 0)

    weights = {path: _weight(path, shape, config.compute) for path, shape in param_shapes(base).items()}
    params = gathered(placed(trees.unflatten(weights), mesh, distributed.PARAM_RULES)[0], WEIGHT_AXES)
    state, places = placed(jax.eval_shape(fresh, trees.unflatten(weights)), mesh, distributed.STATE_RULES)
    batch = _batch(config, base, mesh, seq, images)
    if not runs:
        return program.step(places), (params, state, batch)

    def one(params: Any, state: Any, batch: Any, rates: jax.Array) -> Any:
        mechanisms = program.mechanisms
        trained = build_optimizer(config, base, spec, mechanisms, numbers={"rate_of_step": rates})
        objective = parts.get("objective")
        step = make_step(config, base, program.model, trained, mechanisms, mesh, objective)
        return step(params, state, batch)

    def of_runs(leaf: Any) -> Any:
        place = stacked_sharding(mesh, leaf.sharding)
        return jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype, sharding=place)

    states, batches = jax.tree.map(of_runs, (state, batch))
    out = (
        jax.tree.map(lambda leaf: leaf.sharding, states),
        stacked_sharding(mesh, NamedSharding(mesh, P())),
    )
    replicated = NamedSharding(mesh, P())
    rates = of_runs(jax.ShapeDtypeStruct((config.steps,), jnp.float32, sharding=replicated))
    active = of_runs(jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated))
    options = distributed.compiler_options(mesh)
    compiled = jax.jit(
        step_of_runs(one, mesh), donate_argnums=1, out_shardings=out, compiler_options=options
    )
    return compiled, ({"params": params}, states, batches, rates, active)


def _batch(config: RunConfig, base: ModelConfig, mesh: Mesh, seq: int, images: int) -> dict[str, Any]:
    """Returns the shapes of a step's batch."""
    by_rows = NamedSharding(mesh, P(None, BATCH_AXES))
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype), sharding=by_rows)

    batch = {name: of((seq,), dtype) for name, dtype in _BATCH.items()}
    if config.preference.loss != "none":
        batch["pairs"] = of((1,), "float32")
    if base.sight is not None:
        tower = base.sight.tower
        batch["pixels"] = of((images, tower.image_size, tower.image_size, tower.channels), "uint8")
        batch["images"] = of((), "int32")
    return batch


def _weight(path: str, shape: tuple[int, ...], compute: ComputeConfig) -> Any:
    """Returns the shape of a frozen array in its storage form."""
    if compute.quantize == "none" or not re.search(kernels(compute.quantize), path):
        return jax.ShapeDtypeStruct(shape, leaf_dtype(path, compute.dtype))
    return jax.eval_shape(partial(quantize, kind=compute.quantize), jax.ShapeDtypeStruct(shape, "float32"))


def placed(tree: Any, mesh: Mesh, rules: distributed.Rules) -> tuple[Any, Any]:
    """Returns shapes of arrays with the shardings of the rules, and the shardings."""
    places = distributed.shardings(tree, mesh, rules)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
    ), places
