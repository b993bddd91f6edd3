"""The layout of a run on the devices that it has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import jax

from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.plan.layouts import Layout, choose, decoder_alone
from nalora_jax.plan.machines import of_devices

log = logging.getLogger(__name__)


def laid_out(config: RunConfig, base: ModelConfig, devices: Sequence[jax.Device] | None = None) -> RunConfig:
    """``config`` with every axis of its mesh, and on TPUs and GPUs its rematerialisation, decided.

    Args:
      config: the run; axes of 0 and a remat of "auto" are left to this function.
      base: architecture of the base model.
      devices: all devices of all processes by default.

    Raises:
      NaloraError: the model fits in no way that is left open, or the axes do not fit the devices, batch or heads.
    """
    found = list(jax.devices() if devices is None else devices)
    where = of_devices(found)
    if where is None:  # a CPU, or a chip that nothing is known of: the simplest mesh that works
        return config
    spec = adapter_spec(config, base)
    layout = choose(config, *decoder_alone(base, spec), where, config.data.max_length)
    log.info("mesh: %s", layout)
    return with_layout(config, layout)


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """``config`` with the mesh and the rematerialisation of ``layout``."""
    mesh = MeshConfig(layout.data, layout.fsdp, layout.tensor)
    compute: Any = replace(config.compute, remat=cast(Any, layout.remat))
    return replace(config, mesh=mesh, compute=compute)
