"""The program of several runs: their stacked states, the compiled step, and the training loop.

The step is `jax.vmap` of a run's step, with the frozen base unbatched. States are padded with zeros
to common shapes and stacked on an axis ``[runs]``. Padding a smaller rank is exact: columns of A
and rows of B that are both zero have no gradient. Each run logs, evaluates and saves as a solo run
does. A run that is finished, stopped early or diverged keeps its state while the others train.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from signal import Signals
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from nalora_jax.assembly.program import Assembly
from nalora_jax.assembly.stacked import step_of_runs
from nalora_jax.assembly.state_metrics import StateMetrics
from nalora_jax.common import trees
from nalora_jax.common.notes import count_progress
from nalora_jax.errors import TrainingDivergedError
from nalora_jax.mesh import distributed, processes, sharding
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.study.sweeps.values import (
    RunValues,
    mechanisms_with,
    spec_with,
    values_of,
    widest,
)
from nalora_jax.train.loop import Follower
from nalora_jax.train.preemption import StopSignals

_Shapes = dict[str, tuple[int, ...]]  # by path


# ---------------------------------------------------------------- states and batches


def common_shapes(runs: Sequence[Any]) -> _Shapes:
    """Returns the largest size of every axis by path, over trees of equal structure."""
    flat = [trees.flatten(run) for run in runs]
    largest = {}
    for path in flat[0]:
        shapes = [tree[path].shape for tree in flat]
        largest[path] = tuple(map(max, zip(*shapes, strict=True)))
    return largest


def batch_of(
    rows: Sequence[Mapping[str, np.ndarray]], mesh: Mesh
) -> dict[str, jax.Array]:
    """Returns global arrays ``[runs, accumulate, rows, ...]`` of the host batches of all runs.

    Args:
      rows: by run, the arrays ``[accumulate, rows, ...]`` of
        `nalora_jax.mesh.distributed.process_rows`.
      mesh: the sweep's devices.
    """
    stacked = {}
    for name in rows[0]:
        stacked[name] = np.stack([run[name] for run in rows])
    batch: dict[str, jax.Array] = distributed.make_global_batch(
        stacked, mesh, rows_axis=2
    )
    return batch


def _pad(numpy: Any, array: Any, shape: tuple[int, ...]) -> Any:
    """Returns ``array`` padded with zeros to ``shape``; ``numpy`` is `numpy` or `jax.numpy`."""
    if array.shape == shape:
        return array
    widths = []
    for size, target in zip(array.shape, shape, strict=True):
        widths.append((0, target - size))
    return numpy.pad(array, widths)


def share_weights(runs: Sequence[Any], mesh: Mesh) -> tuple[Any, Any]:
    """Returns the frozen weights of all runs, and which of the arrays have an axis ``[runs]``.

    Arrays that all runs share are not copied. Kernels differ by run if their initialization
    subtracted the initial adapters. A tree that all runs share is returned with None.

    Returns:
      The weights, and a tree of the same structure with 0 for arrays ``[runs, ...]`` and None for
      others.
    """
    if all(run is runs[0] for run in runs):
        return runs[0], None
    flat = [trees.flatten(run) for run in runs]
    shapes = common_shapes(runs)
    differing = set()
    for path, leaf in flat[0].items():
        if any(tree[path] is not leaf for tree in flat):
            differing.add(path)

    def join(path: str, leaf: jax.Array) -> jax.Array:
        """Returns the array of all runs, padded to one shape and stacked if it differs."""
        if path not in differing:
            return leaf
        arrays = [jnp.asarray(tree[path]) for tree in flat]
        stacked = jnp.stack([_pad(jnp, array, shapes[path]) for array in arrays])
        solo: Any = leaf.sharding
        return jax.device_put(stacked, distributed.stacked_sharding(mesh, solo))

    def axis_of(path: str, leaf: jax.Array) -> int | None:
        """Returns the place of the axis ``[runs]`` in an array, or None without it."""
        if path in differing:
            return 0
        return None

    return trees.map_named(join, runs[0]), trees.map_named(axis_of, runs[0])


# ---------------------------------------------------------------- step


class SweepProgram:
    """The runs of one program and their compiled step.

    Args:
      runs: assemblies on one mesh, with one `nalora_jax.study.sweeps.values.program_key`.
      width: of the model, for automatic learning rates; 0 for image and text encoders.
      slots: length of the axis ``[runs]``, if larger; the last run fills it and does not change.

    Attributes:
      params: the frozen weights; arrays that differ between runs have an axis ``[runs]``.
      values: the values in which the runs differ, on the mesh.
    """

    def __init__(
        self, runs: Sequence[Assembly], width: int = 0, slots: int = 0
    ) -> None:
        """Places weights and values on the mesh, and prepares the programs without compiling."""
        empty = max(0, slots - len(runs))
        runs = [*runs, *[runs[-1]] * empty]
        first = runs[0]
        self.runs = tuple(runs)
        self.mesh = first.mesh
        self._spec = widest([run.spec for run in runs])
        self._shapes = common_shapes([run.state for run in runs])
        padded = trees.map_named(
            lambda path, leaf: jax.ShapeDtypeStruct(self._shapes[path], leaf.dtype),
            first.state,
        )
        # Shardings of one run's state, and of the states of all runs.
        self._solo = sharding.shardings(padded, self.mesh, sharding.STATE_RULES)
        self._places = jax.tree.map(
            lambda place: distributed.stacked_sharding(self.mesh, place), self._solo
        )
        self._by_run = distributed.stacked_sharding(
            self.mesh, distributed.replicated_sharding(self.mesh)
        )
        self.values: RunValues = jax.device_put(values_of(runs, width), self._by_run)
        weights, axes = share_weights([run.params for run in runs], self.mesh)
        of_params: Any = None
        if axes is None:
            self.params = first.view(weights)
        else:
            self.params = {"params": weights, **first.frozen}
            of_params = {"params": axes} | dict.fromkeys(first.frozen)
        self._compiled = step_of_runs(
            self._step_of_one, self.mesh, self._places, of_params
        )
        self._trains = lru_cache(maxsize=2)(
            self._active_slots
        )  # changes when a run ends
        taken = partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def take(states: Any, index: Any) -> Any:
            return jax.tree.map(lambda leaf: taken(leaf, index), states)

        self._take: Any = jax.jit(take, out_shardings=self._solo)
        self._measure: Any = jax.jit(
            jax.vmap(self._metrics_of_one), out_shardings=self._by_run
        )

    def begin(self, states: Sequence[TrainState]) -> TrainState:
        """Returns the states of all runs as one state with an axis ``[runs]``.

        All processes must call it.
        """
        empty = len(self.runs) - len(states)
        filled = [*states, *[states[-1]] * empty]
        flat = [trees.flatten(jax.tree.map(processes.fetch, state)) for state in filled]

        def join(path: str, place: Sharding) -> jax.Array:
            """Returns the array of all runs, padded to one shape and stacked."""
            arrays = [np.asarray(tree[path]) for tree in flat]
            shape = self._shapes[path]
            stacked = np.stack([_pad(np, array, shape) for array in arrays])
            return jax.make_array_from_callback(
                stacked.shape, place, stacked.__getitem__
            )

        joined: TrainState = trees.map_named(join, self._places)
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
        result: tuple[TrainState, dict[str, Any]] = self._compiled(
            *self._arguments(states, batch, active)
        )
        return result

    def lower(self, states: TrainState, batch: Batch) -> Any:
        """Returns the lowered step (``jax.stages.Lowered``)."""
        return self._compiled.lower(
            *self._arguments(states, batch, [True] * len(self.runs))
        )

    def state_of(self, states: TrainState, index: int) -> TrainState:
        """Returns the state of one run, with the shapes that it has when it trains alone."""
        solo = trees.flatten(self.runs[index].state)

        def without_padding(path: str, leaf: jax.Array) -> jax.Array:
            """Returns the first elements of every axis."""
            shape = solo[path].shape
            if leaf.shape == shape:
                return leaf
            return leaf[tuple(map(slice, shape))]

        state: TrainState = trees.map_named(
            without_padding, self._take(states, jnp.int32(index))
        )
        return state

    def measure(self, states: TrainState) -> list[dict[str, Any]]:
        """Returns `nalora_jax.assembly.state_metrics.StateMetrics.measure` of every run."""
        measured = jax.tree.map(processes.fetch, self._measure(states, self.values))
        metrics = []
        for index, run in enumerate(self.runs):
            of_run = jax.tree.map(operator.itemgetter(index), measured)
            metrics.append(run.state_metrics.record(*of_run))
        return metrics

    def _metrics_of_one(self, state: TrainState, values: Mapping[str, Any]) -> Any:
        """Returns the metrics of one run's state, as arrays."""
        mechanisms = mechanisms_with(self.runs[0].mechanisms, values)
        spec = spec_with(self._spec, values["scales"])
        return StateMetrics(mechanisms, spec, self.mesh).compute(state)

    def _arguments(
        self, states: TrainState, batch: Batch, active: Sequence[bool]
    ) -> tuple[Any, ...]:
        """Returns the arguments of the compiled step."""
        return self.params, states, batch, self.values, self._trains(tuple(active))

    def _active_slots(self, active: tuple[bool, ...]) -> jax.Array:
        """Returns bool ``[runs]`` on the mesh: ``active`` by run, False for filled slots."""
        trains = np.zeros(len(self.runs), bool)
        trains[: len(active)] = active
        return jax.make_array_from_callback(
            trains.shape, self._by_run, trains.__getitem__
        )

    def _step_of_one(
        self, params: Any, state: TrainState, batch: Batch, values: Mapping[str, Any]
    ) -> Any:
        """Returns the result of a step of one run: its state and metrics."""
        first = self.runs[0]
        mechanisms = mechanisms_with(first.mechanisms, values)
        spec = spec_with(self._spec, values["scales"])
        step = first.pure(spec, mechanisms, values["numbers"])
        return step(params, state, batch)


# ---------------------------------------------------------------- loop


class RunLoop:
    """A run in the loop, with the metrics of its states that its hooks read.

    These are `nalora_jax.assembly.state_metrics.StateMetrics`, of all runs by one program.

    Args:
      follower: its actions after each step.
      batches: its host batches, starting at its next step.

    Attributes:
      error: set if the run diverged.
    """

    def __init__(
        self, follower: Follower, batches: Iterator[Mapping[str, np.ndarray]]
    ) -> None:
        """Starts at the follower's step; a run without remaining steps is not active."""
        self.follower = follower
        self.step = follower.result.step
        self.active = self.step < follower.schedule.steps
        self.error: TrainingDivergedError | None = None
        self._batches = batches
        self._batch: Mapping[str, np.ndarray] | None = None
        self._measured: Callable[[], dict[str, Any]] = dict

    def batch(self) -> Mapping[str, np.ndarray]:
        """Returns the next batch; of a run that has ended, the last one again."""
        if self.active or self._batch is None:
            self._batch = next(self._batches)
        return self._batch

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the metrics of the run's current state."""
        return self._measured()

    def after(
        self,
        metrics: Mapping[str, Any],
        state: Callable[[], TrainState],
        measured: Callable[[], dict[str, Any]],
    ) -> None:
        """Runs the run's hooks after a step, unless the run has ended.

        Args:
          metrics: of the step.
          state: returns the run's state.
          measured: returns the metrics of that state.
        """
        if not self.active:
            return
        self._measured = measured
        self.step += 1
        try:
            self.active = self.follower.after(self.step, metrics, state)
        except TrainingDivergedError as error:
            self.active = False
            self.error = error


class StopOfAll(StopSignals):
    """The stop request of several runs, asked once after each step, so that all end together."""

    def __init__(self, signals: StopSignals) -> None:
        super().__init__()
        self._signals = signals
        self._asked = False

    @property
    def signal(self) -> Signals:
        """Returns the signal that stopped the runs."""
        return self._signals.signal

    def ask(self, step: int) -> None:
        """Reads the request after ``step`` steps of the program; all processes call it."""
        self._asked = self._signals.asked(step)

    def asked(self, step: int) -> bool:
        """Returns True if the runs have to stop."""
        return self._asked


def fit_all(
    program: SweepProgram, runs: Sequence[RunLoop], stop: StopOfAll | None = None
) -> None:
    """Runs all steps of all runs.

    Args:
      program: the compiled program.
      runs: in the program's order.
      stop: the stop request that the runs' hooks read.
    """
    states = program.begin([run.follower.result.state for run in runs])
    step = 0
    while any(run.active for run in runs):
        rows = [run.batch() for run in runs]
        # The program may have more places than there are runs; they repeat the last run's batch.
        empty = len(program.runs) - len(rows)
        rows += [rows[-1]] * empty
        batch = batch_of(rows, program.mesh)
        if step == 0:
            # The result is not used: the call below finds it in the cache of compiled programs.
            with count_progress("compiling the step"):
                program.lower(states, batch).compile()
        states, metrics = program.step(states, batch, [run.active for run in runs])
        step += 1
        if stop is not None:
            stop.ask(step)
        # Computed for all runs when the first run asks.
        fetched = cache(partial(jax.tree.map, processes.fetch, metrics))
        measured = cache(partial(program.measure, states))
        for index, run in enumerate(runs):
            run.after(
                _OfRun(fetched, index),
                state=partial(program.state_of, states, index),
                measured=partial(_select, measured, index),
            )


def _select(
    values: Callable[[], Sequence[dict[str, Any]]], index: int
) -> dict[str, Any]:
    """Computes ``values`` of all runs and returns those of one."""
    return values()[index]


class _OfRun(Mapping[str, Any]):
    """The metrics of one run, a view of the arrays ``[runs, ...]`` of all runs.

    They are fetched from the devices when a metric is first read.
    """

    def __init__(self, fetched: Callable[[], Mapping[str, Any]], index: int) -> None:
        self._fetched = fetched
        self._index = index

    def __getitem__(self, name: str) -> Any:
        return jax.tree.map(lambda leaf: leaf[self._index], self._fetched()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetched())

    def __len__(self) -> int:
        return len(self._fetched())
