"""What is read from scheduled HLO, against programs whose flops, bytes and collectives are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.layout.accounting import Program
from nalora_jax.models.experts import UNEVEN

LAYERS, D, ROWS = 5, 64, 32


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def scanned(x, stack):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, stack)[0]


def compiled(f, *arguments):
    return Program(jax.jit(f).lower(*arguments).compile().as_text())


def test_a_loop_s_products_count_as_often_as_they_run():
    program = compiled(scanned, jnp.ones((ROWS, D)), jnp.ones((LAYERS, D, D)))
    assert program.flops == LAYERS * 2 * ROWS * D * D
    assert not program.collectives


def test_nested_loops_multiply():
    def twice(x, stack):
        return jax.lax.scan(lambda x, _: (scanned(x, stack), None), x, None, length=3)[0]

    assert (
        compiled(twice, jnp.ones((ROWS, D)), jnp.ones((LAYERS, D, D))).flops
        == 3 * LAYERS * 2 * ROWS * D * D
    )


def test_the_branch_for_uneven_routing_does_not_count():
    def uneven(x, kernel):
        with jax.named_scope(UNEVEN):
            return jnp.sin(x @ kernel @ kernel)

    def f(even, x, kernel):
        return jax.lax.cond(even, lambda x, kernel: jnp.cos(x @ kernel), uneven, x, kernel)

    program = compiled(f, jnp.array(True), jnp.ones((ROWS, D)), jnp.ones((D, D)))
    assert program.flops == 2 * ROWS * D * D


def test_gathers_inside_a_loop_count_every_time(mesh):
    rows, split = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, "x"))
    x = jax.ShapeDtypeStruct((8 * ROWS, D), jnp.float32, sharding=rows)
    stack = jax.ShapeDtypeStruct((LAYERS, D, D), jnp.float32, sharding=split)
    program = compiled(scanned, x, stack)
    (gather,) = (c for c in program.collectives if c.kind == "all-gather")
    assert (gather.devices, gather.times) == (8, LAYERS)
    assert gather.received == D * D * 4 * 7 / 8
    assert program.flops == LAYERS * 2 * ROWS * D * D


def test_a_slice_of_a_stack_is_read_as_a_slice():
    # 40 layers of 64 kB: a reader that takes each slice for the whole stack would count 40 times as much.
    stack = jnp.ones((40, 128, 128))
    program = compiled(scanned, jnp.ones((8, 128)), stack)
    assert stack.nbytes < program.memory_bytes < 4 * stack.nbytes


SLICED = """HloModule step

%few (p: bf16[64,8], q: bf16[64,8]) -> f32[4,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %q = bf16[64,8]{1,0} parameter(1)
  %both = bf16[64,8]{1,0} add(%p, %q)
  %wide = f32[64,8]{1,0} convert(%both)
  ROOT %slice = f32[4,8]{1,0} slice(%wide), slice={[0:4], [0:8]}
}

%all (r: bf16[64,8]) -> f32[64,8] {
  %r = bf16[64,8]{1,0} parameter(0)
  ROOT %wide.1 = f32[64,8]{1,0} convert(%r)
}

ENTRY %main (x: bf16[64,8], y: bf16[64,8]) -> (f32[4,8], f32[64,8]) {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = bf16[64,8]{1,0} parameter(1)
  %first = f32[4,8]{1,0} fusion(%x, %y), kind=kLoop, calls=%few
  %second = f32[64,8]{1,0} fusion(%x), kind=kLoop, calls=%all
  ROOT %t = (f32[4,8]{1,0}, f32[64,8]{1,0}) tuple(%first, %second)
}
"""


def test_what_a_fusion_slices_it_computes_of_those_elements_alone():
    few, every = 2 * 2 * 4 * 8 + 4 * 4 * 8, 2 * 64 * 8 + 4 * 64 * 8  # read and written
    assert Program(SLICED).memory_bytes == few + every


ASYNCHRONOUS = """HloModule step

%put (stack: bf16[40,64,8], i: s32[], one: bf16[64,8]) -> bf16[40,64,8] {
  %stack = bf16[40,64,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = bf16[64,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = bf16[1,64,8]{2,1,0} bitcast(%one)
  ROOT %new = bf16[40,64,8]{2,1,0} dynamic-update-slice(%stack, %row, %i, %zero, %zero)
}

%take (stack.1: bf16[40,64,8], i.1: s32[]) -> bf16[1,64,8] {
  %stack.1 = bf16[40,64,8]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %old = bf16[1,64,8]{2,1,0} dynamic-slice(%stack.1, %i.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,8}
}

ENTRY %main (a: bf16[40,64,8], b: s32[], c: bf16[64,8]) -> bf16[1,64,8] {
  %a = bf16[40,64,8]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = bf16[64,8]{1,0} parameter(2)
  %start = ((bf16[40,64,8]{2,1,0}, s32[], bf16[64,8]{1,0}), bf16[40,64,8]{2,1,0}, u32[]) fusion-start(%a, %b, %c), kind=kLoop, calls=%put
  %done = bf16[40,64,8]{2,1,0} fusion-done(%start)
  %start.1 = ((bf16[40,64,8]{2,1,0}, s32[]), bf16[1,64,8]{2,1,0}, u32[]) fusion-start(%done, %b), kind=kLoop, calls=%take
  ROOT %done.1 = bf16[1,64,8]{2,1,0} fusion-done(%start.1)
}
"""  # noqa: E501


def test_a_fusion_that_runs_beside_others_moves_a_slice_of_the_stack_that_it_names():
    """So JAX 0.12's compiler for GPUs writes what puts a layer's results into their stack, and takes them out."""
    layer, index = 2 * 64 * 8, 4
    assert Program(ASYNCHRONOUS).memory_bytes == pytest.approx(4 * layer, abs=2 * index)


TPU_STYLE = """\
HloModule step, is_scheduled=true

%start (p.1: bf16[4,16]) -> (bf16[4,16], bf16[32,16]) {
  %p.1 = bf16[4,16]{1,0} parameter(0)
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=8,'b'=1] {'a'}
  ROOT %t = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) tuple(%p.1, %all-gather.1)
}

%step (p.2: bf16[4,16], p.3: bf16[8,32], p.4: bf16[32,16]) -> f32[8,16] {
  %p.2 = bf16[4,16]{1,0} parameter(0)
  %p.3 = bf16[8,32]{1,0} parameter(1)
  %p.4 = bf16[32,16]{1,0} parameter(2)
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=8,'b'=1] {'a'}
  ROOT %convolution = f32[8,16]{1,0} convolution(%p.3, %p.4), dim_labels=bf_io->bf
}

%done (p.5: bf16[32,16]) -> bf16[32,16] {
  %p.5 = bf16[32,16]{1,0} parameter(0)
  ROOT %b = bf16[32,16]{1,0} bitcast(%p.5)
}

ENTRY %main (a: bf16[4,16], x: bf16[8,32], w: bf16[32,16]) -> f32[8,16] {
  %a = bf16[4,16]{1,0} parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %w = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %async-collective-start = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %async_collective_fusion = f32[8,16]{1,0} fusion(%a, %x, %w), kind=kOutput, calls=%step
  %g = bf16[32,16]{1,0} get-tuple-element(%async-collective-start), index=1
  %async-collective-done = bf16[32,16]{1,0} fusion(%g), kind=kCustom, calls=%done
  %all-gather.3 = bf16[32,16]{1,0} all-gather(%a), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %again = f32[8,16]{1,0} fusion(%a, %x, %all-gather.3), kind=kOutput, calls=%step
}
"""


def test_the_parts_of_one_collective_are_one_and_what_runs_between_them_hides_it():
    # The TPU compiler cuts a gather into fusions that share its channel; `%again` merely reuses a computation.
    text = TPU_STYLE.replace(
        "%again = f32[8,16]{1,0} fusion(%a, %x, %all-gather.3), kind=kOutput, calls=%step",
        "%c = f32[8,16]{1,0} convolution(%x, %all-gather.3), dim_labels=bf_io->bf",
    )
    gathers = Program(text).collectives
    assert [(c.kind, c.devices, c.received) for c in gathers] == [
        ("all-gather", 8, 32 * 16 * 2 * 7 / 8)
    ] * 2
    assert [c.overlapped for c in gathers] == [False, False]
    product = "%other = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf"
    last = "%async_collective_fusion.2 = f32[8,16]{1,0} fusion(%a, %x, %w), kind=kOutput, calls=%step"
    between = text.replace("  %g = bf16", f"  {product}\n  {last}\n  %g = bf16")
    assert [c.overlapped for c in Program(between).collectives] == [True, False]


def test_a_collective_that_continues_in_a_loop_counts_once():
    """On v5e a gather that begins before the loop of a delta rule is advanced by the loop's matmuls."""
    chained = TPU_STYLE.replace("channel_id=7", 'channel_id=7, frontend_attributes={chain_id="1"}')
    chained = chained.replace("fusion(%a, %x, %all-gather.3), kind=kOutput, calls=%step", "negate(%again0)")
    state = "(s32[], f32[8,16], bf16[4,16], bf16[8,32], bf16[32,16])"
    loop = f"""\
%condition (c: {state}) -> pred[] {{
  %c = {state} parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(64)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}}

%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %piece = bf16[4,16]{{1,0}} get-tuple-element(%s), index=2
  %rows = bf16[8,32]{{1,0}} get-tuple-element(%s), index=3
  %kernel = bf16[32,16]{{1,0}} get-tuple-element(%s), index=4
  %advanced = f32[8,16]{{1,0}} fusion(%piece, %rows, %kernel), kind=kOutput, calls=%step
  ROOT %next = {state} tuple(%i, %advanced, %piece, %rows, %kernel)
}}

ENTRY"""
    run = (
        f"  %zero = s32[] constant(0)\n  %again0 = f32[8,16]{{1,0}} copy(%async_collective_fusion)\n"
        f"  %begin = {state} tuple(%zero, %again0, %a, %x, %w)\n"
        f"  %loop = {state} while(%begin), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"64"}}\n  %g ='
    )
    text = chained.replace("ENTRY", loop).replace("  %g =", run)
    assert Program(text).times["body"] == 64
    assert [c.total for c in Program(text).collectives] == [c.total for c in Program(chained).collectives]
    own = text.replace("calls=%step", "calls=%own", 1).replace("%start (", "OWN\n\n%start (")
    apart = chained.split("%step (")[1].split("\n}\n")[0].replace('chain_id="1"', 'chain_id="2"')
    own = own.replace("OWN", "%own (" + apart + "\n}")
    several = sum(c.times for c in Program(own).collectives)
    assert several == sum(c.times for c in Program(text).collectives) + 64


KERNELS = """\
HloModule step, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %splash_mha_fwd_residuals.7 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%i, %splash_mha_fwd_residuals.7)
}

%condition (q: (s32[], f32[8,128])) -> pred[] {
  %q = (s32[], f32[8,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %last = s32[] constant(32)
  ROOT %less = pred[] compare(%j, %last), direction=LT
}

ENTRY %main (a: (s32[], f32[8,128])) -> f32[8,128] {
  %a = (s32[], f32[8,128]{1,0}) parameter(0)
  %buffer.1 = f32[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %loop = (s32[], f32[8,128]{1,0}) while(%a), condition=%condition, body=%body
  %y = f32[8,128]{1,0} get-tuple-element(%loop), index=1
  %splash_mha_fwd_residuals.8 = f32[8,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %splash_mha_dkv.2 = f32[8,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_are_counted_by_name_as_often_as_they_run():
    assert Program(KERNELS).custom_calls == {"splash_mha_fwd_residuals": 33.0, "splash_mha_dkv": 1.0}


GROUPED = """HloModule step

ENTRY %main (x: bf16[256,64], w: bf16[4,64,128], s: s32[5]) -> bf16[256,128] {
  %x = bf16[256,64]{1,0} parameter(0)
  %w = bf16[4,64,128]{2,1,0} parameter(1)
  %s = s32[5]{0} parameter(2)
  %pallas_call.3 = bf16[256,128]{1,0} custom-call(%x, %w, %s), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/while/body/grouped_matmul/pallas_call"}
  %pallas_call.4 = bf16[256,128]{1,0} custom-call(%pallas_call.3), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/jit(mha)/mha_forward/pallas_call"}
  %fwd.5 = (bf16[256,128]{1,0}, u8[0]{0}) custom-call(%pallas_call.4), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", metadata={op_name="jit(step)/jvp()/dot_product_attention_fwd"}
  %get-tuple-element.6 = bf16[256,128]{1,0} get-tuple-element(%fwd.5), index=0
  %bwd.7 = (bf16[256,128]{1,0}, u8[0]{0}) custom-call(%get-tuple-element.6), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
  ROOT %get-tuple-element.8 = bf16[256,128]{1,0} get-tuple-element(%bwd.7), index=0
}
"""  # noqa: E501


def test_products_by_group_are_counted_and_kernels_of_gpus_have_their_own_names():
    program = Program(GROUPED)
    attention = ("mha_forward", "cudnn_attention_forward", "cudnn_attention_backward")
    assert program.custom_calls == {"grouped_matmul": 1.0, **dict.fromkeys(attention, 1.0)}
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
    text = TPU_STYLE.replace("replica_groups=[1,8]<=[8]", f"replica_groups={groups}")
    assert Program(text).collectives[-1].devices == devices


def test_a_collective_between_slices_is_a_transfer_to_the_host_and_back():
    """As the TPU's compiler writes it: what a slice has summed goes to the others through the hosts."""
    named = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    named += '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    lines = f"""\
  %after = token[] after-all()
  %send.1 = (f32[2,8,128]{{2,1,0}}, u32[], token[]) send(%small, %after), channel_id=2, {named}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, {named}
  %recv.1 = (f32[2,8,128]{{2,1,0}}, u32[], token[]) recv(%after), channel_id=3, {named}
  %product = f32[8,16]{{1,0}} convolution(%x, %w), dim_labels=bf_io->bf
  %recv-done.1 = (f32[2,8,128]{{2,1,0}}, token[]) recv-done(%recv.1), channel_id=3, {named}
"""
    text = TPU_STYLE.replace(
        "  %async-collective-start =",
        f"  %small = f32[2,8,128]{{2,1,0}} parameter(3)\n{lines}  %async-collective-start =",
    )
    (found,) = [c for c in Program(text).collectives if c.between_slices]
    assert (found.kind, found.received, found.times) == ("all-reduce between slices", 2 * 8 * 128 * 4, 1.0)
    assert found.overlapped
    idle = text.replace("  %product = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf\n", "")
    assert [c.overlapped for c in Program(idle).collectives if c.between_slices] == [False]


OFFLOADED = """\
HloModule step, is_scheduled=true

%body (p: (s32[], bf16[4,8,16], bf16[8,16])) -> (s32[], bf16[4,8,16], bf16[8,16]) {
  %p = (s32[], bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)} get-tuple-element(%p), index=1
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=2
  %one = bf16[1,8,16]{2,1,0} bitcast(%x)
  %zero = s32[] constant(0)
  %put = ((bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,16]{2,1,0}, s32[], s32[], s32[]), \
bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%stack, %one, %i, %zero, %zero)
  %y = bf16[8,16]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  %full = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%put)
  ROOT %t = (s32[], bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,16]{1,0}) tuple(%i, %full, %y)
}

%condition (q: (s32[], bf16[4,8,16], bf16[8,16])) -> pred[] {
  %q = (s32[], bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %last = s32[] constant(4)
  ROOT %less = pred[] compare(%j, %last), direction=LT
}

ENTRY %main (a: (s32[], bf16[4,8,16], bf16[8,16]), x: f32[32]) -> bf16[1,8,16] {
  %a = (s32[], bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,16]{1,0}) parameter(0)
  %x = f32[32]{0} parameter(1)
  %away = (f32[32]{0:S(5)}, f32[32]{0}, u32[]{:S(2)}) copy-start(%x)
  %gone = f32[32]{0:S(5)} copy-done(%away)
  %loop = (s32[], bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,16]{1,0}) while(%a), condition=%condition, body=%body
  %all = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)} get-tuple-element(%loop), index=1
  %k = s32[] constant(3)
  %take = ((bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(5)}, s32[], s32[], s32[]), bf16[1,8,16]{2,1,0}, u32[]{:S(2)}) \
dynamic-slice-start(%all, %k, %k, %k), dynamic_slice_sizes={1,8,16}
  ROOT %back = bf16[1,8,16]{2,1,0} dynamic-slice-done(%take)
}
"""


def test_what_goes_to_the_host_s_memory_and_comes_back():
    """As compilers write it for TPUs and GPUs: a layer into the stack behind a product, a copy, a layer out of it."""
    program = Program(OFFLOADED)
    layer, array = 8 * 16 * 2, 32 * 4
    found = [(one.to_host, one.moved, one.times, one.overlapped) for one in program.transfers]
    assert sorted(found) == [(False, layer, 1, False), (True, array, 1, False), (True, layer, 4, True)]
    gpu = OFFLOADED.replace("dynamic-update-slice-start(", "fusion-start(").replace(
        "dynamic-slice-start(", "fusion-start("
    )
    assert Program(gpu).transfers == program.transfers
    # In HBM: each of them once, the product's operands and result, and 9 bytes that the loop compares.
    assert program.memory_bytes == 4 * (layer + 3 * layer + 9) + array + layer


# ---------------------------------------------------------------- scopes
