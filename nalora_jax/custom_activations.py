"""Registration of a user's activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nalora_jax.errors import NaloraError
from nalora_jax.method import activations


def register_activation(
    name: str, *, self_gated: bool = True, degree: float = 1.0
) -> Callable[[activations.Selection], activations.Selection]:
    """Returns a decorator that registers a function ``z -> (rho(z), rho'(z))`` as an activation.

    The function is elementwise and uses `jax.numpy`; it is called with float32. phi = z rho, its
    derivative, the homogeneity and the partition follow from it.

    Args:
      name: value of ``hidden_act`` in a config.json.
      self_gated: True if rho is a smooth selection weight, for which a partition has a meaning.
      degree: the single degree of an activation that is not self-gated.

    Raises:
      NaloraError: the name is taken, or the second value is not the derivative of the first.
    """

    def register(gate: activations.Selection) -> activations.Selection:
        if name in (*activations.ALIASES, *activations.BUILT_IN):
            actual = "a built-in activation"
            raise NaloraError(f"activation {name!r}", expected="a name that is free", found=actual)

        def excess(z: Array) -> Array:
            rho, slope = gate(z)
            return jnp.where(rho == 0, 0.0, z * slope / jnp.where(rho == 0, 1.0, rho))

        numeric = jax.jit(excess)

        def excess64(z: float) -> float:
            with jax.ensure_compile_time_eval():
                return float(numeric(jnp.float32(z)))

        if self_gated:
            _require_derivative(name, gate)
            options: dict[str, Any] = {"excess64": excess64}
        else:
            options = {"self_gated": False, "degree": degree}
        activation = activations.activation_of(name, gate, excess, **options)
        activations.ACTIVATIONS.add(name, activation, replace=True)
        activations.partition_of.cache_clear()
        return gate

    return register


def _require_derivative(name: str, gate: activations.Selection) -> None:
    """Raises a NaloraError unless ``gate`` returns rho and its derivative between -6 and 6."""
    with jax.ensure_compile_time_eval():
        z, step = jnp.linspace(-6.0, 6.0, 97), 1e-2
        difference = (gate(z + step)[0] - gate(z - step)[0]) / (2 * step)
        worst = float(jnp.max(jnp.abs(gate(z)[1] - difference)))
    if not worst < 1e-2:
        raise NaloraError(
            f"activation {name!r}",
            expected="a function that returns rho(z) and its derivative",
            found=f"a derivative that is off by {worst:.2g}",
        )
