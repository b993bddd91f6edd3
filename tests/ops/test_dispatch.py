"""Implementations of operations: found without being asked for, and chosen by the numerics."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp

from nalora_jax.ops.dispatch import Numerics, operation
from tests.tiny import HAS_CPU


def test_an_implementation_that_does_not_support_the_arguments_falls_through():
    double = operation(lambda x, numerics, times=2: times * x)
    double.implements("mine")(
        lambda x, numerics, times=2: x + x + 1 if times == 2 else NotImplemented
    )
    mine = Numerics(implementation="mine")
    results = [double(jnp.ones(()), of, times) for of in (mine, Numerics()) for times in (2, 3)]
    assert results == [3, 3, 2, 3]


def test_own_implementations_are_found_without_being_asked_for():
    """By whoever runs an operation, such as a script, a notebook or a study."""
    program = (
        "import sys; from nalora_jax.ops.dispatch import Numerics, Platform, native_kind; "
        "assert 'nalora_jax.cpu' not in sys.modules; "
        "native_kind(Numerics(platform=Platform('cpu'))); print(*native_kind.implementations)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert ("cpu" in found.stdout.split()) == HAS_CPU
