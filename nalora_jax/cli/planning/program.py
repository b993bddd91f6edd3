"""The training step of a run for absent hardware: architectures by name, abstract devices, and arguments."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.axes import BATCH_AXES, WEIGHT_AXES
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.data.images.files import ImageProcessor
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.machines import Topology
from nalora_jax.method.step import init_state
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.paths import leaf_dtype
from nalora_jax.models.rope_scaling import with_rope_scaling
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import gathered, kernels, quantize
from nalora_jax.study.sweeps.program import stacked_sharding, step_of_runs
from nalora_jax.train.decoder_program import decoder_program
from nalora_jax.train.kinds import decoder_parts

_BATCH = {
    "tokens": "int32", "targets": "int32", "loss_weights": "float32", "segment_ids": "int32", "positions": "int32",
}  # fmt: skip

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER = Path(__file__).parent / "released"  # its README.md states the sources
# ``config.json`` of released checkpoints, by lower-case name.
CONFIGS: dict[str, dict[str, Any]] = {
    file.stem.lower(): read_json(file)
    for file in sorted(_FOLDER.glob("*.json"), key=lambda file: file.stem.lower())
}


def architecture(name: str, *, images: bool = False, rope_scaling: str = "") -> ModelConfig:
    """Returns the architecture called ``name``.

    A name is a key of `CONFIGS`, a ``config.json``, a Hugging Face folder, or a hub id: its last
    part is a key of `CONFIGS`, or its ``config.json`` is read from the hub's cache or downloaded.
    With ``images`` a multimodal model includes its image tower and projector; by default only its
    text model is returned. ``rope_scaling`` replaces the model's (`nalora_jax.models.rope_scaling`).

    Raises:
      NaloraError: the name is unknown, or its config or its new RoPE scaling is not supported.
    """
    raw, where = _raw_config(name)
    return ModelConfig.from_hf(with_rope_scaling(raw, rope_scaling, where), where, images=images)


def _raw_config(name: str) -> tuple[dict[str, Any], str]:
    """Returns the fields of the ``config.json`` of a model, and their source for messages."""
    file = Path(name)
    if file.is_dir():
        file /= "config.json"
    if file.suffix == ".json" and file.exists():
        return read_json(file), str(file)
    on_hub = _HUB_ID.fullmatch(name) is not None
    known = name.rpartition("/")[2].lower() if on_hub else name.lower()
    if known in CONFIGS:
        return CONFIGS[known], name
    found, remedy = repr(name), "download the model's config.json: planning needs nothing else"
    if on_hub:
        from nalora_jax.weights.hub import cached_snapshot, download_snapshot

        try:
            folder = cached_snapshot(name, "config.json") or download_snapshot(name, "config.json")
            return read_json(folder / "config.json"), name
        except NaloraError as error:
            found, remedy = f"{error.found} ({name} on the hub)", error.remedy or remedy
    raise NaloraError(
        "--model",
        expected="a config.json, a folder that contains one, a hub id, or one of " + ", ".join(CONFIGS),
        found=found,
        remedy=remedy,
    )


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
    spec = adapter_spec(config, base)
    parts = decoder_parts(config, base, ImageProcessor())
    program = decoder_program(config, base, spec, mesh, **parts)

    def fresh(params: Any) -> Any:
        lora = init_lora(base, spec, jax.random.key(0), params)
        return init_state(lora, program.optimizer, 0)

    weights = {path: _weight(path, shape, config.compute) for path, shape in param_shapes(base).items()}
    params = gathered(placed(trees.unflatten(weights), mesh, distributed.PARAM_RULES)[0], WEIGHT_AXES)
    state, places = placed(jax.eval_shape(fresh, trees.unflatten(weights)), mesh, distributed.STATE_RULES)
    batch = _batch(config, base, mesh, images)
    if not runs:
        return program.compiled_step(places), (params, state, batch)

    def one(params: Any, state: Any, batch: Any, rates: jax.Array) -> Any:
        return program.pure(spec, program.mechanisms, {"rate_of_step": rates})(params, state, batch)

    def of_runs(leaf: Any) -> Any:
        place = stacked_sharding(mesh, leaf.sharding)
        return jax.ShapeDtypeStruct((runs, *leaf.shape), leaf.dtype, sharding=place)

    states, batches = jax.tree.map(of_runs, (state, batch))
    everywhere = NamedSharding(mesh, P())
    rates = of_runs(jax.ShapeDtypeStruct((config.steps,), jnp.float32, sharding=everywhere))
    active = of_runs(jax.ShapeDtypeStruct((), jnp.bool_, sharding=everywhere))
    step = step_of_runs(one, mesh, jax.tree.map(lambda leaf: leaf.sharding, states))
    return step, ({"params": params}, states, batches, rates, active)


def _batch(config: RunConfig, base: ModelConfig, mesh: Mesh, images: int) -> dict[str, Any]:
    """Returns the shapes of a step's batch."""
    by_rows = NamedSharding(mesh, P(None, BATCH_AXES))
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.dtype(dtype), sharding=by_rows)

    batch = {name: of((config.data.max_length,), dtype) for name, dtype in _BATCH.items()}
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
