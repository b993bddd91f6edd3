"""How frozen arrays are stored: as floats, or as something that stands for floats and expands to them.

A quantized kernel is stored as codes and scales (`nalora_jax.nn.quantize`); an implementation may prefer another form
of the same bits. Whoever compiles a program hands its variables to `prepare` once, outside of it; inside, whatever
reads a frozen array calls `expand`, `take_rows` or an operation, and need not know which form it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.registry import operation

# The collection of kernels that stay in the stack of all layers while layers are scanned: there, a kernel's place in
# ``params`` holds the number of the layer, and `LayerStack.layer` of both is the kernel.
STACKS = "stacks"


class Stored(ABC):
    """A frozen array in another form than floats; a pytree, so that it can be scanned, sharded and donated."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the float array."""

    @property
    def ndim(self) -> int:
        """Of the float array."""
        return len(self.shape)

    @abstractmethod
    def expand(self) -> jax.Array:
        """The float array."""


class LayerStack(Stored):
    """Arrays of all layers, ``[layers, ...]``, one of which can be used where it lies."""

    @abstractmethod
    def layer(self, index: jax.Array) -> Stored:
        """That of layer ``index``."""


Kernel = jax.Array | Stored  # a frozen kernel


def expand(array: Kernel) -> jax.Array:
    """A frozen array as floats."""
    return array.expand() if isinstance(array, Stored) else array


@operation
def take_rows(table: Kernel, rows: jax.Array, numerics: Numerics, axis: int = 0) -> jax.Array:
    """``jnp.take`` of a frozen table, as floats."""
    return jnp.take(expand(table), rows, axis=axis)


@operation
def prepare(variables: Mapping[str, Any], numerics: Numerics, *, tables: bool = True) -> dict[str, Any]:
    """A model's variables as its compiled programs take them, sharing the memory of what is given.

    For whoever compiles a program, once, outside of it. Programs take unprepared variables as well.

    Args:
      variables: collections of arrays, ``params`` among them.
      numerics: the model's.
      tables: also those at both ends of the model, which is best unless logits are computed of all of them in a loop.
    """
    return dict(variables)


@operation
def store(x: jax.Array, numerics: Numerics) -> jax.Array | Stored:
    """An array that a program carries from step to step, such as a cache, as it is best stored."""
    return x
