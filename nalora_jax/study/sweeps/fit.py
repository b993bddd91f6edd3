"""The number of runs that train together, by devices and memory, before weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax

from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.mesh.machine import device_memory
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner import estimates, layouts
from nalora_jax.planner.machines import describe_machine, topology

_USABLE = 0.9  # share of a device's memory


@dataclass(frozen=True)
class Fitting:
    """The layout of a group of runs and the number of runs that fit in it at the same time."""

    layout: estimates.Layout
    capacity: int
    width: int  # d_model; 0 for image and text encoders

    @classmethod
    def of(cls, config: RunConfig, base: ModelConfig | None, count: int) -> Fitting:
        """Returns the fitting of ``count`` runs.

        On chips that `nalora plan` knows it is the fastest layout that is estimated to fit.

        Args:
          config: settings of the first run.
          base: architecture of its base; None for image and text encoders (no estimate).
          count: number of runs.

        Raises:
          NaloraError: rows that the mesh splits, more runs a device than fit, several groups of
            devices for a mixture of experts, or a group that does not divide a batch.
        """
        if config.mesh.context not in (0, 1):
            raise NaloraError(
                "--mesh.context",
                expected="1 in a sweep, whose rows are whole",
                found=config.mesh.context,
            )
        where = describe_machine(jax.devices())
        mesh = config.mesh
        if (
            base is not None
            and where is not None
            and mesh.data == mesh.fsdp == mesh.tensor == 0
        ):
            layout = layouts.fastest(
                layouts.fitting_sweep_layouts(config, base, where, count)
            )
            return cls(layout, layout.together, base.d_model)
        # Bytes of a device that may be used, of the base, and of a run. Without an estimate, a
        # run of 1 byte makes the memory no limit.
        limit = _USABLE * device_memory()
        weights = 0.0
        run = 1.0
        width = 0
        if base is not None:
            (weights, run) = _bytes(config, base)
            width = base.d_model
        experts = base is not None and base.n_experts > 0
        mesh = _mesh(config, count, weights / limit, experts)
        groups = max(mesh.run, 1)
        if experts:
            _check_experts(mesh)
        # The base is split over fsdp and tensor, a run's state and activations over data, too.
        split = max(mesh.fsdp, 1) * max(mesh.tensor, 1)
        free = limit - weights / split
        fits = max(1, int(free / (run / max(mesh.data, 1) / split)))
        requested = mesh.runs_per_device
        if requested > fits:
            raise NaloraError(
                "--mesh.runs-per-device",
                expected=f"at most {fits} runs, which fit in {limit / 1e9:.1f} GB with the base",
                found=requested,
            )
        per_group = requested or min(fits, math.ceil(count / groups))
        policies = (config.compute.remat, config.compute.experts)
        sizes = (mesh.data, mesh.fsdp, mesh.tensor)
        layout = estimates.Layout(
            *sizes, *policies, run=mesh.run, runs_per_device=per_group
        )
        return cls(layout, groups * per_group, width)

    def next(self, left: int) -> int:
        """Returns the number of runs of the next program, if ``left`` runs are left.

        The remaining programs get about equally many runs.
        """
        programs = math.ceil(left / self.capacity)
        return math.ceil(left / programs)

    def slots(self, count: int) -> int:
        """Returns the length of the axis ``[runs]`` for ``count`` runs.

        It is ``count`` rounded up to a multiple of the number of groups of devices.
        """
        groups = max(self.layout.run, 1)
        return math.ceil(count / groups) * groups

    def describe(self, count: int) -> str:
        """Returns a line for the log about a program of ``count`` runs."""
        groups = max(self.layout.run, 1)
        each = self.slots(count) // groups
        return f"{count} runs in one program: {groups} group(s) of devices with {each} each"


def _check_experts(mesh: MeshConfig) -> None:
    """Raises a NaloraError if several groups of several devices each train a mixture of experts."""
    devices = distributed.platform_of().devices
    axes = (mesh.data, mesh.fsdp, mesh.tensor)
    is_one_group = mesh.run in (0, 1)
    is_one_device_each = mesh.run == devices and max(axes) <= 1 and min(axes) >= 0
    if is_one_group or is_one_device_each:
        return
    sizes = f"(data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor})"
    raise NaloraError(
        "--mesh.run",
        expected="one device a run for mixtures of experts, or all devices for each",
        found=f"{mesh.run} on {devices} devices {sizes}",
        remedy=f"use --mesh.run {devices} with the other axes at 0, or --mesh.run 1",
    )


def _bytes(config: RunConfig, base: ModelConfig) -> tuple[float, float]:
    """Returns the estimated bytes of the base, and of each run: state and saved activations."""
    remat = config.compute.remat
    if remat == "auto":
        remat = "none"
    whole = estimates.Layout(1, 1, 1, remat, config.compute.experts)
    # Bytes do not depend on the machine, so any topology serves.
    layout = estimates.estimate(
        whole, config, *estimates.decoder_alone(config, base), topology("v5e:1x1")
    )
    return layout.weights, layout.state + layout.activations


def _mesh(config: RunConfig, count: int, share: float, experts: bool) -> MeshConfig:
    """Returns the mesh with a concrete axis "run": the number of groups of devices.

    Each run gets as few devices as hold the base in half of their memory, and its axis fsdp gets
    the devices that other axes leave. A run of a mixture of experts gets one device or all. A
    concrete axis "run" stays, and with one device all axes are 1.

    Args:
      config: settings of the first run; axes of 0 are open.
      count: number of runs.
      share: bytes of the base as a share of one device's memory.
      experts: the base is a mixture of experts.
    """
    mesh = config.mesh
    devices = distributed.platform_of().devices
    if mesh.run:
        return mesh
    if devices == 1:
        return replace(mesh, data=1, fsdp=1, tensor=1, run=1)
    rows = config.train.batch_size // config.train.accumulate  # of a micro-batch
    fixed = math.prod(size for size in (mesh.data, mesh.fsdp, mesh.tensor) if size > 0)
    sizes = [  # possible numbers of devices of a run, ascending
        size
        for size in range(fixed, devices + 1, fixed)
        if devices % size == 0
        and share / size < 0.5
        and rows % (size // fixed) == 0
        and not (experts and 1 < size < devices)
    ]
    if not sizes:
        return replace(mesh, run=1)
    # The smallest size with at most as many groups as runs: groups without a run would be idle.
    size = next((size for size in sizes if devices // size <= count), sizes[-1])
    fsdp = mesh.fsdp
    if fsdp <= 0:
        fsdp = size // fixed
    return replace(
        mesh,
        data=max(mesh.data, 1),
        fsdp=fsdp,
        tensor=max(mesh.tensor, 1),
        run=devices // size,
    )
