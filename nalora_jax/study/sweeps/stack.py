"""States of runs, padded with zeros to common shapes and stacked on an axis ``[runs]``.

Padding a smaller rank is exact: columns of A and rows of B that are both zero have no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.axes import RUN
from nalora_jax.layout import distributed

Shapes = dict[str, tuple[int, ...]]  # by path


def common_shapes(runs: Sequence[Any]) -> Shapes:
    """Returns the largest size of every axis by path, over trees of equal structure."""
    flat = [trees.flatten(run) for run in runs]
    return {
        path: tuple(map(max, zip(*(tree[path].shape for tree in flat), strict=True))) for path in flat[0]
    }


def stacked_sharding(mesh: Mesh, solo: NamedSharding) -> NamedSharding:
    """Returns the sharding of ``[runs, ...]`` for the sharding of one run's array."""
    return NamedSharding(mesh, P(RUN if RUN in mesh.shape else None, *solo.spec))


def stack(runs: Sequence[Any], shapes: Shapes, places: Any) -> Any:
    """Returns the trees of all runs as arrays ``[runs, ...]``.

    Args:
      runs: trees of arrays, on devices or in host memory; all processes must call it.
      shapes: `common_shapes` of them.
      places: a tree of shardings of ``[runs, ...]``.
    """
    flat = [
        {path: np.asarray(distributed.fetch(leaf)) for path, leaf in trees.flatten(run).items()}
        for run in runs
    ]

    def join(path: str, place: NamedSharding) -> jax.Array:
        stacked = np.stack([_padded(tree[path], shapes[path]) for tree in flat])
        return jax.make_array_from_callback(stacked.shape, place, stacked.__getitem__)

    return trees.map_named(join, places)


def unpadded(tree: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Returns a run's tree without the zeros that `stack` appended."""

    def cut(path: str, leaf: jax.Array) -> jax.Array:
        shape = shapes[path]
        return leaf if leaf.shape == shape else leaf[tuple(map(slice, shape))]

    return trees.map_named(cut, tree)


def take(states: Any, index: jax.Array) -> Any:
    """Returns the state of one run, still padded."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), states)


def batch_of(rows: Sequence[Mapping[str, np.ndarray]], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays ``[runs, accumulate, rows, ...]`` of the host batches of all runs.

    Args:
      rows: by run, the arrays ``[accumulate, rows, ...]`` of `nalora_jax.layout.distributed.process_rows`.
      mesh: the sweep's devices.
    """
    stacked = {name: np.stack([run[name] for run in rows]) for name in rows[0]}
    batch: dict[str, jax.Array] = distributed.make_global_batch(stacked, mesh, rows_axis=2)
    return batch


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape == shape:
        return array
    return np.pad(array, [(0, target - size) for size, target in zip(array.shape, shape, strict=True)])


def shared(runs: Sequence[Any], mesh: Mesh) -> tuple[Any, Any]:
    """Returns the frozen weights of all runs and the axis ``[runs]`` of each array, 0 or None.

    Arrays that all runs share are not copied. Kernels that an initialization lowered differ by run.
    """
    if all(run is runs[0] for run in runs):
        return runs[0], None
    flat = [trees.flatten(run) for run in runs]
    differing = {path for path, leaf in flat[0].items() if any(tree[path] is not leaf for tree in flat)}
    shapes = common_shapes([{path: tree[path] for path in differing} for tree in flat])

    def join(path: str, leaf: jax.Array) -> jax.Array:
        if path not in differing:
            return leaf
        arrays = [jnp.asarray(tree[path]) for tree in flat]
        pads = [[(0, w - s) for s, w in zip(a.shape, shapes[path], strict=True)] for a in arrays]
        stacked = jnp.stack(
            [jnp.pad(a, pad) if any(map(sum, pad)) else a for a, pad in zip(arrays, pads, strict=True)]
        )
        sharding: Any = leaf.sharding
        return jax.device_put(stacked, stacked_sharding(mesh, sharding))

    axes = trees.map_named(lambda path, leaf: 0 if path in differing else None, runs[0])
    return trees.map_named(join, runs[0]), axes
