"""Collectives in HLO: group sizes, and bytes that reach each device."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nalora_jax.layout.hlo import Computation, Instruction

BETWEEN = " between slices"  # suffix of the kind of a collective between slices


@dataclass(frozen=True)
class Collective:
    """A collective operation from the view of one device."""

    kind: str
    received: float  # bytes that a device receives over the interconnect, per execution
    devices: int  # number of participants; 0: one device of every slice
    times: float  # executions per step
    overlapped: bool  # matmuls are scheduled between its start and its end
    in_loop: str  # the computation that contains it
    source: str  # its origin in the model (op_name)

    @property
    def between_slices(self) -> bool:
        """True if it uses the data-centre network that connects slices of TPUs."""
        return self.kind.endswith(BETWEEN)

    @property
    def total(self) -> float:
        """Bytes received per step."""
        return self.received * self.times


def received(kind: str, instruction: Instruction, computation: Computation, devices: int) -> float:
    """Returns the bytes that reach a device in a ring.

    For large arrays this is the minimum over all algorithms.
    """
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :] if kind != "collective-permute" else shapes[1:2]
    size = sum(shape.size for shape in shapes)
    share = (devices - 1) / devices if devices else 1.0
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "reduce-scatter":
        return size * (devices - 1)
    if kind.startswith("collective"):
        return size
    return size * share


def group_size(attributes: str) -> int:
    """Returns the devices in one group of a collective, from any of HLO's notations for groups."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[[^{]*)? \{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if not listed:
        return 1
    return len(listed.group(1).split(","))
