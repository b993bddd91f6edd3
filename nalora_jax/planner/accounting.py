"""Resources that a compiled program uses on each device: flops, bytes of memory, collectives.

XLA's `cost_analysis` counts the body of a loop once for any number of iterations, and returns no
result on GPUs. Here every computation is counted as often as it runs; trip counts are read from the
loops' conditions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nalora_jax.models.experts import UNEVEN
from nalora_jax.planner.hlo import (
    COLLECTIVES,
    STARTS,
    Computation,
    Instruction,
    first_count,
    flops_of,
    group_size,
    kernel_name,
    parse_program,
    ring_bytes,
)

BETWEEN = " between slices"  # suffix of the kind of a collective between slices

# "fusion-start" runs overlapped with later instructions, until its "fusion-done".
_FUSIONS = ("fusion", "fusion-start")
# Custom calls that are not kernels: markers of the TPU compiler.
_MARKS = re.compile(
    r'custom_call_target="(AsyncCollective\w+|PrepareAsyncCall\w+|AllocateBuffer)"'
)
# custom calls without memory traffic
_VIEWS = re.compile("AllocateBuffer|ConcatBitcast")
_COUNTERS = ("s32", "s64", "u32")  # dtypes of loop counters
# Instructions that run other computations in sequence.
_BLOCKS = ("while", "conditional", "call")
# Instructions without direct memory traffic.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "iota", "partition-id", "replica-id", "opt-barrier",
    "add-dependency",
)  # fmt: skip
_ELEMENTWISE = frozenset(("convert", "add", "subtract", "multiply", "negate", "select"))


@dataclass(frozen=True)
class Collective:
    """A collective operation from the view of one device."""

    kind: str
    received: float  # bytes that a device receives over the interconnect, per execution
    devices: int  # number of participants; 0: one device of every slice
    times: float  # executions per step
    overlapped: bool  # matmuls are scheduled between its start and its end

    @property
    def between_slices(self) -> bool:
        """True if it uses the data-centre network that connects slices of TPUs."""
        return self.kind.endswith(BETWEEN)

    @property
    def total(self) -> float:
        """Bytes received per step."""
        return self.received * self.times


@dataclass(frozen=True)
class Transfer:
    """A transfer of an array between a device and its host."""

    to_host: bool
    moved: float  # bytes per execution
    times: float  # executions per step
    overlapped: bool  # matmuls are scheduled between its start and its end

    @property
    def total(self) -> float:
        """Bytes per step."""
        return self.moved * self.times


@dataclass(frozen=True)
class Work:
    """Flops of matmuls and bytes of HBM traffic in a step."""

    flops: float
    memory_bytes: float


class Program:
    """A compiled program of one device.

    Args:
      text: ``compiled.as_text()``, scheduled HLO.
    """

    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse_program(text)

    @cached_property
    def times(self) -> dict[str, float]:
        """Executions of each computation in one call of the program.

        Every branch counts as executed, except the gather of all experts that only uneven routing
        requires (`nalora_jax.models.moe`).
        """
        counts = dict.fromkeys(self.computations, 0.0)
        pending = [(self.computations[self.entry], 1.0)]
        while pending:
            computation, times = pending.pop()
            counts[computation.name] += times
            for instruction in computation.instructions.values():
                inside = times
                if instruction.opcode == "while":
                    inside *= _trips(instruction)
                for called in instruction.calls:
                    if instruction.opcode != "conditional" or not _is_uneven(called):
                        pending.append((called, inside))
        return counts

    @cached_property
    def executed(self) -> tuple[tuple[Instruction, float], ...]:
        """All executed instructions, each with the number of its executions."""
        executed: list[tuple[Instruction, float]] = []
        for computation in self.computations.values():
            times = self.times[computation.name]
            if times:
                for instruction in computation.instructions.values():
                    executed.append((instruction, times))
        return tuple(executed)

    @cached_property
    def scheduled(self) -> tuple[tuple[Instruction, float], ...]:
        """The part of `executed` in computations that run in sequence: the entry, bodies of loops,
        branches."""
        fused: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                fused.update(inner.name for inner in _inner(instruction))
        return tuple(
            (i, times) for i, times in self.executed if i.holder.name not in fused
        )

    @cached_property
    def flops(self) -> float:
        """Flops of all matmuls, grouped ones included; for other kernels see `custom_calls`."""
        return sum(times * flops_of(i) for i, times in self.executed)

    @cached_property
    def custom_calls(self) -> dict[str, float]:
        """Executions of each kernel that XLA did not generate, by its name."""
        calls: dict[str, float] = {}
        for instruction, times in self.executed:
            if instruction.opcode == "custom-call" and not _MARKS.search(
                instruction.attributes
            ):
                name = kernel_name(instruction)
                calls[name] = calls.get(name, 0.0) + times
        return calls

    @cached_property
    def memory_bytes(self) -> float:
        """Bytes read from and written to HBM. A slice of a stack counts as the slice."""
        return sum(times * bytes_of(i) for i, times in self.scheduled)

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers between device and host, for offloaded activations, in the order of the
        text."""
        return tuple(
            Transfer(i.to_host, i.host_bytes, times, _is_overlapped([i]))
            for i, times in self.scheduled
            if i.host_bytes
        )

    def work_of(self, scope: str) -> Work:
        """Returns the work of a scope's instructions, and of all instructions of its loops.

        Args:
          scope: a name of `jax.named_scope`.
        """
        name = re.compile(rf'op_name="[^"]*\b{scope}\b')
        inside: set[str] = set()  # computations of the scope's loops
        pending: list[Computation] = []
        for loop, _ in self.executed:
            if loop.opcode == "while" and name.search(loop.attributes):
                pending += loop.calls
        while pending:
            computation = pending.pop()
            if computation.name in inside:
                continue
            inside.add(computation.name)
            for instruction in computation.instructions.values():
                pending += instruction.calls

        def belongs(instruction: Instruction) -> bool:
            return instruction.holder.name in inside or bool(
                name.search(instruction.attributes)
            )

        flops = sum(times * flops_of(i) for i, times in self.executed if belongs(i))
        size = sum(times * bytes_of(i) for i, times in self.scheduled if belongs(i))
        return Work(flops, size)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """All collectives, in the order of the text."""
        collectives: list[Collective] = []
        holders = {i.holder.name: i.holder for i, _ in self.scheduled}
        parts_in = {name: _parts(holder) for name, holder in holders.items()}
        parents: dict[str, str] = {}
        for instruction, _ in self.scheduled:
            if instruction.opcode in _BLOCKS:
                for called in instruction.calls:
                    parents[called.name] = instruction.holder.name
        for name, holder in holders.items():
            # A chain that began before a loop continues in the loop's matmuls.
            begun = parts_in.get(parents.get(name, ""), {})
            for key, parts in parts_in[name].items():
                if not ("chain" in key and key in begun):
                    instruction = parts[0][1]
                    kind = instruction.opcode.removesuffix("-start")
                    devices = group_size(instruction.attributes)
                    overlapped = _is_overlapped([caller for caller, _ in parts])
                    moved = ring_bytes(kind, instruction, devices)
                    collectives.append(
                        Collective(kind, moved, devices, self.times[name], overlapped)
                    )
            collectives += [
                _between(instruction, self.times[name])
                for instruction in holder.instructions.values()
                if instruction.opcode == "send"
                and "megascale" in instruction.attributes
            ]
        return tuple(collectives)


def _is_uneven(branch: Computation) -> bool:
    """Returns True for a branch that even routing does not take."""
    return any(
        f"/{UNEVEN}/" in instruction.attributes
        for instruction in branch.instructions.values()
    )


def _trips(loop: Instruction) -> int:
    """Returns the iterations of a ``while``; 1 if they are unknown before execution."""
    trip_count = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
    if trip_count:
        return int(trip_count.group(1))
    condition = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)[:1]
    pending = [
        computation for computation in loop.calls if computation.name in condition
    ]
    limits: list[int] = []
    while pending:
        for instruction in pending.pop().instructions.values():
            pending += instruction.calls
            if (
                instruction.opcode == "constant"
                and instruction.shapes[0].dtype in _COUNTERS
            ):
                limits += [
                    int(value)
                    for value in re.findall(r"^(-?\d+)\)", instruction.attributes)
                ]
    return max([limit for limit in limits if limit > 0], default=1) - first_count(loop)


def _inner(instruction: Instruction) -> tuple[Computation, ...]:
    """Returns the computations whose instructions are part of this one."""
    if instruction.opcode in _BLOCKS:
        return ()
    return instruction.calls


def _inside(instruction: Instruction) -> Iterator[Instruction]:
    """Yields an instruction and all instructions that are fused into it."""
    yield instruction
    for computation in _inner(instruction):
        for fused in computation.instructions.values():
            yield from _inside(fused)


# ---------------------------------------------------------------- collectives


def _parts(holder: Computation) -> dict[str, list[tuple[Instruction, Instruction]]]:
    """Returns the parts of each collective of a scheduled computation: the scheduled instruction,
    the collective.

    The TPU compiler splits a collective into parts that share its channel and its chain. All
    collectives of `jax.shard_map` share a channel.
    """
    parts: dict[str, list[tuple[Instruction, Instruction]]] = {}
    for caller in holder.instructions.values():
        for instruction in _inside(caller):
            if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                names = re.findall(
                    r'(?:channel_id=|chain_id=")\d+', instruction.attributes
                )
                key = instruction.name
                if names and instruction is not caller:
                    key = " ".join(names)
                parts.setdefault(key, []).append((caller, instruction))
    return parts


def _between(send: Instruction, times: float) -> Collective:
    """Returns a collective of several slices.

    It is a transfer to the host and one from the host with the same name.
    """
    kinds = re.findall(r'megascale_transfer_type="(\w+)"', send.attributes)
    name = re.search(r'transfer_rendezvous="[^"]*"', send.attributes)
    every = list(send.holder.instructions.values())
    receives = [
        i
        for i in every
        if i.opcode == "recv" and name is not None and name[0] in i.attributes
    ]
    end = 0
    for receive in receives:
        for user in receive.users:
            if user.opcode == "recv-done":
                end = max(end, every.index(user))
    during = every[every.index(send) + 1 : end]
    return Collective(
        next(iter(kinds), "transfer").lower().replace("_", "-") + BETWEEN,
        sum(i.shapes[0].size for i in receives),
        0,
        times,
        any(_multiplies(i) for i in during),
    )


def _is_overlapped(callers: list[Instruction]) -> bool:
    """Returns True if matmuls are scheduled between a collective's start and its end."""
    begun = callers[0]
    every = list(callers[0].holder.instructions.values())
    if begun.opcode.endswith("-start"):
        # Starting with libtpu 0.0.50, a SparseCore starts at the update that passes it the operand.
        update = next(
            (user for user in begun.users if user.opcode.endswith("-update")), begun
        )
        callers = [
            update,
            *(user for user in update.users if user.opcode.endswith("-done")),
        ]
    places = [every.index(caller) for caller in callers]
    return any(map(_multiplies, every[min(places) + 1 : max(places)]))


def _multiplies(instruction: Instruction) -> bool:
    """Returns True for a matmul, a kernel, or a fusion with one of them."""
    if instruction.opcode in ("convolution", "dot"):
        return True
    if instruction.opcode == "custom-call":
        return (
            not _MARKS.search(instruction.attributes)
            and "Bitcast" not in instruction.attributes
        )
    for called in _inner(instruction):
        if any(_multiplies(i) for i in called.instructions.values()):
            return True
    return False


# ---------------------------------------------------------------- bytes


def bytes_of(instruction: Instruction) -> float:
    """Returns the HBM traffic of one instruction of a scheduled computation."""
    opcode = instruction.opcode
    if host_bytes := instruction.host_bytes:
        return host_bytes
    if (
        opcode in _FREE
        or opcode.endswith("-done")
        or _VIEWS.search(instruction.attributes)
    ):
        return 0.0
    if opcode in _FUSIONS and instruction.calls:
        inner = instruction.calls[0]
        read = sum(
            min(x.in_hbm, _read(inner, index))
            for index, x in enumerate(instruction.inputs)
        )
        return read + min(instruction.in_hbm, _written_by(inner.root))
    read = sum(
        _count_used(instruction, index) for index in range(len(instruction.inputs))
    )
    if opcode.endswith("-start"):  # its result lists the operand again
        return read + sum(
            shape.size for shape in instruction.shapes[1:2] if shape.space == 0
        )
    if opcode == "dynamic-update-slice":
        return read + instruction.inputs[1].size
    return read + instruction.in_hbm


def _count_used(instruction: Instruction, index: int) -> float:
    """Returns the bytes that an instruction reads of an operand."""
    held = instruction.inputs[index].in_hbm
    shapes = instruction.shapes
    if index == 0 and instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return min(held, shapes[-1].size)
    if index == 0 and instruction.opcode == "slice-start":
        return min(held, shapes[1].size)
    if index == 0 and instruction.opcode == "dynamic-update-slice":
        return 0.0
    return held


def _read(computation: Computation, index: int) -> float:
    """Returns the bytes of its operand that a fusion reads."""
    parameter = computation.parameter(index)
    if parameter is None:
        return math.inf
    return _read_of(parameter)


def _read_of(source: Instruction) -> float:
    total = 0.0
    for user in source.users:
        if user.opcode == "bitcast" and not user.is_root:
            total += _read_of(user)
        elif user.opcode in _ELEMENTWISE and not user.is_root:  # only for used elements
            total += (
                _read_of(user) * source.shapes[0].size / max(user.shapes[0].size, 1.0)
            )
        elif (
            user.opcode in ("dynamic-slice", "slice", "gather")
            and user.inputs[0] is source
        ):
            # The slice may be used only in part, like the array itself: rows of rows.
            if user.is_root:
                total += user.size
            else:
                total += min(user.size, _read_of(user))
        elif user.opcode == "fusion" and user.calls and not _hands_on(user, source):
            inner = user.calls[0]
            for index in (
                i for i, operand in enumerate(user.inputs) if operand is source
            ):
                total += _read(inner, index)
                # If a nested fusion only changes the shape, the reads of its users are counted,
                # too.
                if not user.is_root and inner.root.without_bitcasts is inner.parameter(
                    index
                ):
                    total += _read_of(user)
        elif not _hands_on(user, source):
            return math.inf
    return total


def _hands_on(user: Instruction, source: Instruction) -> bool:
    """Returns True if a fusion returns an operand in place without reading it.

    The operand may be modified.
    """
    updated = user.opcode == "dynamic-update-slice" and user.inputs[0] is source
    unchanged = source.without_bitcasts.opcode == "parameter"
    returned = user.opcode in ("tuple", "bitcast") and user.is_root and unchanged
    return updated or returned or user.is_continued


def _written_by(result: Instruction) -> float:
    """Returns the bytes of a result that a fusion writes: of an updated stack, the update."""
    if result.opcode == "dynamic-update-slice":
        return result.inputs[1].size
    if result.opcode == "bitcast":
        return _written_by(result.inputs[0])
    if result.opcode == "tuple":
        return sum(
            _written_by(output)
            for output in result.inputs
            if output.shapes[0].space == 0
        )
    if result.opcode == "parameter" or result.is_continued:  # returned in place
        return 0.0
    # The gathered array, without the operand, which is returned in place.
    if STARTS in result.attributes:
        return sum(operand.size for operand in result.inputs)
    if result.opcode == "fusion" and result.calls:
        return _written_by(result.calls[0].root)
    return result.size
