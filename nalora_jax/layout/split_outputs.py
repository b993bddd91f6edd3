"""Layers with one input whose outputs devices split: one sum over devices in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nalora_jax.method.low_rank import Adapted, Dense, adapted_dense, parallel_dense
from nalora_jax.ops.dispatch import Implementation, Numerics


def split_outputs(x: jax.Array, layers: Sequence[Dense], numerics: Numerics) -> list[Adapted]:
    """Computes `parallel_dense` on a mesh with "tensor"."""
    if numerics.platform.tensor == 1:
        return NotImplemented
    x, inner = _forked(x)
    return [adapted_dense(x, layer._replace(inner=inner), numerics) for layer in layers]


for platform in ("tpu", "gpu"):
    Implementation(f"split_outputs_{platform}", platform).implements(parallel_dense)(split_outputs)


@jax.custom_vjp
def _forked(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x for frozen matmuls, in float32, and for adapters; their gradients are summed separately.

    If devices split outputs, the gradients of the frozen matmuls are partial sums. The compiler adds
    them before it reduces them over devices only without roundings and other summands in between.
    """
    return x.astype(jnp.float32), x


def _joined(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    of_frozen, of_adapters = gradients
    return (of_frozen.astype(of_adapters.dtype) + of_adapters,)


_forked.defvjp(lambda x: (_forked(x), None), _joined)
