"""What a forward pass computes in: dtypes, the platform that it is compiled for, and the implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from nalora_jax.distributed.devices import kind_of, platform_name
from nalora_jax.errors import NaloraError
from nalora_jax.ops.registry import AUTO, check_implementation, operation

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Platform:
    """Where a program will run: the mesh's devices, which need not be this machine's."""

    name: str = ""  # "cpu", "gpu", "tpu"; "" is unknown, where every operation is its plain function
    kind: str = ""  # as the devices name themselves, e.g. "NVIDIA H100 80GB HBM3"
    devices: int = 1  # that share the program


def platform_of(mesh: Mesh | None = None) -> Platform:
    """Returns the platform of a mesh, by default of all devices of the run."""
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    return Platform(platform_name(devices[0]), kind_of(devices[0]), len(devices))


@dataclass(frozen=True)
class Numerics:
    """Dtypes, platform and implementation of one forward pass; the defaults are plain JAX in float32."""

    operand: str = "float32"  # what frozen kernels and their inputs are rounded to
    result: str = "float32"  # what products, and with them the residual stream, are rounded to
    adapter: str = "float32"  # what the adapters' operands are rounded to; masters stay float32
    residual: str = "float32"  # what activations are rounded to where they are saved for the backward pass
    inner: str | None = None  # what arrays between two products of a block are rounded to; None: as ``result``
    platform: Platform = Platform()
    implementation: str = AUTO  # see `nalora_jax.ops.registry`

    def within(self) -> Self:
        """Those of products whose results only meet elementwise functions before they are operands again."""
        return self if self.inner is None else replace(self, result=self.inner)


def numerics_for(dtype: str, platform: Platform | str | None = None, implementation: str = AUTO) -> Numerics:
    """The numerics that were measured to be best for base weights of ``dtype`` on a platform.

    On a CPU only bf16 x bf16 -> float32 reaches XLA's fast products, in both passes, so that activations stay float32
    between products; on TPU and GPU results are rounded to bf16, accumulated in float32.

    Args:
      dtype: "float32" or "bfloat16".
      platform: from `platform_of`, or the name of one with a single device; None is this process's.
      implementation: "auto", "xla", or the name of one that runs there.

    Raises:
      NaloraError: another dtype, or an implementation that is unknown or for another platform.
    """
    platform = platform_of() if platform is None else Platform(platform) if isinstance(platform, str) else platform
    check_implementation(implementation, platform.name)
    if dtype == "float32":
        chosen = Numerics(platform=platform, implementation=implementation)
    elif dtype == "bfloat16":
        result = "float32" if platform.name == "cpu" else "bfloat16"
        chosen = Numerics("bfloat16", result, "bfloat16", "bfloat16", None, platform, implementation)
    else:
        raise NaloraError("compute.dtype", expected="'float32' or 'bfloat16'", found=repr(dtype))
    return refined(chosen)


@operation
def refined(numerics: Numerics) -> Numerics:
    """The numerics as an implementation prefers them."""
    return numerics
