"""What an implementation may do around compiled programs; the plain functions choose what is right anywhere."""

from __future__ import annotations

import platform

from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.registry import operation


@operation
def after_compilation(numerics: Numerics) -> None:
    """Called once a program that will run many times has been compiled."""


@operation
def best_remat(d_model: int, numerics: Numerics, gated: bool = True) -> str:
    """The rematerialisation policy that costs least on the numerics' platform: one of `models.remat.REMAT`.

    Args:
      d_model: width of the residual stream.
      numerics: dtypes and platform.
      gated: whether feed-forward blocks have two wide products, or one.
    """
    return "full"


@operation
def device_name(numerics: Numerics) -> str:
    """Returns the product name of the platform's devices."""
    return numerics.platform.kind


@operation
def processor_name(numerics: Numerics) -> str:
    """The model of this machine's processor, as far as Python knows it."""
    return platform.processor()
