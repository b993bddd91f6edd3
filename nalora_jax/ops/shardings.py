"""Shardings of the arrays within a step, as models, measurements, steps and losses read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Of arrays whose first axis is rows of a batch, or their parts; None on one device.
RowSharding = NamedSharding | None


@dataclass(frozen=True)
class Shardings:
    """The shardings of a step's arrays, all made by `nalora_jax.mesh.sharding.step_shardings`.

    None leaves an array to the compiler. It would shard activations like the weights, and gather
    adapters in every layer.
    """

    # [batch, seq, d_model] between layers, and sums of statistics [shards, ...]. If it splits the
    # tokens of rows, the arrays have their parts (`nalora_jax.ops.split_rows`).
    rows: RowSharding = None
    # The same arrays when tokens are routed to experts: every device routes its own tokens, in
    # evaluation as well, which leaves all else to the compiler.
    routed: RowSharding = None
    # A tree like the adapters, which are gathered once. Models are hashed, and a tree has no hash.
    adapters: Any = field(default=None, hash=False)
    masks: NamedSharding | None = None  # of all blocks, [layers, ..., d_ff]
    # The layouts that the head's kernel takes in turn; the loss reads the last one.
    head: tuple[NamedSharding, ...] = ()


UNSHARDED = Shardings()  # of one device


def mesh_sharding(like: NamedSharding, *axes: Any) -> NamedSharding:
    """Returns the sharding over the mesh of ``like`` whose array axes are split over ``axes``."""
    return NamedSharding(like.mesh, P(*axes))


def ways(mesh: Mesh | AbstractMesh, axes: Iterable[str]) -> int:
    """Returns the number of parts that these axes of a mesh split an array's axis into."""
    return math.prod(mesh.shape[axis] for axis in axes)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in an entry of a `PartitionSpec`."""
    if isinstance(entry, str):
        return (entry,)
    return entry or ()
