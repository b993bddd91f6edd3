"""Operations, the implementations that replace their plain functions, and the settings that choose.

An operation is a plain JAX function that runs everywhere and defines the result. An implementation
computes the same result differently on one platform, and returns ``NotImplemented`` for arguments
that it does not support::

    @operation
    def double(x: jax.Array, *, numerics: Numerics) -> jax.Array:
        return x + x

    CPU = Implementation("cpu", platform="cpu")

    @CPU.implements(double)
    def double_on_cpu(x: jax.Array, *, numerics: Numerics) -> jax.Array:
        return NotImplemented if x.ndim != 2 else fast_double(x)

Every operation has a parameter `numerics`, which names the platform and the implementation: "auto"
takes the implementations of the platform, "xla" the plain function. Nothing here asks JAX for its
devices, so a program for a TPU can be compiled on a machine without one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import platform as python
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from typing import Self

    from nalora_jax.ops.storage import Kernel

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

AUTO, XLA = "auto", "xla"
IMPLEMENTATIONS: dict[str, Implementation] = {}  # by name
_PLATFORMS: dict[str, PlatformHooks] = {}
# Modules that register implementations and platforms. The package cpu may be deleted.
_REGISTERING = ("ops.accelerators", "layout.sharding", "cpu.register")


# ---------------------------------------------------------------- platforms


@dataclass(frozen=True)
class Platform:
    """The devices that a program is compiled for; they need not exist on this machine."""

    name: str = ""  # "cpu", "gpu" or "tpu"; "": unknown, every operation is its plain function
    kind: str = ""  # product name of the devices, e.g. "NVIDIA H100 80GB HBM3"
    devices: int = 1  # number of devices that share the program
    tensor: int = 1  # number of them that split the channels of every matmul


class PlatformHooks:
    """Facts and preferences of a platform, one subclass each; the defaults hold everywhere."""

    def device_name(self, platform: Platform) -> str:
        """Returns the name of the platform's devices for logs."""
        return platform.kind

    def processor_name(self) -> str:
        """Returns the model of this machine's processor."""
        return python.processor()

    def best_remat(self, d_model: int, numerics: Numerics, *, gated: bool = True) -> str:
        """Returns the cheapest rematerialization policy (`nalora_jax.models.remat.REMAT`).

        Args:
          d_model: width of the residual stream.
          numerics: dtypes and platform.
          gated: True if feed-forward blocks have two wide projections, False if they have one.
        """
        return "full"

    def after_compilation(self) -> None:
        """Runs after a program that will be called many times has been compiled."""

    def preferred(self, numerics: Numerics) -> Numerics:
        """Returns ``numerics`` with the dtypes that are fastest on the platform."""
        return numerics

    def prepare(self, variables: Mapping[str, Any], numerics: Numerics, *, tables: bool) -> dict[str, Any]:
        """Returns a model's variables in the platform's storage form (`storage.prepare`)."""
        return dict(variables)

    def store(self, x: Any) -> Any:
        """Returns an array that a program carries from step to step in the best storage form."""
        return x

    def reads_cache_in_place(self, seq: int, cache: Kernel, numerics: Numerics) -> bool:
        """Returns True if attention of ``seq`` tokens reads a layer's keys from the stack of all layers."""
        return False

    def grouped_result(self, result: str) -> str:
        """Returns the dtype in which `lax.ragged_dot` stores a result that is rounded to ``result``."""
        return "float32"

    def in_stored_layout(self, x: Any) -> Any:
        """Returns an array of one layer in the layout of the stack of all layers, if the compiler would change it."""
        return x

    def joins_expert_factors(self, experts: int, rank: int) -> bool:
        """Returns True if rows are multiplied by the adapters of all experts in one matmul."""
        return False

    def recomputes_expert_probe(self, experts: int, rank: int) -> bool:
        """Returns True if the adapters' output on probed rows is computed a second time."""
        return False


def register_platform(name: str, hooks: PlatformHooks) -> None:
    """Registers the facts of a platform."""
    _PLATFORMS[name] = hooks


# ---------------------------------------------------------------- numerics


@dataclass(frozen=True)
class Numerics:
    """Dtypes, platform and implementation of a forward pass; by default plain JAX in float32."""

    operand: str = "float32"  # of frozen kernels and their inputs
    result: str = "float32"  # of matmul results, and so of the residual stream
    adapter: str = "float32"  # of the adapters' operands; the adapters themselves stay float32
    residual: str = "float32"  # of activations that are saved for the backward pass
    inner: str | None = None  # of arrays between two matmuls of a block; None: ``result``
    platform: Platform = Platform()
    implementation: str = AUTO  # "auto", "xla" or the name of an `Implementation`

    def within(self) -> Self:
        """Returns the numerics of matmuls whose results are operands again after elementwise functions."""
        return self if self.inner is None else replace(self, result=self.inner)

    @property
    def hooks(self) -> PlatformHooks:
        """The platform's facts; the defaults if the plain functions were asked for."""
        if self.implementation == XLA:
            return PlatformHooks()
        return hooks_of(self.platform)


def hooks_of(platform: Platform) -> PlatformHooks:
    """Returns the registered facts of a platform, or the defaults."""
    register_all()
    return _PLATFORMS.get(platform.name, PlatformHooks())


# ---------------------------------------------------------------- operations


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
        numerics = bound.arguments["numerics"]
        for name in _candidates(numerics.implementation, numerics.platform.name):
            if name in self.implementations:
                result = self.implementations[name](*args, **kwargs)
                if result is not NotImplemented:
                    return result
        return self.plain(*args, **kwargs)


operation = Operation  # decorates a function that has a parameter `numerics`


@dataclass(frozen=True)
class Implementation:
    """A named way to compute operations on one platform; creating one registers its name."""

    name: str
    platform: str  # "cpu", "gpu" or "tpu"

    def __post_init__(self) -> None:
        IMPLEMENTATIONS[self.name] = self

    def implements(self, op: Operation[Any, Any]) -> Callable[[F], F]:
        """Registers the decorated function, which has the parameters of the operation.

        Raises:
          TypeError: the parameters differ, so a call would fail on this platform only.
        """

        def register(function: F) -> F:
            expected, actual = (list(inspect.signature(f).parameters) for f in (op.plain, function))
            if actual != expected:
                where = f"{self.name}: {function.__name__}"
                raise TypeError(f"{where} has the parameters {actual}, not {expected}")
            op.implementations[self.name] = function
            return function

        return register


def _candidates(name: str, platform: str) -> list[str]:
    """Returns the implementations to try, in order of registration."""
    if name == XLA:
        return []
    register_all()
    if name != AUTO:
        return [name]
    return [i.name for i in IMPLEMENTATIONS.values() if i.platform == platform]


@functools.cache
def register_all() -> None:
    """Imports the modules that register implementations and platforms, once."""
    for module in (f"nalora_jax.{name}" for name in _REGISTERING):
        if importlib.util.find_spec(module.rpartition(".")[0]) is not None:
            importlib.import_module(module)
