"""Refusals of the method's room that need a single call: the call, and a part of its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.method import activations
from nalora_jax.method.rules import Mechanism
from nalora_jax.method.transform import Mechanisms, make_mechanisms, nalora


class OnInput(Mechanism):
    """A rule that acts at a place that does not exist."""

    name = "on_input"
    places = ("input",)  # type: ignore[assignment]


def partition_of_a_constant_selection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(activations.ACTIVATIONS, "_values", {})
    register = activations.register_activation("constant")
    register(lambda z: (jnp.ones_like(z), jnp.zeros_like(z)))
    activations.partition("constant")


def start_without_gates(_: pytest.MonkeyPatch) -> None:
    mechanisms = make_mechanisms(("hard",), activation="silu")
    nalora(optax.sgd(1.0), mechanisms).init({"up": {"b": jnp.zeros((2, 3))}})


# Called with a monkeypatch.
REFUSALS: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], str]] = {
    "a self-gated activation that never falls": (
        partition_of_a_constant_selection,
        "'constant': expected phi to fall somewhere below 0.*register it with self_gated=False",
    ),
    "a rule at an unknown place": (
        lambda _: Mechanisms((("on_input", OnInput()),), "silu"),
        r"mechanism on_input: expected places of .*update_b.*found \['input'\]",
    ),
    "an optimizer of adapters without taps": (
        start_without_gates,
        "optimizer.init: expected adapters with taps below the name of a gate.*found up/b",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(NaloraError, match=message):
        call(monkeypatch)
