"""The compiled step of several runs: `jax.vmap` of a run's step, with the frozen base unbatched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.axes import RUN
from nalora_jax.layout import distributed
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.study.sweeps.groups import widest
from nalora_jax.study.sweeps.stack import common_shapes, shared, stack, stacked_sharding, take, unpadded
from nalora_jax.study.sweeps.values import Values, mechanisms_with, spec_with, values_of
from nalora_jax.train.assembly import Assembly
from nalora_jax.train.state_metrics import StateMetrics


class SweepProgram:
    """The runs of one program and their compiled step.

    Args:
      runs: assemblies on one mesh, with one `nalora_jax.study.sweeps.groups.program_key`.
      width: of the model, for automatic learning rates; 0 for image and text encoders.
      slots: length of the axis ``[runs]``, if larger; the last run fills it and does not change.

    Attributes:
      params: the frozen weights; arrays that differ between runs have an axis ``[runs]``.
      values: the values in which the runs differ, on the mesh.
    """

    def __init__(self, runs: Sequence[Assembly], width: int = 0, slots: int = 0) -> None:
        runs = [*runs, *[runs[-1]] * max(0, slots - len(runs))]
        first = runs[0]
        self.runs, self.mesh = tuple(runs), first.mesh
        self._spec, self._shapes = (
            widest([run.spec for run in runs]),
            common_shapes([run.state for run in runs]),
        )
        padded = trees.map_named(
            lambda path, x: jax.ShapeDtypeStruct(self._shapes[path], x.dtype), first.state
        )
        self._solo = distributed.shardings(padded, self.mesh, distributed.STATE_RULES)
        self._places = jax.tree.map(lambda place: stacked_sharding(self.mesh, place), self._solo)
        self._by_run = stacked_sharding(self.mesh, NamedSharding(self.mesh, P()))
        self.values: Values = jax.device_put(values_of(runs, width), self._by_run)
        weights, axes = shared([run.params for run in runs], self.mesh)
        of_params: Any = None
        if axes is None:
            self.params = first.view(weights)
        else:
            self.params, of_params = {"params": weights}, {"params": axes}
        self._compiled: Any = jax.jit(
            step_of_runs(self._one, self.mesh, of_params),
            donate_argnums=(1,),
            out_shardings=(self._places, self._by_run),
            compiler_options=distributed.compiler_options(self.mesh),
        )
        self._trains = lru_cache(maxsize=2)(self._trained)  # changes when a run ends
        self._take = jax.jit(take, out_shardings=self._solo)
        self._measure: Any = jax.jit(jax.vmap(self._metrics_of_one), out_shardings=self._by_run)

    def begin(self, states: Sequence[TrainState]) -> TrainState:
        """Returns the states of all runs as one state with an axis ``[runs]``."""
        filled = [*states, *[states[-1]] * (len(self.runs) - len(states))]
        joined: TrainState = stack(filled, self._shapes, self._places)
        return joined

    def step(
        self, states: TrainState, batch: Batch, active: Sequence[bool]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the states after a step and the metrics of each run, ``[runs, ...]``.

        Args:
          states: of all runs; donated.
          batch: arrays ``[runs, accumulate, rows, ...]``.
          active: by run; the state of other runs, and of filled slots, stays as it is.
        """
        result: tuple[TrainState, dict[str, Any]] = self._compiled(*self._arguments(states, batch, active))
        return result

    def lower(self, states: TrainState, batch: Batch) -> Any:
        """Returns the lowered step (``jax.stages.Lowered``)."""
        return self._compiled.lower(*self._arguments(states, batch, [True] * len(self.runs)))

    def state_of(self, states: TrainState, index: int) -> TrainState:
        """Returns the state of one run, with the shapes of its solo run."""
        padded = self._take(states, jnp.int32(index))
        shapes = {path: leaf.shape for path, leaf in trees.flatten(self.runs[index].state).items()}
        state: TrainState = unpadded(padded, shapes)
        return state

    def measure(self, states: TrainState) -> list[dict[str, Any]]:
        """Returns `nalora_jax.train.state_metrics.StateMetrics.measure` of every run."""
        measured = jax.tree.map(distributed.fetch, self._measure(states, self.values))
        return [
            run.state_metrics.record(*jax.tree.map(lambda leaf, i=index: leaf[i], measured))
            for index, run in enumerate(self.runs)
        ]

    def _metrics_of_one(self, state: TrainState, values: Mapping[str, Any]) -> Any:
        mechanisms = mechanisms_with(self.runs[0].mechanisms, values)
        return StateMetrics(mechanisms, spec_with(self._spec, values["scales"]), self.mesh).compute(state)

    def _arguments(self, states: TrainState, batch: Batch, active: Sequence[bool]) -> tuple[Any, ...]:
        return self.params, states, batch, self.values, self._trains(tuple(active))

    def _trained(self, active: tuple[bool, ...]) -> jax.Array:
        """Returns ``active`` of all slots on the mesh."""
        trains = np.zeros(len(self.runs), bool)
        trains[: len(active)] = active
        return jax.make_array_from_callback(trains.shape, self._by_run, trains.__getitem__)

    def _one(self, params: Any, state: TrainState, batch: Batch, values: Mapping[str, Any]) -> Any:
        """Returns the step of one run."""
        first = self.runs[0]
        mechanisms = mechanisms_with(first.mechanisms, values)
        step = first.pure(spec_with(self._spec, values["scales"]), mechanisms, values["numbers"])
        return step(params, state, batch)


def step_of_runs(step: Callable[..., Any], mesh: Mesh, params_axes: Any = None) -> Callable[..., Any]:
    """Returns the step ``(params, states, batch, values, active) -> (states, metrics)`` of all runs.

    Args:
      step: of one run, ``(params, state, batch, values) -> (state, metrics)``.
      mesh: the sweep's devices.
      params_axes: axis ``[runs]`` of each array of the params, 0 or None; None: no array has it.
    """

    def one(params: Any, state: TrainState, batch: Batch, values: Any, active: jax.Array) -> Any:
        after, metrics = step(params, state, batch, values)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state), metrics

    in_axes = (params_axes, 0, 0, 0, 0)

    def by_axis(of_axis: Callable[..., Any], *trees_of_params: Any) -> Any:
        return jax.tree.map(of_axis, params_axes, *trees_of_params, is_leaf=lambda axis: axis is None)

    def together(params: Any, *of_runs: Any) -> Any:
        """Returns the step of all runs; one run alone has the program of a solo run."""
        if of_runs[-1].shape[0] > 1:
            return jax.vmap(one, in_axes)(params, *of_runs)
        of_run = jax.tree.map(lambda x: x[0], of_runs)
        results = one(by_axis(lambda axis, x: x if axis is None else x[0], params), *of_run)
        return jax.tree.map(lambda x: x[None], results)

    if RUN not in mesh.shape:
        return together
    if distributed.devices_per_run(mesh) > 1:
        return jax.vmap(one, in_axes, spmd_axis_name=RUN)
    # Every device runs the program of one device, so no collective crosses the axis.
    of_params = by_axis(lambda axis: P() if axis is None else P(RUN))
    in_specs = (of_params, P(RUN), P(RUN), P(RUN), P(RUN))
    mapped: Callable[..., Any] = jax.shard_map(
        together, mesh=mesh, in_specs=in_specs, out_specs=P(RUN), check_vma=False
    )
    return mapped
