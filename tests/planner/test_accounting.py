"""What is read from scheduled HLO, against programs whose flops, bytes and collectives are
known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.models.experts import UNEVEN
from nalora_jax.planner.accounting import Program
from nalora_jax.planner.figures import figures, measure_compiled

LAYERS, D, ROWS = 5, 64, 32


def written(name):
    return (Path(__file__).parent / "programs" / f"{name}.hlo").read_text()


def scanned(x, stack):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, stack)[0]


def compiled(f, *arguments):
    return Program(jax.jit(f).lower(*arguments).compile().as_text())


def test_products_of_nested_loops_count_as_often_as_they_run():
    def twice(x, stack):
        return jax.lax.scan(lambda x, _: (scanned(x, stack), None), x, None, length=3)[0]

    for function, times in ((scanned, 1), (twice, 3)):
        program = compiled(function, jnp.ones((ROWS, D)), jnp.ones((LAYERS, D, D)))
        assert program.flops == times * LAYERS * 2 * ROWS * D * D
        assert not program.collectives


def test_the_branch_for_uneven_routing_does_not_count():
    def uneven(x, kernel):
        with jax.named_scope(UNEVEN):
            return jnp.sin(x @ kernel @ kernel)

    def f(even, x, kernel):
        return jax.lax.cond(even, lambda x, kernel: jnp.cos(x @ kernel), uneven, x, kernel)

    program = compiled(f, jnp.array(True), jnp.ones((ROWS, D)), jnp.ones((D, D)))
    assert program.flops == 2 * ROWS * D * D


def test_gathers_inside_a_loop_count_every_time():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows, split = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, "x"))
    x = jax.ShapeDtypeStruct((8 * ROWS, D), jnp.float32, sharding=rows)
    stack = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32, sharding=split)
    program = compiled(scanned, x, stack)
    (gather,) = (c for c in program.collectives if c.kind == "all-gather")
    assert (gather.devices, gather.times) == (8, LAYERS)
    assert gather.received == D * D * 4 * 7 / 8
    assert program.flops == LAYERS * 2 * ROWS * D * D


def test_of_what_a_fusion_slices_those_elements_alone_move():
    few, every = 2 * 2 * 4 * 8 + 4 * 4 * 8, 2 * 64 * 8 + 4 * 64 * 8  # read and written
    assert Program(written("sliced")).memory_bytes == few + every
    # So JAX 0.12's compiler for GPUs writes what puts a layer's results into their stack, and takes
    # them out.
    layer, index = 2 * 64 * 8, 4
    assert Program(written("asynchronous")).memory_bytes == pytest.approx(4 * layer, abs=2 * index)


def test_the_parts_of_one_collective_are_one_and_what_runs_between_them_hides_it():
    # The TPU compiler cuts a gather into fusions that share its channel; `%again` merely reuses a
    # computation.
    text = written("tpu_style").replace(
        "%again = f32[8,16]{1,0} fusion(%a, %x, %all-gather.3), kind=kOutput, calls=%step",
        "%c = f32[8,16]{1,0} convolution(%x, %all-gather.3), dim_labels=bf_io->bf",
    )
    gathers = [(c.kind, c.devices, c.received, c.overlapped) for c in Program(text).collectives]
    assert gathers == [("all-gather", 8, 32 * 16 * 2 * 7 / 8, False)] * 2
    product = "%other = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf"
    last = (
        "%async_collective_fusion.2 = f32[8,16]{1,0} fusion(%a, %x, %w), kind=kOutput, calls=%step"
    )
    between = text.replace("  %g = bf16", f"  {product}\n  {last}\n  %g = bf16")
    assert [c.overlapped for c in Program(between).collectives] == [True, False]


def test_a_collective_that_continues_in_a_loop_counts_once():
    """On v5e a gather that begins before the loop of a delta rule is advanced by the loop's
    matmuls."""
    text = written("continued_in_a_loop")
    once = text.replace('{"n":"64"}', '{"n":"1"}')
    assert Program(text).times["body"] == 64
    assert [c.total for c in Program(text).collectives] == [
        c.total for c in Program(once).collectives
    ]


def test_kernels_are_counted_by_name_as_often_as_they_run_and_products_by_group():
    splash = {"splash_mha_fwd_residuals": 33.0, "splash_mha_dkv": 1.0}
    assert Program(written("kernels")).custom_calls == splash
    program = Program(written("grouped"))
    names = ("grouped_matmul", "mha_forward", "cudnn_attention_forward", "cudnn_attention_backward")
    assert program.custom_calls == dict.fromkeys(names, 1.0)
    assert program.flops == 2 * 256 * 64 * 128


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("mesh['a'=256,'b'=1] {'a'}", 256),
        ("mesh['a'=32,'b'=1,'c'=8], device_ids=([8,32]T(1,0)) {'a'}", 32),
        ("mesh['a'=4,'b'=2,'c'=8] {'a','c'}", 32),
        ("[32,8]<=[256]", 8),
        ("[8,32]<=[32,8]T(1,0)", 32),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
    ],
)
def test_groups_of_devices_in_every_form_that_compilers_write(groups, devices):
    text = written("tpu_style").replace("replica_groups=[1,8]<=[8]", f"replica_groups={groups}")
    assert Program(text).collectives[-1].devices == devices


def test_a_collective_between_slices_is_a_transfer_to_the_host_and_back():
    """As the TPU's compiler writes it: what a slice has summed goes to the others through the
    hosts."""
    text = written("between_slices")
    (found,) = [c for c in Program(text).collectives if c.between_slices]
    assert (found.kind, found.received, found.times) == (
        "all-reduce between slices",
        2 * 8 * 128 * 4,
        1.0,
    )
    assert found.overlapped
    idle = text.replace(
        "  %product = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf\n", ""
    )
    assert [c.overlapped for c in Program(idle).collectives if c.between_slices] == [False]


def test_what_goes_to_the_host_s_memory_and_comes_back():
    """As compilers write it for TPUs and GPUs: a layer into the stack behind a product, a copy, a
    layer out of it."""
    program = Program(written("offloaded"))
    layer, array = 8 * 16 * 2, 32 * 4
    found = [(one.to_host, one.moved, one.times, one.overlapped) for one in program.transfers]
    assert sorted(found) == [
        (False, layer, 1, False),
        (True, array, 1, False),
        (True, layer, 4, True),
    ]
    gpu = written("offloaded").replace("dynamic-update-slice-start(", "fusion-start(")
    gpu = gpu.replace("dynamic-slice-start(", "fusion-start(")
    assert Program(gpu).transfers == program.transfers
    # In HBM: each of them once, the product's operands and result, and 9 bytes that the loop
    # compares.
    assert program.memory_bytes == 4 * (layer + 3 * layer + 9) + array + layer


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
    sizes = {"argument": 1e9, "temp": temporary, "host_temp": 0}
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    analysis.peak_memory_in_bytes = peak
    program = SimpleNamespace(
        memory_analysis=lambda: analysis, as_text=lambda: text, input_shardings=()
    )
    assert measure_compiled(program).memory == live


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
