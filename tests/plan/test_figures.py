"""The figures that are read from a compiled program."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.plan.figures import of_compiled


@pytest.mark.parametrize(
    ("temporary", "peak", "live"),
    [
        (40e9, 29e9, 29e9),  # a TPU's sum has arrays that are never live together
        (13e9, 30e9, 14e9),  # a GPU allocates the sum
        (13e9, 0, 14e9),  # no peak is stated
    ],
)
def test_a_program_needs_the_smaller_of_sum_and_peak(temporary, peak, live):
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    analysis = SimpleNamespace(
        argument_size_in_bytes=1e9,
        temp_size_in_bytes=temporary,
        peak_memory_in_bytes=peak,
        host_temp_size_in_bytes=0,
    )
    program = SimpleNamespace(memory_analysis=lambda: analysis, as_text=lambda: text)
    assert of_compiled(program).memory == live
