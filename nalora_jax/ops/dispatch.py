"""Operations, the implementations that replace their plain functions, and the settings that choose.

An operation is a plain JAX function that runs everywhere and defines the result. An implementation
computes the same result differently on one platform, and returns ``NotImplemented`` for arguments
that it does not support::

    @operation
    def double(x: Array, *, numerics: Numerics) -> Array:
        return x + x

    @double.implements("cpu")
    def double_on_cpu(x: Array, *, numerics: Numerics) -> Array:
        return NotImplemented if x.ndim != 2 else fast_double(x)

The `Numerics` among the arguments name the platform and the implementation: "auto" takes the
implementations of the platform in the order of `IMPLEMENTATIONS`, "xla" the plain function.
Nothing here asks JAX for its devices, so a program for a TPU can be compiled on a machine without
one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from typing import Self

P = ParamSpec("P")
R = TypeVar("R")

AUTO_IMPLEMENTATION = "auto"
XLA = "xla"
# By platform, in the order of choice: names of implementations.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "gpu": ("cudnn", "triton", "split_outputs"),
    "tpu": ("splash", "blocks", "split_outputs"),
}
# Modules that register implementations, highest last. The package cpu may be deleted.
_REGISTERING = (
    "ops.attention_gpu",
    "ops.attention_tpu",
    "ops.scaled_tpu",
    "mesh.sharding",
    "cpu",
)


@dataclass(frozen=True)
class Platform:
    """The devices that a program is compiled for; they need not exist on this machine."""

    name: str = (
        ""  # "cpu", "gpu" or "tpu"; "": unknown, every operation is its plain function
    )
    kind: str = ""  # product name of the devices, e.g. "NVIDIA H100 80GB HBM3"
    devices: int = 1  # number of devices that share the program
    tensor: int = 1  # number of them that split the channels of every matmul


@dataclass(frozen=True)
class Numerics:
    """Dtypes, platform and implementation of a forward pass; by default plain JAX in float32."""

    operand: str = "float32"  # of frozen kernels and their inputs
    result: str = "float32"  # of matmul results, and so of the residual stream
    adapter: str = (
        "float32"  # of the adapters' operands; the adapters themselves stay float32
    )
    residual: str = "float32"  # of activations that are saved for the backward pass
    inner: str | None = (
        None  # of arrays between two matmuls of a block; None: ``result``
    )
    platform: Platform = Platform()
    implementation: str = (
        AUTO_IMPLEMENTATION  # "auto", "xla" or one of `IMPLEMENTATIONS`
    )

    def within(self) -> Self:
        """Returns the numerics inside a block, where a matmul's result is the operand of the next
        one after elementwise functions: ``result`` is ``inner``, if that is set."""
        if self.inner is None:
            return self
        return replace(self, result=self.inner)

    @property
    def facts_of(self) -> str:
        """The platform whose facts hold; "" if the plain functions were asked for."""
        if self.implementation == XLA:
            return ""
        return self.platform.name


class Operation(Generic[P, R]):
    """A plain function that implementations may replace."""

    def __init__(self, plain: Callable[P, R]) -> None:
        """Wraps the function that defines the operation's result."""
        functools.update_wrapper(self, plain)
        self.plain = plain  # defines the result
        self.implementations: dict[str, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Returns the result of the first implementation that supports the arguments."""
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Numerics))
        numerics = next(given, Numerics())
        for name in _candidates(numerics):
            if name not in self.implementations:
                continue
            result = self.implementations[name](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.plain(*args, **kwargs)

    def implements(self, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Registers the decorated function, which has the parameters of the operation."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.implementations[name] = function
            return function

        return register


operation = Operation  # decorates a function that has a parameter `numerics`


class Implementation:
    """An implementation of your own, the last choice on its platform: "cpu", "gpu" or "tpu"."""

    def __init__(self, name: str, platform: str) -> None:
        """Adds ``name`` to the implementations of ``platform``, after the library's."""
        register_all()
        self.name = name
        if name not in IMPLEMENTATIONS[platform]:
            IMPLEMENTATIONS[platform] = (*IMPLEMENTATIONS[platform], name)

    def implements(
        self, op: Operation[P, R]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Registers the decorated function, see `Operation.implements`."""
        return op.implements(self.name)


def _candidates(numerics: Numerics) -> tuple[str, ...]:
    """Returns the implementations to try, in order."""
    if numerics.implementation == XLA:
        return ()
    register_all()
    if numerics.implementation != AUTO_IMPLEMENTATION:
        return (numerics.implementation,)
    return IMPLEMENTATIONS.get(numerics.platform.name, ())


@functools.cache
def register_all() -> None:
    """Imports the modules that register implementations, once."""
    for module in (f"nalora_jax.{name}" for name in _REGISTERING):
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


# ---------------------------------------------------------------- settings of a run


def numerics_for(
    dtype: str, platform: Platform | str, implementation: str = AUTO_IMPLEMENTATION
) -> Numerics:
    """Returns the numerics that measured fastest for base weights of ``dtype`` on a platform.

    On a CPU only bf16 x bf16 -> float32 reaches XLA's fast matmuls, so activations stay float32
    between matmuls. On TPU and GPU results are rounded to bf16 after float32 accumulation. A
    platform may be the name of one with a single device.

    Raises:
      NaloraError: another dtype, or an implementation that is unknown or for another platform.
    """
    if isinstance(platform, str):
        platform = Platform(platform)
    check_implementation(implementation, platform.name)
    if dtype not in ("float32", "bfloat16"):
        raise NaloraError(
            "compute.dtype", expected="'float32' or 'bfloat16'", found=repr(dtype)
        )
    if dtype == "float32":
        return Numerics(platform=platform, implementation=implementation)
    result = "float32" if platform.name == "cpu" else "bfloat16"
    numerics = Numerics(dtype, result, dtype, dtype, None, platform, implementation)
    # Native kernels round while they store; XLA's matmuls would need a second pass over the result.
    if not native_kind(numerics):
        return numerics
    return replace(numerics, inner=dtype)


@operation
def native_kind(numerics: Numerics) -> str:
    """Returns the kind of native kernels that compute bf16 matmuls, e.g. "tiles"; "" for XLA."""
    return ""


def check_implementation(name: str, platform: str) -> None:
    """Raises a NaloraError unless ``name`` is "auto", "xla" or an implementation for
    ``platform``."""
    available = IMPLEMENTATIONS.get(platform, ())
    if name in (AUTO_IMPLEMENTATION, XLA, *available):
        return
    other = next((of for of, names in IMPLEMENTATIONS.items() if name in names), None)
    choices = ", ".join((AUTO_IMPLEMENTATION, XLA, *available))
    found = repr(name)
    if other:
        found = f"{name!r}, which is for {other}"
    raise NaloraError(
        "--compute.implementation",
        expected=f"{choices} (on {platform or 'this platform'})",
        found=found,
        remedy="leave it at auto, which takes the fastest on the platform",
    )
