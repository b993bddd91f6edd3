"""Operations, and the implementations that may stand in for their plain functions on one platform.

An operation is a plain JAX function: the specification, which runs everywhere. An implementation computes the same in
another way, on the platform that it is for, and returns ``NotImplemented`` for what it does not do::

    @operation
    def double(x: jax.Array, numerics: Numerics) -> jax.Array:
        return x + x

    CPU = Implementation("cpu", platform="cpu")

    @CPU.implements(double)
    def double_on_cpu(x: jax.Array, numerics: Numerics) -> jax.Array:
        return NotImplemented if x.ndim != 2 else fast_double(x)

Which one runs is decided by the numerics that every operation is given (`nalora_jax.ops.numerics`): "auto" takes what
is registered for the numerics' platform, "xla" the plain function, and a name the implementation of that name. Nothing
here asks JAX which devices there are, so that a program for a TPU can be made on a machine without one.

This library's own implementations are imported when the first operation runs, whoever runs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from nalora_jax.errors import NaloraError

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

AUTO, XLA = "auto", "xla"
_REGISTERED: dict[str, Implementation] = {}
_OWN = {"nalora_jax.cpu": "nalora_jax.cpu.register"}  # packages that may be left out, and what registers them


class Operation(Generic[R]):
    """A plain function that implementations may stand in for; made by `operation`.

    Attributes:
      plain: the specification.
      implementations: what stands in for it, by the implementation's name.
    """

    def __init__(self, plain: Callable[..., R]) -> None:
        functools.update_wrapper(self, plain)
        parameters = inspect.signature(plain).parameters
        self.plain = plain
        self.implementations: dict[str, Callable[..., R]] = {}
        self._place = list(parameters).index("numerics")
        self._default = parameters["numerics"].default

    def __call__(self, *args: Any, implementation: str | None = None, **options: Any) -> R:
        """The operation's result.

        Args:
          args: the plain function's.
          implementation: instead of the one that the numerics name.
          options: the plain function's.
        """
        numerics = args[self._place] if len(args) > self._place else options.get("numerics", self._default)
        if implementation is not None:
            numerics = replace(numerics, implementation=implementation)
            if len(args) > self._place:
                args = (*args[: self._place], numerics, *args[self._place + 1 :])
            else:
                options["numerics"] = numerics
        for name in _chosen(numerics.implementation, numerics.platform.name):
            if name in self.implementations:
                result = self.implementations[name](*args, **options)
                if result is not NotImplemented:
                    return result
        return self.plain(*args, **options)


def operation(plain: Callable[..., R]) -> Operation[R]:
    """Makes an operation of a function that has a parameter ``numerics``."""
    return Operation(plain)


@dataclass(frozen=True)
class Implementation:
    """A way of computing operations on one platform, known by its name as soon as it exists."""

    name: str
    platform: str  # "cpu", "gpu" or "tpu"

    def __post_init__(self) -> None:
        _REGISTERED[self.name] = self

    def implements(self, of: Operation[Any]) -> Callable[[F], F]:
        """Registers the decorated function for an operation; it has the operation's parameters.

        Raises:
          TypeError: it has others, so that a call on another platform than this one would fail.
        """

        def register(function: F) -> F:
            expected, found = (list(inspect.signature(one).parameters) for one in (of.plain, function))
            if found != expected:
                raise TypeError(f"{self.name}: {function.__name__} has the parameters {found}, not {expected}")
            of.implementations[self.name] = function
            return function

        return register


def check_implementation(name: str, platform: str) -> None:
    """Raises a NaloraError unless ``name`` is "auto", "xla", or an implementation that runs on ``platform``."""
    _register_own()
    here = [one.name for one in _REGISTERED.values() if one.platform == platform]
    if name not in (AUTO, XLA, *here):
        known = _REGISTERED.get(name)
        raise NaloraError(
            "--compute.implementation",
            expected=f"{', '.join((AUTO, XLA, *here))} (on {platform or 'this platform'})",
            found=f"{name!r}, which is for {known.platform}" if known else repr(name),
            remedy="leave it at auto, which takes what is fastest on the platform",
        )


def _chosen(name: str, platform: str) -> list[str]:
    """The implementations to ask, in their order."""
    if name == XLA:
        return []
    _register_own()
    if name != AUTO:
        return [name]
    return [one.name for one in _REGISTERED.values() if one.platform == platform]


@functools.cache
def _register_own() -> None:
    for package, module in _OWN.items():
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(module)
