"""What may stand in for an operation: a function of the same parameters."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.ops.dispatch import Numerics, operation
from tests.tiny import HAS_CPU


def test_an_implementation_with_other_parameters_is_refused_where_it_is_registered(monkeypatch):
    """A call with the parameter that it lacks would fail on its own platform only, which no test here runs on."""

    @operation
    def double(x: jax.Array, numerics: Numerics, *, times: int = 2) -> jax.Array:
        return times * x

    with pytest.raises(TypeError, match=r"mine: narrow has the parameters .*, not .*'times'"):

        @double.implements("mine")
        def narrow(x: jax.Array, numerics: Numerics) -> jax.Array:
            return 2 * x

    @double.implements("mine")
    def whole(x: jax.Array, numerics: Numerics, *, times: int = 2) -> jax.Array:
        return x + x if times == 2 else NotImplemented

    assert double.implementations == {"mine": whole}
    assert float(double(jnp.ones(()), Numerics(), times=3)) == 3.0


def test_own_implementations_are_found_without_being_asked_for():
    """By whoever runs an operation, such as a script, a notebook or a study."""
    program = (
        "import sys; from nalora_jax.ops.dispatch import Numerics, Platform, preferred; "
        "assert 'nalora_jax.cpu' not in sys.modules; "
        "preferred(Numerics(platform=Platform('cpu'))); print(*preferred.implementations)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert ("cpu" in found.stdout.split()) == HAS_CPU
