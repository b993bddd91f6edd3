"""The step of several runs in one program, on states that are stacked on an axis ``[runs]``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import RUN_AXIS
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch, TrainState


def step_of_runs(
    step: Callable[..., Any], mesh: Mesh, places: Any, params_axes: Any = None
) -> Any:
    """Returns the jitted step of all runs.

    It is a function ``(params, states, batch, values, active) -> (states, metrics)``.

    Args:
      step: of one run, ``(params, state, batch, values) -> (state, metrics)``.
      mesh: the sweep's devices.
      places: shardings of the states, which are donated.
      params_axes: axis ``[runs]`` of each array of the params, 0 or None; None: no array has it.
    """

    def one(
        params: Any, state: TrainState, batch: Batch, values: Any, active: jax.Array
    ) -> Any:
        """Returns the result of a step of one run; its state stays the same unless it is active."""
        after, metrics = step(params, state, batch, values)
        kept = jax.tree.map(partial(jnp.where, active), after, state)
        return kept, metrics

    in_axes = (params_axes, 0, 0, 0, 0)

    def by_axis(of_axis: Callable[..., Any], *trees_of_params: Any) -> Any:
        """Maps a function of the axis, 0 or None, of each array of the params."""
        return jax.tree.map(
            of_axis, params_axes, *trees_of_params, is_leaf=lambda axis: axis is None
        )

    def first_run(axis: int | None, x: Any) -> Any:
        if axis is None:
            return x
        return x[0]

    def spec_of(axis: int | None) -> Any:
        if axis is None:
            return P()
        return P(RUN_AXIS)

    def together(params: Any, *stacked: Any) -> Any:
        """Returns the result of a step of all runs, arrays ``[runs, ...]``.

        A single run has the program of a run alone, without a vmap over one element.
        """
        if stacked[-1].shape[0] > 1:
            return jax.vmap(one, in_axes)(params, *stacked)
        params_of_run = by_axis(first_run, params)
        of_run = jax.tree.map(lambda x: x[0], stacked)
        results = one(params_of_run, *of_run)
        return jax.tree.map(lambda x: x[None], results)

    of_runs: Callable[..., Any] = together
    if RUN_AXIS in mesh.shape and distributed.devices_per_run(mesh) > 1:
        of_runs = jax.vmap(one, in_axes, spmd_axis_name=RUN_AXIS)
    elif RUN_AXIS in mesh.shape:
        # Every device runs the program of one device, so no collective crosses the axis.
        in_specs = (
            by_axis(spec_of),
            P(RUN_AXIS),
            P(RUN_AXIS),
            P(RUN_AXIS),
            P(RUN_AXIS),
        )
        of_runs = jax.shard_map(
            together,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=P(RUN_AXIS),
            check_vma=False,
        )
    out = distributed.stacked_sharding(mesh, distributed.replicated_sharding(mesh))
    options = distributed.compiler_options(mesh)
    return jax.jit(
        of_runs, donate_argnums=1, out_shardings=(places, out), compiler_options=options
    )
