"""Parsing of collectives in HLO: group sizes, and bytes that reach each device."""

from __future__ import annotations

import math
import re

from nalora_jax.plan.hlo import Computation, Instruction


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
