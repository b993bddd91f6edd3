"""Registers the activations of released models, from the formulas of `nalora_jax.ops.activation_formulas`."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from nalora_jax.method.activations import ACTIVATIONS, Activation, activation_of
from nalora_jax.ops import activation_formulas as formulas


@functools.lru_cache(maxsize=16)
def clamped_swish(slope: float, limit: float) -> Activation:
    """Returns ``y sigmoid(slope y)`` with ``y = min(z, limit)``, the gate of gpt-oss.

    Its name, e.g. "clamped_swish(1.702,7.0)", contains both numbers; they are above 0.
    """
    return activation_of(
        f"clamped_swish({slope!r},{limit!r})",
        formulas.clamped_swish(slope, limit),
        formulas.clamped_swish_excess(slope, limit),
        flat_above=limit,
        excess64=formulas.clamped_swish_excess64(slope, limit),
        variant=clamped_swish,
    )


for _activation in (
    activation_of(
        "silu", formulas.silu, formulas.silu_excess, excess64=formulas.silu_excess64, logistic=(1.0, 0.0)
    ),
    activation_of("gelu", formulas.gelu, formulas.gelu_excess, excess64=formulas.gelu_excess64),
    activation_of(
        "gelu_tanh",
        formulas.gelu_tanh,
        formulas.gelu_tanh_excess,
        precise=formulas.gelu_tanh_precise,
        excess64=formulas.gelu_tanh_excess64,
        logistic=(formulas.TANH_SLOPE, formulas.TANH_CUBIC),
    ),
    activation_of(
        "quick_gelu",
        formulas.quick_gelu,
        formulas.quick_gelu_excess,
        excess64=formulas.quick_gelu_excess64,
        logistic=(formulas.QUICK_SLOPE, 0.0),
    ),
    activation_of("mish", formulas.mish, formulas.mish_excess, excess64=formulas.mish_excess64),
    activation_of("relu", formulas.relu, jnp.zeros_like, self_gated=False),
    activation_of("relu2", formulas.relu2, formulas.relu2_excess, self_gated=False, degree=2.0),
    activation_of("identity", formulas.identity, jnp.zeros_like, self_gated=False),
):
    ACTIVATIONS.add(_activation.name, _activation)
ACTIVATIONS.add("clamped_swish", clamped_swish(formulas.QUICK_SLOPE, 7.0))  # gpt-oss's numbers
