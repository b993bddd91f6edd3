"""Where every array lives on the mesh: ordered (path regex, PartitionSpec) rules for every tree of a run.

A spec names the *trailing* axes of a leaf, so one rule serves a kernel ``[in, out]``, its layer stack ``[L, in, out]``
and a stack of experts ``[L, E, in, out]``; leading axes are never split.

    layers/ffn/gate_proj/kernel [L, in, out]   P("fsdp", "tensor")  ->  P(None, "fsdp", "tensor")
    layers/ffn/gate_proj/a      [L, in, r]     P("fsdp", None)      ->  P(None, "fsdp")            in as the kernel's in
    layers/ffn/gate_proj/b      [L, r, out]    P(None, "tensor")    ->  P(None, None, "tensor")    out as its out

An optimizer's moments end in the path of the parameter that they belong to, so the same rules place them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import trees
from nalora_jax.errors import NaloraError

Rules = Sequence[tuple[str, P]]


def _projection_rules() -> tuple[tuple[str, P], ...]:
    """Weights, biases and adapters of every projection, from one table of (name, axis of in, axis of out)."""
    table = (
        ("(q|k|v|gate|up|in)_proj", "fsdp", "tensor"),  # heads and FFN channels leave split over tensor ...
        ("(o|down|out)_proj", "tensor", "fsdp"),  # ... and are summed over it here
        ("router", "fsdp", None),
    )
    rules: list[tuple[str, P]] = []
    for name, inner, outer in table:
        rules += [
            (rf"(^|/){name}/kernel(/codes|/scales)?$", P(inner, outer)),
            (rf"(^|/){name}/a$", P(inner, None)),
            (rf"(^|/){name}/b$", P(None, outer)),
            (rf"(^|/){name}/(bias|magnitude)$", P(outer)),
        ]
    return tuple(rules)


# Frozen weights. No trailing default: a weight that nobody thought of is an error, not a silent replica.
PARAM_RULES: Rules = (
    *_projection_rules(),
    (r"(^|/)embed/embedding$", P("tensor", "fsdp")),
    (r"(^|/)lm_head/kernel$", P("fsdp", "tensor")),
    (r"norm/(scale|bias)$", P()),
)

# Everything that training changes: adapters, optimizer, gate averages (and the gate's masks and statistics), counters.
STATE_RULES: Rules = (
    (r"(^|/)v_(row|col)/", P()),  # factored second moments (Adafactor) are small and no longer shaped like a weight
    *_projection_rules(),
    (r"(^|/)(tokens|probe_tokens)$", P()),
    (r"(^|/)gate(_mask|_stats)?/.*(importance|occupancy|mask|scale|slope|feature|selection|linear)", P("tensor")),
    (r"", P()),
)


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Where each leaf lives: a tree like ``tree`` with a `NamedSharding` per leaf.

    Args:
      tree: arrays or ``ShapeDtypeStruct`` leaves.
      rules: ordered (regex, spec) pairs, searched in the slash-joined path; the first match wins. A spec covers the
        trailing axes of the leaf. An axis that does not divide its dimension is dropped for that dimension only, and
        a leaf with fewer axes than its spec is replicated: a layout is never wrong, only less spread.

    Raises:
      NaloraError: a leaf that no rule matches.
    """
    uncovered = [path for path in trees.flatten(tree) if trees.first_match(rules, path) is None]
    if uncovered:
        raise NaloraError(
            "sharding rules",
            expected="a rule for every array",
            found="none for " + ", ".join(uncovered),
            remedy='add a (regex, PartitionSpec) rule, or the trailing default ("", P()) to replicate what is left',
        )

    def place(path: str, leaf: Any) -> NamedSharding:
        match = trees.first_match(rules, path)
        assert match is not None
        return NamedSharding(mesh, fit_spec(match[1], leaf.shape, mesh))

    return trees.map_named(place, tree)


def fit_spec(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """``spec`` moved to the trailing axes of ``shape``, without the mesh axes that do not divide their dimension.

    Example (mesh 2 x 4 x 1):
      >>> fit_spec(P("fsdp", "tensor"), (30, 576, 1536), mesh)
      PartitionSpec(None, 'fsdp', 'tensor')
      >>> fit_spec(P("tensor", "fsdp"), (50257, 766), mesh)    # 766 is no multiple of 4
      PartitionSpec('tensor',)
    """
    lead = len(shape) - len(spec)
    if lead < 0:
        return P()
    entries = [None] * lead + [_fit_axis(axis, size, mesh) for axis, size in zip(spec, shape[lead:], strict=True)]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _fit_axis(axis: Any, size: int, mesh: Mesh) -> Any:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return axis if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def bytes_per_device(tree: Any) -> dict[jax.Device, int]:
    """Bytes that the arrays of ``tree`` occupy on each of this process's devices."""
    totals: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return totals
