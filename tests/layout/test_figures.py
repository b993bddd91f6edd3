"""The figures that are read from a compiled program."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.layout.figures import figures, of_compiled


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
    program = SimpleNamespace(memory_analysis=lambda: analysis, as_text=lambda: text, input_shardings=())
    assert of_compiled(program).memory == live


def test_a_damaged_file_of_the_cache_is_written_again(tmp_path):
    mesh = Mesh(jax.devices()[:1], ("data",))
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    step = jax.jit(lambda x: x @ x)
    compiled = figures(step, (x,), cache=tmp_path)
    (file,) = (tmp_path / "plans").iterdir()
    written = file.read_text()
    for damaged in (written[:-30], written.replace('"arguments": 2', '"arguments": 3')):
        assert damaged != written
        file.write_text(damaged)
        assert figures(step, (x,), cache=tmp_path) == compiled
        assert file.read_text() == written
