"""The training step of a run for absent hardware: architectures by name, abstract devices, and
arguments."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, Sharding

from nalora_jax.assembly.program import RunProgram, decoder_program
from nalora_jax.assembly.stacked import step_of_runs
from nalora_jax.common import trees
from nalora_jax.common.devices import WEIGHT_AXES
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.data.images.image_files import ImageProcessor
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import programs
from nalora_jax.evaluate.generate.sampling import make_sampling
from nalora_jax.kinds.record import run_kind
from nalora_jax.mesh import distributed, sharding
from nalora_jax.method.step import init_state
from nalora_jax.method.tuned import remove_tuned
from nalora_jax.models import adapters, stacks, targets
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.scaled_ropes import set_rope_scaling
from nalora_jax.ops.quantize import kernels, mark_gathered, quantize
from nalora_jax.planner import machines
from nalora_jax.planner.figures import Figures
from nalora_jax.weights import hub
from nalora_jax.weights.quantization_config import quantization_of
from nalora_jax.weights.quantized import stored_bits

_BATCH = {
    "tokens": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "segment_ids": "int32",
    "positions": "int32",
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER = Path(__file__).parent / "released"  # its README.md states the sources
# ``config.json`` of released checkpoints, by lower-case name.
CONFIGS: dict[str, dict[str, Any]] = {
    file.stem.lower(): read_json(file)
    for file in sorted(_FOLDER.glob("*.json"), key=lambda file: file.stem.lower())
}


def architecture(
    name: str, *, images: bool = False, rope_scaling: str = ""
) -> ModelConfig:
    """Returns the architecture of a model, without its weights.

    A name is a key of `CONFIGS`, a ``config.json``, a Hugging Face folder, or a hub id: its last
    part is a key of `CONFIGS`, or its ``config.json`` is read from the hub's cache or downloaded.
    With ``images`` a multimodal model includes its image tower and projector; by default only its
    text model is returned. ``rope_scaling`` replaces the model's
    (`nalora_jax.models.scaled_ropes.set_rope_scaling`).

    Raises:
      NaloraError: the name is unknown, or its config or its new RoPE scaling is not supported.
    """
    file = Path(name)
    found = repr(name)
    remedy = "download the model's config.json: planning needs nothing else"
    if file.is_dir():
        file /= "config.json"
    on_hub = _HUB_ID.fullmatch(name) is not None
    known = name.lower()
    if on_hub:
        known = known.rpartition("/")[2]
    raw = None
    where = name
    if file.suffix == ".json" and file.exists():
        raw = read_json(file)
        where = str(file)
    elif known in CONFIGS:
        raw = CONFIGS[known]
    elif on_hub:
        try:
            raw = read_json(hub.snapshot(name, "config.json") / "config.json")
        except NaloraError as error:
            found = f"{error.found} ({name} on the hub)"
            remedy = error.remedy or remedy
    if raw is None:
        names = ", ".join(CONFIGS)
        raise NaloraError(
            "--model",
            expected=f"a config.json, a folder that contains one, a hub id, or one of {names}",
            found=found,
            remedy=remedy,
        )
    quantization = quantization_of(raw, where)
    config = ModelConfig.from_hf(
        set_rope_scaling(raw, rope_scaling, where), where, images=images
    )
    if quantization is None:
        return config
    return replace(config, stored_bits=stored_bits(quantization, config))


def devices(where: machines.Topology) -> Sequence[jax.Device]:
    """Returns abstract devices of a topology, from the real compiler of its platform.

    Raises:
      NaloraError: the compiler is not installed, or it knows no such topology.
    """
    module = "jax_plugins.xla_cuda12"
    extra = "cuda"
    if where.chip.platform == "tpu":
        module = "libtpu"
        extra = "tpu"
    missing = True
    with suppress(ModuleNotFoundError):
        missing = importlib.util.find_spec(module) is None
    if missing:
        expected = f"the compiler for {where.chip.name}, which needs no such chip"
        found = "that it is not installed"
        raise NaloraError(
            "nalora plan",
            expected=expected,
            found=found,
            remedy=f"pip install 'nalora_jax[{extra}]', best in an environment of its own",
        )
    # The TPU compiler must not search for a TPU or require exclusive access.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(topologies.get_topology_desc(**where.description()).devices)
    except NaloraError:
        raise
    except Exception as error:  # the compilers' refusals have no common type
        expected = f"a topology that the {where.chip.platform} compiler knows"
        found = f"{where.name}: {str(error).splitlines()[0][:300]}"
        raise NaloraError("--topology", expected=expected, found=found) from error


def step_and_arguments(
    config: RunConfig, base: ModelConfig, mesh: Mesh, *, images: int = 0, runs: int = 0
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted training step of ``config`` and the shapes of its arguments on ``mesh``.

    Args:
      config: the run; its batch size is the number of rows over all devices, and a row has
        ``data.max_length`` tokens.
      base: architecture of the base model.
      mesh: real or abstract devices.
      images: images per row, for a vision-language model.
      runs: of a sweep, which differ in their learning rates; 0: the step of one run.
    """
    program, params, state, places = _program_and_state(config, base, mesh)
    batch = _batch(config, base, mesh, images)
    frozen = _frozen(config, base, mesh)
    if not runs:
        if frozen:
            params = {"params": params} | frozen
        return program.compiled_step(places), (params, state, batch)

    def one(params: Any, state: Any, batch: Any, rates: jax.Array) -> Any:
        """Returns the result of a step of one run with the learning rates ``[steps]``."""
        numbers = {"rate_of_step": rates}
        step = program.pure(program.spec, program.mechanisms, numbers)
        return step(params, state, batch)

    def of_runs(leaf: Any) -> Any:
        """Returns the shape ``[runs, ...]`` of a run's array."""
        place = distributed.stacked_sharding(mesh, leaf.sharding)
        return jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype, sharding=place)

    states, batches = jax.tree.map(of_runs, (state, batch))
    everywhere = distributed.replicated_sharding(mesh)
    rates = of_runs(
        jax.ShapeDtypeStruct((config.steps,), jnp.float32, sharding=everywhere)
    )
    active = of_runs(jax.ShapeDtypeStruct((), jnp.bool_, sharding=everywhere))
    step = step_of_runs(one, mesh, jax.tree.map(lambda leaf: leaf.sharding, states))
    return step, ({"params": params} | frozen, states, batches, rates, active)


def _program_and_state(
    config: RunConfig, base: ModelConfig, mesh: Mesh
) -> tuple[RunProgram, Any, Any, Any]:
    """Returns the program of a run and the shapes of its arrays.

    Returns:
      The program, the shapes of its weights and of its state, and the state's shardings.
    """
    kind = run_kind(config)
    spec = kind.adapters(config, base)
    teacher = None
    if kind.teacher is not None:
        teacher = kind.teacher(config, base, architecture)
    parts = kind.parts(config, ImageProcessor(), teacher)
    program = decoder_program(config, base, spec, mesh, **parts)
    params = _weights(base, config.compute, mesh)
    fresh = jax.eval_shape(
        lambda lora: init_state(lora, program.optimizer, 0),
        adapters.adapter_shapes(base, spec),
    )
    state, places = place_shapes(fresh, mesh, sharding.STATE_RULES)
    params = remove_tuned(params, state.lora)
    return program, params, state, places


def _frozen(config: RunConfig, base: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns the shapes of the frozen collections of a step besides its base: a teacher's."""
    read_teacher = run_kind(config).teacher
    if read_teacher is None:
        return {}
    teacher = read_teacher(config, base, architecture)
    collections = {}
    if teacher.adapters.targets:
        lora = adapters.adapter_shapes(teacher.base, teacher.adapters)
        collections["lora"] = place_shapes(lora, mesh, sharding.STATE_RULES)[0]
    if not teacher.is_base:
        params = _weights(teacher.base, config.compute, mesh)
        collections["weights"] = {"params": params}
    return {"teacher": collections}


def _weights(base: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> Any:
    """Returns the shapes of a decoder's frozen weights on ``mesh``."""
    weights = {
        path: _weight(path, shape, base, compute)
        for path, shape in stacks.param_shapes(base).items()
    }
    return mark_gathered(
        place_shapes(trees.unflatten(weights), mesh, sharding.PARAM_RULES)[0],
        WEIGHT_AXES,
    )


def rollout_and_arguments(
    config: RunConfig, base: ModelConfig, mesh: Mesh
) -> tuple[Any, tuple[Any, ...], float]:
    """Returns the program that draws samples in a run with rewards.

    Returns:
      The jitted program, the shapes of its arguments, and the bytes of a device for the
      optimizer, which stay in its memory during the program.
    """
    rl = config.rl
    program, params, state, _ = _program_and_state(config, base, mesh)
    prompts = config.train.batch_size // rl.samples
    _, count, samples = distributed.program_shape(
        prompts, rl.samples, distributed.prompt_shards(mesh)
    )
    longest = programs.padded_length(
        config.data.max_length - rl.max_new_tokens, minimum=16
    )

    by_rows = distributed.batch_sharding(mesh)

    def of(shape: tuple[int, ...], dtype: Any, place: Sharding = by_rows) -> Any:
        """Returns the shape of an array, by default sharded by rows."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    sampling = make_sampling(count * samples, temperature=rl.temperature)
    rows = programs.Prompts(
        tokens=of((count, longest), "int32"),
        lengths=of((count,), "int32"),
        live=of((count,), "bool"),
        stop_ids=of((8,), "int32", distributed.replicated_sharding(mesh)),
        sampling=jax.tree.map(lambda x: of(x.shape, x.dtype), sampling),
    )
    model = program.eval_model
    resident = 0.0
    for leaf in jax.tree.leaves(state.opt_state):
        resident += (
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        )
    weights = programs.view_weights(model, {"params": params, "lora": state.lora})
    draw = jax.jit(
        partial(
            programs.sample_groups,
            model,
            samples=samples,
            limit=rl.max_new_tokens,
            records=rl.replay_routing,
        )
    )
    return draw, (weights, rows), resident


def moved_weights(
    update: Figures, arguments: Any, rollout: Figures, drawn: Any
) -> float:
    """Returns the bytes of weights that two compiled programs read in different shardings.

    Args:
      update, rollout: figures of the programs.
      arguments, drawn: their arguments, of `step_and_arguments` and `rollout_and_arguments`.
    """
    places = [
        jax.tree.unflatten(
            jax.tree.structure(of, is_leaf=lambda leaf: leaf is None), figures.inputs
        )[0]
        for of, figures in ((arguments, update), (drawn, rollout))
    ]
    of_update = (arguments[0], places[0])
    if "params" in arguments[0]:  # with the collections of a teacher
        of_update = (arguments[0]["params"], places[0]["params"])
    weights, first, second = map(trees.flatten, (*of_update, places[1].body["params"]))
    moved = [
        path for path in weights if len({first[path], second[path]} - {"None"}) > 1
    ]
    return sum(
        float(weights[path].size * weights[path].dtype.itemsize) for path in moved
    )


def _batch(
    config: RunConfig, base: ModelConfig, mesh: Mesh, images: int
) -> dict[str, Any]:
    """Returns the shapes of a step's batch, ``[accumulate, rows, ...]`` by name."""
    by_rows = distributed.batch_sharding(mesh, None)
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array, given the part of it for one row."""
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype), sharding=by_rows)

    batch = {
        name: of((config.data.max_length,), dtype) for name, dtype in _BATCH.items()
    }
    for name, (shape, dtype) in (
        run_kind(config).batch_arrays(config, base, images).items()
    ):
        batch[name] = of(shape, dtype)
    return batch


def _weight(
    path: str, shape: tuple[int, ...], base: ModelConfig, compute: ComputeConfig
) -> Any:
    """Returns the shape of a frozen array in its storage form.

    A kernel that the base's files store quantized has the form of `nalora_jax.ops.quantize` with as
    many bytes: int8, or nf4.
    """
    kind = compute.quantized
    bits = dict(base.stored_bits).get(path)
    if kind is None and bits is not None:
        kind = "int8"
        if bits < 8 and shape[-2] % 64 == 0:
            kind = "nf4"
    if kind is None or not re.search(kernels(kind), path):
        return jax.ShapeDtypeStruct(shape, targets.leaf_dtype(path, compute.dtype))
    return jax.eval_shape(
        partial(quantize, kind=kind), jax.ShapeDtypeStruct(shape, "float32")
    )


def place_shapes(tree: Any, mesh: Mesh, rules: sharding.Rules) -> tuple[Any, Any]:
    """Returns a tree of shapes with their shardings on ``mesh``, and the tree of shardings.

    ``tree`` has arrays or shapes, and ``rules`` give the sharding of a path.
    """
    places = sharding.shardings(tree, mesh, rules)
    shapes = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
    )
    return shapes, places
