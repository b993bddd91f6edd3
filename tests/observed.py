"""Statistics of a module: the gradients of its taps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.common import trees
from nalora_jax.method import statistics
from nalora_jax.method.measurement import CHECKS, GateStatsConfig
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.stacks import gate_blocks
from nalora_jax.ops.reductions import count


def taps_of(module: Any, names: tuple[str, ...] = statistics.STANDARD) -> dict[str, Any]:
    """Returns the taps of a block, or of all blocks of a decoder, with those of its checks."""
    stats, flat = getattr(module, "stats", None) or GateStatsConfig(), {}
    if isinstance(module, MoEFFN):
        stats, blocks = module.options.stats, {"": (module.config.n_experts, module.config.d_ff)}
    elif hasattr(module, "config"):
        blocks = {f"{path}/": shape for path, (shape, _) in gate_blocks(module.config).items()}
    else:
        blocks = {"": (module.d_ff,)}
    shards = (count(stats.sharding),) if count(stats.sharding) > 1 else ()
    for prefix, channels in blocks.items():
        lead, channels = (channels[:1], channels[1:]) if prefix else ((), channels)
        zeros = statistics.taps(names, (*lead, *shards, *channels))
        if stats.checks is not None:
            zeros |= {name: jnp.zeros((*lead, *shards)) for name in CHECKS}
        flat |= {f"{prefix}{name}": zero for name, zero in zeros.items()}
    return trees.unflatten(flat)


def observed(
    module: Any,
    variables: Any,
    *args: Any,
    names: tuple[str, ...] = statistics.STANDARD,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns the output of a call and the statistics of its blocks; the output has no gradient."""

    def run(taps: Any) -> Any:
        return module.apply({**variables, "gate_taps": taps}, *args, **options)

    y, back = jax.vjp(run, taps_of(module, names))
    (stats,) = back(jax.tree.map(jnp.zeros_like, y))
    return y, stats
