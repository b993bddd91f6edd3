"""Layouts of a sweep by estimates: groups of devices, runs on each, rematerialization policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.layouts import Layout, decoder_alone, estimate, policies_of, usable, usable_memory
from nalora_jax.layout.machines import Topology
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig

SweepLayouts = dict[Layout, MeshConfig]  # layouts of a group's rows; seconds are of all programs


def fitting_sweep(
    config: RunConfig, base: ModelConfig, where: Topology, seq: int, runs: int
) -> SweepLayouts:
    """Returns the layouts of a sweep that are estimated to fit, with their meshes.

    Args:
      config: settings of a run, whose rows belong to one run; ``mesh.run`` and
        ``mesh.runs_per_device`` are chosen if they are 0, the policy if it is "auto".
      base: the model.
      where: the machine.
      seq: tokens of a row.
      runs: number of runs.

    Raises:
      NaloraError: no layout fits.
    """
    layouts = dict(_candidates(config, base, where, seq, runs))
    if not layouts:
        raise NaloraError(
            "--mesh.run",
            expected="groups of devices that can share the rows and heads of a run, or one device a run",
            found=config.mesh.run,
        )
    fits = {layout: layouts[layout] for layout in usable(list(layouts), where)}
    if not fits:
        smallest = min(layouts, key=lambda layout: layout.memory)
        raise NaloraError(
            "--sweep",
            expected=f"runs that fit in {usable_memory(where) / 1e9:.2f} GB a chip",
            found=f"{smallest.memory / 1e9:.2f} GB ({shown(layouts[smallest])})",
            remedy="use shorter rows, --compute.quantize int8, or fewer runs on a device (--mesh.runs-per-device)",
        )
    return fits


def _candidates(
    config: RunConfig, base: ModelConfig, where: Topology, seq: int, runs: int
) -> Iterator[tuple[Layout, MeshConfig]]:
    """Yields layouts with the estimated bytes of a chip and seconds of a step of every run."""
    decoder, spec = decoder_alone(base, adapter_spec(config, base))
    for mesh in meshes(config, base, where.size, runs, where.slices):
        together = mesh.runs_per_device
        train = replace(config.train, batch_size=config.train.batch_size * together)
        programs = math.ceil(runs / (mesh.run * together))
        for remat in policies_of(config, base):
            sizes = 1, mesh.fsdp, mesh.tensor
            layout = estimate(replace(config, train=train), decoder, spec, where, seq, sizes, remat)
            yield (
                replace(layout, state=layout.state * together, seconds=layout.seconds * programs),
                mesh,
            )


def meshes(
    config: RunConfig, base: ModelConfig, size: int, runs: int, slices: int = 1
) -> Iterator[MeshConfig]:
    """Yields meshes from the smallest group of devices to all, each with fewer and fewer runs.

    Within a group, "fsdp" splits as many rows as there are, and "tensor" takes the other devices.
    Mixtures of experts need one device a run, or all devices for one. A run stays within one of the
    ``slices``.
    """
    rows = config.train.batch_size // config.train.accumulate
    groups = [size // n for n in range(1, size + 1) if size % n == 0 and size // n <= runs]
    if config.mesh.run:
        groups = [config.mesh.run]
    for run in groups:
        fsdp = math.gcd(rows, size // run)
        tensor = size // run // fsdp
        if base.n_heads % tensor or base.n_kv_heads % tensor:
            continue
        if run % slices or (base.n_experts and 1 < run < size):
            continue
        shared = config.mesh.runs_per_device or math.ceil(runs / run)
        while shared >= 1:
            yield MeshConfig(data=1, fsdp=fsdp, tensor=tensor, run=run, runs_per_device=shared)
            if config.mesh.runs_per_device:
                break
            shared //= 2


def shown(mesh: MeshConfig) -> str:
    """Returns the text of a sweep's mesh."""
    return f"run {mesh.run} x fsdp {mesh.fsdp} x tensor {mesh.tensor}, {mesh.runs_per_device} a group"
