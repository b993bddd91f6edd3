"""``nalora train --dry-run``: describes a run from the model's config, tokenizer and data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nalora_jax.assembly import optimizers
from nalora_jax.assembly.mechanisms import first_step, log_first_step, mechanisms_of
from nalora_jax.cli import config_files
from nalora_jax.common import devices, trees
from nalora_jax.config import RunConfig
from nalora_jax.config.structured import flatten_settings
from nalora_jax.data.pipeline import stream_text
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.evaluate.run_log import recorded_settings
from nalora_jax.kinds import record
from nalora_jax.kinds.inputs import check_layout
from nalora_jax.loading import initial_adapter
from nalora_jax.mesh import distributed
from nalora_jax.mesh.distributed import platform_of, prompt_shards
from nalora_jax.mesh.machine import device_memory
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.rules import make
from nalora_jax.models import adapters, decoder, stacks, targets
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.remat import select_remat
from nalora_jax.ops import dispatch, storage
from nalora_jax.planner import estimates, layouts
from nalora_jax.planner.machines import (
    MATRIX_SHARE,
    Topology,
    describe_machine,
    topology,
)
from nalora_jax.train import session


def dry_run(runs: Sequence[RunConfig], *, every_setting: bool = False) -> None:
    """Prints the settings as a YAML file for ``--config``, with comments on their results.

    Args:
      runs: settings of a run, or of all runs of a sweep, of which the first one is described.
      every_setting: also print settings with their default values.

    Raises:
      NaloraError: any error that a run would raise before it reads weights.
    """
    for run in runs:
        record.check_kind(run)
        for text in run.mechanisms:
            make(text)
    adapted_runs = []  # with the settings of the adapter that they start from
    for run in runs:
        recorded = None
        if run.resume:
            recorded = recorded_settings(run.output)
        adapted_runs.append(initial_adapter.take_adapter_settings(run, recorded))
    runs = adapted_runs
    kind = record.run_kind(runs[0])
    inputs = kind.open_inputs(runs[0], None)
    if kind.describe is None:
        lines = _describe(inputs, runs)
    else:
        lines = _describe_encoders(inputs, kind.describe(inputs)) + _differences(runs)
    print(
        config_files.format_yaml(inputs.config, changed_only=not every_setting), end=""
    )
    print("\n".join(f"# {line}" for line in lines))


def _describe_encoders(inputs: record.Inputs, facts: record.Described) -> list[str]:
    """Returns lines that describe a run on image and text encoders."""
    config = inputs.config
    weights = config.compute.itemsize * facts.parameters / 1e9
    held = (
        f"{4 * facts.trained / 1e9:.2f} GB each for trained parameters, their gradients "
        "and the optimizer's state"
    )
    return [
        f"base model: {facts.parameters:,} parameters, {config.model}",
        f"trained parameters: {facts.trained:,}, "
        f"on {len(facts.spec.targets)} projections a layer {facts.where}",
        f"mechanisms: {_mechanisms(config, facts.activation, facts.spec)}",
        f"training data: {facts.data}",
        *_sizes(inputs, facts.examples, facts.noun, facts.noun),
        f"memory: {weights:.2f} GB for the weights, {held}; activations are not estimated",
    ]


def _describe(inputs: record.Inputs, runs: Sequence[RunConfig]) -> list[str]:
    """Returns lines that describe a run on a decoder: the first of ``runs``.

    The last lines say how the other runs differ.
    """
    config = inputs.config
    base = inputs.base
    files = inputs.files
    data = inputs.data
    assert base is not None
    assert files is not None
    assert inputs.adapters is not None
    concrete = layouts.choose_axes(config, base)
    mesh = distributed.make_mesh(concrete.mesh)
    check_layout(concrete, inputs, mesh)
    spec = inputs.adapters
    settings = []  # of all runs, with concrete learning rates
    for run in runs:
        if run.model == runs[0].model:
            adapters.adapter_spec(run, base)  # raises for rules that match nothing
            rate = record.run_kind(run).rate
            run = optimizers.resolve_learning_rate(run, base.d_model, rate)
        settings.append(run)
    size = sum(map(math.prod, stacks.param_shapes(base).values()))
    lines = [f"base model: {size:,} parameters, {files.resolved.path}"]
    if added := AddedTokens.of(config.data):
        tokenizer = files.tokenizer_with(added).backend
        ids = ", ".join(
            f"{text!r} {tokenizer.token_to_id(text)}" for text in added.texts
        )
        lines.append(f"added tokens: {ids}; the embedding has {base.vocab_size:,} rows")
    if config.rope_scaling:
        scaling = f", with RoPE scaling {config.rope_scaling}"
    else:
        scaling = ""
    trained = trees.count_elements(adapters.adapter_shapes(base, spec))
    return [
        *lines,
        _trained(trained, spec),
        f"mechanisms: {_mechanisms(config, base.activation, spec)}",
        f"training data: {stream_text(data.describe())}",
        *_rollouts(concrete, base, mesh),
        f"rows: {config.data.max_length:,} tokens; "
        f"the model's context has {base.max_positions:,}{scaling}",
        *_sizes(inputs, data.rows_per_epoch, "examples", "rows"),
        *_memory(concrete, base, spec, mesh),
        *_differences(settings),
    ]


def _sizes(inputs: record.Inputs, of_epoch: int, held: str, rows: str) -> list[str]:
    """Returns lines on the held-out examples and the steps.

    It logs warnings about their number, as the run does.

    Args:
      inputs: of the run.
      of_epoch: rows of an epoch.
      held: the noun of held-out examples.
      rows: the noun of rows.
    """
    config = inputs.config
    (reported, selecting) = map(len, inputs.held_out)
    session.say_counts(reported, selecting, chosen=config.train.eval_every > 0)
    batch = config.train.batch_size
    return [
        f"held out: {reported} {held} that results are reported on, "
        f"{selecting} that choose the checkpoint",
        f"steps: {config.steps} of {batch} {rows}, {config.steps * batch / of_epoch:.2f} epochs",
    ]


def _trained(parameters: int, spec: targets.AdapterSpec) -> str:
    """Returns the line on what a run trains; stacked arrays count with all of their layers."""
    if not spec.tuned:
        return (
            f"adapters: {parameters:,} trained parameters, "
            f"{len(spec.targets)} projections a layer"
        )
    return (
        f"trained: {parameters:,} parameters, {len(spec.targets)} adapters a layer, "
        f"{len(spec.tuned)} arrays of the model"
    )


def _rollouts(config: RunConfig, base: ModelConfig, mesh: Mesh) -> list[str]:
    """Returns a line on the samples of a step and the cache that draws them.

    It is empty without rewards.
    """
    rl = config.rl
    shards = prompt_shards(mesh)
    if not record.run_kind(config).draws_samples(config):
        return []
    prompts = config.train.batch_size // rl.samples
    _, count, samples = distributed.program_shape(prompts, rl.samples, shards)
    numerics = dispatch.numerics_for(
        config.compute.dtype, platform_of(mesh), config.compute.implementation
    )
    make = partial(
        decoder.init_cache, base, count * samples, config.data.max_length, numerics
    )
    cache = trees.size_bytes(jax.eval_shape(make)) / shards
    return [
        f"rollouts: {rl.samples} samples of each of {prompts} prompts, "
        f"at most {rl.max_new_tokens} tokens, {count * samples} rows at once "
        f"with {cache / 1e9:.2f} GB of keys and values on a device"
    ]


def _this_machine(config: RunConfig, mesh: Mesh) -> Topology:
    """Returns a machine with two measured speeds of a device of the mesh.

    They are that of a matmul of many rows, and that of reading weights for a single row.
    """
    numerics = dispatch.numerics_for(
        config.compute.dtype, platform_of(mesh), config.compute.implementation
    )

    def seconds(rows: int, columns: int) -> float:
        """Returns the least time of a product of ``[rows, 2048]`` and ``[2048, columns]``."""
        x = jnp.ones((rows, 2048), numerics.result)
        kernel = jnp.ones((2048, columns), config.compute.dtype)
        prepared = storage.prepare({"params": {"kernel": kernel}}, numerics)
        kernel = prepared["params"]["kernel"]
        product = jax.jit(partial(storage.matmul, numerics=numerics))
        times = []
        for _ in range(4):  # the first one compiles
            started = time.perf_counter()
            jax.block_until_ready(product(x, kernel))
            times.append(time.perf_counter() - started)
        return min(times)

    # Operations a second of [1024, 2048] x [2048, 2048], each of which is two, and bytes a second
    # of the kernel [2048, 16384].
    flops = 2.0 * 1024 * 2048**2 / seconds(1024, 2048)
    bandwidth = 2048 * 16384 * config.compute.itemsize / seconds(1, 16384)
    sheet = topology("v5e:1x1")
    return replace(
        sheet, chip=replace(sheet.chip, flops=flops / MATRIX_SHARE, bandwidth=bandwidth)
    )


def _differences(runs: Sequence[RunConfig]) -> list[str]:
    """Returns a line on each run of a sweep; none for a single run.

    It has the run's folder, and the settings that differ between runs.
    """
    if len(runs) == 1:
        return []
    rows = [dict(flatten_settings(config_files.plain_settings(run))) for run in runs]
    first = rows[0]
    lines = [f"{len(runs)} runs, the first one as above:"]
    for run, row in zip(runs, rows, strict=True):
        settings = []
        for name, value in row.items():
            if name == "output" or all(other[name] == first[name] for other in rows):
                continue
            if isinstance(value, list):
                value = " ".join(map(str, value)) or "none"
            settings.append(f"{name} {value}")
        lines.append(f"  {run.output}: {', '.join(settings)}")
    return lines


def _mechanisms(config: RunConfig, activation: str, spec: targets.AdapterSpec) -> str:
    """Returns the mechanisms of a run as text; logs the warnings that the run would log."""
    gates = find_gates(trees.unflatten({f"{path}/b": 0 for path, _ in spec.targets}))
    mechanisms = mechanisms_of(config, activation, {}, gates)
    log_first_step(mechanisms, config.steps)
    if not mechanisms.entries:
        return "none, plain LoRA"
    return f"{' '.join(config.mechanisms)}, from step {first_step(mechanisms)}"


def _memory(
    config: RunConfig, base: ModelConfig, spec: targets.AdapterSpec, mesh: Any
) -> list[str]:
    """Returns lines with an estimate of memory per device during training."""
    sizes = {axis: mesh.shape.get(axis, 1) for axis in devices.AXES}
    numerics = dispatch.numerics_for(
        config.compute.dtype, platform_of(mesh), config.compute.implementation
    )
    remat = select_remat(config.compute.remat, base.d_model, numerics)
    data, fsdp, context, tensor = sizes.values()
    placed = estimates.Layout(
        data, fsdp, tensor, remat, config.compute.experts, context=context
    )
    # Bytes do not depend on the machine; times of an unknown machine are measured, for rewards
    # only.
    where = describe_machine(list(mesh.devices.flat))
    if where is None:
        if record.run_kind(config).draws_samples(config):
            where = _this_machine(config, mesh)
        else:
            where = topology("v5e:1x1")
    layout = estimates.estimate(placed, config, base, spec, where)
    parts = {
        "weights": layout.weights,
        "adapters and optimizer": layout.state,
        "activations": layout.activations,
        "working space": layout.working,
    }
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    lines = [
        f"mesh: {distributed.describe_axes(sizes)}, remat {remat}",
        f"memory of a device, estimated: {layout.memory / 1e9:.2f} GB ({listed})",
    ]
    if record.run_kind(config).draws_samples(config):
        update = layout.seconds - layout.rollout
        lines.append(
            f"time of a step, estimated: {layout.rollout:.2g} s for a rollout "
            f"without an early end, {update:.2g} s for an update"
        )
    room = device_memory()
    if layout.memory > room:
        lines += [
            f"that is more than the {room / 1e9:.0f} GB of this machine; for TPUs and GPUs:",
            f"  nalora plan --model {config.model} --topology v5e:4x4 "
            f"--seq {config.data.max_length}",
        ]
    return lines
