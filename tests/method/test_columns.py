from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.method.optimizer import find_gates, multiply_columns, require_gates


def pair(*shape):
    return {"a": jnp.ones(shape), "b": jnp.ones(shape)}


def test_gates_are_found_by_convention():
    lora = {
        "layers": {"ffn": {"gate_proj": pair(2, 3), "up_proj": pair(2, 3)}, "attn": {"q_proj": pair(2, 3)}},
        "vision": {"layers": {"ffn": {"in_proj": pair(2, 3), "out_proj": pair(2, 3)}}},
        "gate_proj": pair(2, 3),
    }
    assert find_gates(lora) == {
        "gate_proj": "",
        "layers/ffn/gate_proj": "layers/ffn",
        "vision/layers/ffn/in_proj": "vision/layers/ffn",
    }
    assert find_gates({"layers": {"attn": {"q_proj": pair(2, 3)}}}) == {}


def test_gates_that_do_not_exist_are_refused():
    params = {"ffn": {"gate_proj": pair(2, 3)}}
    require_gates(params, {"ffn/gate_proj": "ffn"}, "b")
    with pytest.raises(NaloraError, match="a parameter ffn/gate/b, found ffn/gate_proj/b"):
        require_gates(params, {"ffn/gate": "ffn"}, "b")
    with pytest.raises(NaloraError, match="no leaf named 'lora_B'"):
        require_gates(params, {"ffn/gate_proj": "ffn"}, "lora_B")


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_columns_of_b_are_multiplied_and_nothing_else(lead):
    updates = {"ffn": {"gate_proj": pair(*lead, 4, 5), "up_proj": pair(*lead, 4, 5)}}
    factor = jnp.arange(np.prod((*lead, 5)), dtype=jnp.float32).reshape(*lead, 5)
    scaled = multiply_columns(
        updates, {"ffn": factor}, {"ffn/gate_proj": "ffn"}, argument="gate_factors", leaf="b"
    )
    np.testing.assert_array_equal(
        scaled["ffn"]["gate_proj"]["b"], np.repeat(np.asarray(factor)[..., None, :], 4, -2)
    )
    assert (scaled["ffn"]["gate_proj"]["a"] == 1).all()
    assert (scaled["ffn"]["up_proj"]["b"] == 1).all()


def test_absent_and_misshapen_factors_are_refused():
    updates, gates = {"ffn": {"gate_proj": pair(2, 4, 5)}}, {"ffn/gate_proj": "ffn"}

    def multiply(factors):
        return multiply_columns(updates, factors, gates, argument="gate_factors", leaf="b")

    with pytest.raises(
        NaloraError, match=r"gate_factors=\): expected factors of \['ffn'\], found no such argument"
    ):
        multiply(None)
    with pytest.raises(NaloraError, match=r"found only \['other'\]"):
        multiply({"other": jnp.ones((2, 5))})
    with pytest.raises(
        NaloraError, match=r"gate_factors of ffn/gate_proj/b: expected shape \(2, 5\), found \(5,\)"
    ):
        multiply({"ffn": jnp.ones(5)})
