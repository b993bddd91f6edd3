"""Operations, the implementations that replace their plain functions, and the settings that choose.

An operation is a plain JAX function that runs everywhere and defines the result. An implementation
computes the same result differently on one platform, and returns ``NotImplemented`` for arguments
that it does not support::

    @operation
    def double(x: jax.Array, *, numerics: Numerics) -> jax.Array:
        return x + x

    @double.implements("cpu")
    def double_on_cpu(x: jax.Array, *, numerics: Numerics) -> jax.Array:
        return NotImplemented if x.ndim != 2 else fast_double(x)

Every operation has a parameter `numerics`, which names the platform and the implementation: "auto"
takes the implementations of the platform in the order of `IMPLEMENTATIONS`, "xla" the plain function.
Nothing here asks JAX for its devices, so a program for a TPU can be compiled on a machine without one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from typing import Self

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

AUTO, XLA = "auto", "xla"
# By platform, in the order of choice: names of implementations.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "gpu": ("cudnn", "triton", "split_outputs"),
    "tpu": ("splash", "split_outputs"),
}
# Modules that register implementations, highest last. The package cpu may be deleted.
_REGISTERING = ("ops.attention_gpu", "ops.attention_tpu", "layout.sharding", "cpu")


@dataclass(frozen=True)
class Platform:
    """The devices that a program is compiled for; they need not exist on this machine."""

    name: str = ""  # "cpu", "gpu" or "tpu"; "": unknown, every operation is its plain function
    kind: str = ""  # product name of the devices, e.g. "NVIDIA H100 80GB HBM3"
    devices: int = 1  # number of devices that share the program
    tensor: int = 1  # number of them that split the channels of every matmul


@dataclass(frozen=True)
class Numerics:
    """Dtypes, platform and implementation of a forward pass; by default plain JAX in float32."""

    operand: str = "float32"  # of frozen kernels and their inputs
    result: str = "float32"  # of matmul results, and so of the residual stream
    adapter: str = "float32"  # of the adapters' operands; the adapters themselves stay float32
    residual: str = "float32"  # of activations that are saved for the backward pass
    inner: str | None = None  # of arrays between two matmuls of a block; None: ``result``
    platform: Platform = Platform()
    implementation: str = AUTO  # "auto", "xla" or one of `IMPLEMENTATIONS`

    def within(self) -> Self:
        """Returns the numerics of matmuls whose results are operands again after elementwise functions."""
        return self if self.inner is None else replace(self, result=self.inner)

    @property
    def facts_of(self) -> str:
        """The platform whose facts hold; "" if the plain functions were asked for."""
        return "" if self.implementation == XLA else self.platform.name


class Operation(Generic[P, R]):
    """A plain function that implementations may replace.

    Attributes:
      plain: the function that defines the result.
      implementations: replacements by the implementation's name.
    """

    def __init__(self, plain: Callable[P, R]) -> None:
        functools.update_wrapper(self, plain)
        self.plain = plain
        self.implementations: dict[str, Callable[P, R]] = {}
        self._signature = inspect.signature(plain)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Returns the result of the first implementation that supports the arguments."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name in _candidates(bound.arguments["numerics"]):
            if name in self.implementations:
                result = self.implementations[name](*args, **kwargs)
                if result is not NotImplemented:
                    return result
        return self.plain(*args, **kwargs)

    def implements(self, name: str) -> Callable[[F], F]:
        """Registers the decorated function, which has the parameters of the operation.

        Raises:
          TypeError: the parameters differ, so a call would fail on this platform only.
        """

        def register(function: F) -> F:
            expected, actual = (list(inspect.signature(f).parameters) for f in (self.plain, function))
            if actual != expected:
                raise TypeError(f"{name}: {function.__name__} has the parameters {actual}, not {expected}")
            self.implementations[name] = function
            return function

        return register


operation = Operation  # decorates a function that has a parameter `numerics`


@dataclass(frozen=True)
class Implementation:
    """An implementation of your own: creating one registers its name, the last choice on its platform."""

    name: str
    platform: str  # "cpu", "gpu" or "tpu"

    def __post_init__(self) -> None:
        register_all()
        if self.name not in IMPLEMENTATIONS[self.platform]:
            IMPLEMENTATIONS[self.platform] = (*IMPLEMENTATIONS[self.platform], self.name)

    def implements(self, op: Operation[Any, Any]) -> Callable[[F], F]:
        """Registers the decorated function, see `Operation.implements`."""
        return op.implements(self.name)


def _candidates(numerics: Numerics) -> tuple[str, ...]:
    """Returns the implementations to try, in order."""
    if numerics.implementation == XLA:
        return ()
    register_all()
    if numerics.implementation != AUTO:
        return (numerics.implementation,)
    return IMPLEMENTATIONS.get(numerics.platform.name, ())


@functools.cache
def register_all() -> None:
    """Imports the modules that register implementations, once."""
    for module in (f"nalora_jax.{name}" for name in _REGISTERING):
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


# ---------------------------------------------------------------- settings of a run


def numerics_for(dtype: str, platform: Platform | str, implementation: str = AUTO) -> Numerics:
    """Returns the numerics that measured fastest for base weights of ``dtype`` on a platform.

    On a CPU only bf16 x bf16 -> float32 reaches XLA's fast matmuls, so activations stay float32
    between matmuls. On TPU and GPU results are rounded to bf16 after float32 accumulation.

    Args:
      dtype: "float32" or "bfloat16".
      platform: a platform, or the name of one with a single device.
      implementation: "auto", "xla", or the name of an implementation for the platform.

    Raises:
      NaloraError: another dtype, or an implementation that is unknown or for another platform.
    """
    if isinstance(platform, str):
        platform = Platform(platform)
    check_implementation(implementation, platform.name)
    if dtype == "float32":
        return preferred(Numerics(platform=platform, implementation=implementation))
    if dtype == "bfloat16":
        result = "float32" if platform.name == "cpu" else "bfloat16"
        return preferred(
            Numerics("bfloat16", result, "bfloat16", "bfloat16", None, platform, implementation)
        )
    raise NaloraError("compute.dtype", expected="'float32' or 'bfloat16'", found=repr(dtype))


@operation
def preferred(numerics: Numerics) -> Numerics:
    """Returns ``numerics`` with the dtypes that are fastest on the platform."""
    return numerics


def check_implementation(name: str, platform: str) -> None:
    """Raises a NaloraError unless ``name`` is "auto", "xla" or an implementation for ``platform``."""
    available = IMPLEMENTATIONS.get(platform, ())
    if name in (AUTO, XLA, *available):
        return
    other = next((of for of, names in IMPLEMENTATIONS.items() if name in names), None)
    raise NaloraError(
        "--compute.implementation",
        expected=f"{', '.join((AUTO, XLA, *available))} (on {platform or 'this platform'})",
        found=f"{name!r}, which is for {other}" if other else repr(name),
        remedy="leave it at auto, which takes the fastest on the platform",
    )
