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

from nalora_jax.layout.hlo import (
    COLLECTIVES,
    STARTS,
    Computation,
    Instruction,
    changed,
    first_count,
    flops_of,
    group_size,
    is_between_slices,
    is_continued,
    kernel_name,
    parse_program,
    received,
    used,
    without_bitcasts,
)
from nalora_jax.models.experts import UNEVEN

BETWEEN = " between slices"  # suffix of the kind of a collective between slices

# "fusion-start" runs overlapped with later instructions, until its "fusion-done".
_FUSIONS = ("fusion", "fusion-start")
# Custom calls that are not kernels: markers of the TPU compiler.
_MARKS = re.compile(r'custom_call_target="(AsyncCollective\w+|PrepareAsyncCall\w+|AllocateBuffer)"')
_COUNTERS = ("s32", "s64", "u32")  # dtypes of loop counters
# Instructions that run other computations in sequence.
_BLOCKS = ("while", "conditional", "call")
# Instructions without direct memory traffic.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "iota",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
    )
)


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

        def visit(name: str, times: float) -> None:
            counts[name] += times
            for instruction in self.computations[name].instructions.values():
                trips = 1
                if instruction.opcode == "while":
                    trips = self.trips(instruction, self.computations[name])
                branches = instruction.opcode == "conditional"
                for called in instruction.calls:
                    if called in self.computations and not (branches and self._is_uneven(called)):
                        visit(called, times * trips)

        visit(self.entry, 1.0)
        return counts

    def _is_uneven(self, branch: str) -> bool:
        """Returns True for a branch that even routing does not take."""
        instructions = self.computations[branch].instructions.values()
        return any(f"/{UNEVEN}/" in instruction.attributes for instruction in instructions)

    def trips(self, loop: Instruction, holder: Computation) -> int:
        """Returns the iterations of a ``while``; 1 if they are unknown before execution."""
        trip_count = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
        if trip_count:
            return int(trip_count.group(1))
        names = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)[:1]
        limits: list[int] = []
        while names:
            for instruction in self.computations[names.pop()].instructions.values():
                names += [name for name in instruction.calls if name in self.computations]
                if instruction.opcode == "constant" and instruction.shapes[0].dtype in _COUNTERS:
                    limits += [int(value) for value in re.findall(r"^(-?\d+)\)", instruction.attributes)]
        return max([limit for limit in limits if limit > 0], default=1) - first_count(loop, holder)

    @cached_property
    def flops(self) -> float:
        """Flops of all matmuls, grouped ones included; for other kernels see `custom_calls`."""
        return sum(
            self.times[c.name] * flops_of(i, c)
            for c in self.computations.values()
            for i in c.instructions.values()
            if self.times[c.name]
        )

    @cached_property
    def custom_calls(self) -> dict[str, float]:
        """Executions of each kernel that XLA did not generate, by its name."""
        calls: dict[str, float] = {}
        for computation in self.computations.values():
            times = self.times[computation.name]
            for instruction in computation.instructions.values():
                is_call = instruction.opcode == "custom-call" and not _MARKS.search(instruction.attributes)
                if times and is_call:
                    name = kernel_name(instruction)
                    calls[name] = calls.get(name, 0.0) + times
        return calls

    @cached_property
    def memory_bytes(self) -> float:
        """Bytes read from and written to HBM. A slice of a stack counts as the slice."""
        return sum(
            self.times[c.name] * self.bytes_of(i, c)
            for c in self.scheduled()
            for i in c.instructions.values()
        )

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """All collectives, in the order of the text."""
        return tuple(self._collectives())

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers between device and host, for offloaded activations, in the order of the text."""
        return tuple(
            Transfer(i.to_host, i.host_bytes, self.times[c.name], self.overlapped(c, [i.name]))
            for c in self.scheduled()
            for i in c.instructions.values()
            if i.host_bytes
        )

    def work_of(self, scope: str) -> Work:
        """Returns the work of a scope's instructions, and of all instructions of its loops.

        Args:
          scope: a name of `jax.named_scope`.
        """
        name = re.compile(rf"\b{scope}\b")
        inside: set[str] = set()

        def enter(computation: str) -> None:
            if computation in inside or computation not in self.computations:
                return
            inside.add(computation)
            for instruction in self.computations[computation].instructions.values():
                for called in instruction.calls:
                    enter(called)

        every = [(c, i) for c in self.computations.values() for i in c.instructions.values()]
        for _, instruction in every:
            if instruction.opcode == "while" and name.search(instruction.source):
                for called in instruction.calls:
                    enter(called)
        scheduled = {computation.name for computation in self.scheduled()}
        flops = memory_bytes = 0.0
        for computation, instruction in every:
            if computation.name in inside or name.search(instruction.source):
                times = self.times[computation.name]
                flops += times * flops_of(instruction, computation)
                if computation.name in scheduled:
                    memory_bytes += times * self.bytes_of(instruction, computation)
        return Work(flops, memory_bytes)

    @staticmethod
    def _inner(instruction: Instruction) -> tuple[str, ...]:
        """Returns the computations whose instructions are part of this one."""
        return () if instruction.opcode in _BLOCKS else instruction.calls

    # ------------------------------------------------------------ collectives

    def _collectives(self) -> Iterator[Collective]:
        several = list(self.scheduled())
        parts_in = {scheduled.name: self._parts(scheduled) for scheduled in several}
        parents = {
            called: scheduled.name
            for scheduled in several
            for instruction in scheduled.instructions.values()
            if instruction.opcode in _BLOCKS
            for called in instruction.calls
        }
        for scheduled in several:
            # A chain that began before a loop continues in the loop's matmuls.
            begun = parts_in.get(parents.get(scheduled.name, ""), {})
            for key, parts in parts_in[scheduled.name].items():
                if not ("chain" in key and key in begun):
                    callers = [caller for caller, _, _ in parts]
                    yield self._collective(parts[0][1], parts[0][2], scheduled, callers)
            for instruction in scheduled.instructions.values():
                if instruction.opcode == "send" and is_between_slices(instruction):
                    yield self._between(instruction, scheduled)

    def _parts(self, scheduled: Computation) -> dict[str, list[tuple[str, Instruction, Computation]]]:
        """Returns the parts of each collective: the scheduled instruction, the collective, its computation.

        The TPU compiler splits a collective into parts that share its channel and its chain. All
        collectives of `jax.shard_map` share a channel.
        """
        found: dict[str, list[tuple[str, Instruction, Computation]]] = {}
        for caller in scheduled.instructions.values():
            for instruction, holder in self._inside(caller, scheduled):
                if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                    names = re.findall(r'(?:channel_id=|chain_id=")\d+', instruction.attributes)
                    in_parts = names and holder is not scheduled
                    key = " ".join(names) if in_parts else instruction.name
                    found.setdefault(key, []).append((caller.name, instruction, holder))
        return found

    def _collective(
        self, instruction: Instruction, holder: Computation, scheduled: Computation, callers: list[str]
    ) -> Collective:
        kind = instruction.opcode.removesuffix("-start")
        devices = group_size(instruction.attributes)
        return Collective(
            kind,
            received(kind, instruction, holder, devices),
            devices,
            self.times[scheduled.name],
            self.overlapped(scheduled, callers),
        )

    def _between(self, send: Instruction, scheduled: Computation) -> Collective:
        """Returns a collective of several slices.

        It is a transfer to the host and one from the host with the same name.
        """
        kinds = re.findall(r'megascale_transfer_type="(\w+)"', send.attributes)
        name = re.search(r'transfer_rendezvous="[^"]*"', send.attributes)
        every = list(scheduled.instructions.values())
        back = [i for i in every if i.opcode == "recv" and name is not None and name[0] in i.attributes]
        ends = [every.index(u) for i in back for u in scheduled.users[i.name] if u.opcode == "recv-done"]
        return Collective(
            next(iter(kinds), "transfer").lower().replace("_", "-") + BETWEEN,
            sum(i.shapes[0].size for i in back),
            0,
            self.times[scheduled.name],
            any(self._works(i) for i in every[every.index(send) + 1 : max(ends, default=0)]),
        )

    def scheduled(self) -> Iterator[Computation]:
        """Yields computations that run in sequence: the entry, bodies of loops, branches."""
        inner = {
            name
            for c in self.computations.values()
            for i in c.instructions.values()
            for name in self._inner(i)
        }
        for computation in self.computations.values():
            if computation.name not in inner and self.times[computation.name]:
                yield computation

    def _inside(
        self, instruction: Instruction, holder: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """Yields an instruction and all instructions that are fused into it."""
        yield instruction, holder
        for name in self._inner(instruction):
            if name in self.computations:
                for inner in self.computations[name].instructions.values():
                    yield from self._inside(inner, self.computations[name])

    def overlapped(self, scheduled: Computation, callers: list[str]) -> bool:
        """Returns True if matmuls are scheduled between a collective's start and its end."""
        names = list(scheduled.instructions)
        places = [names.index(caller) for caller in callers]
        begun = scheduled.instructions[callers[0]]
        if begun.opcode.endswith("-start"):
            # Starting with libtpu 0.0.50, a SparseCore starts at the update that passes it the
            # operand.
            update = next((u for u in scheduled.users[begun.name] if u.opcode.endswith("-update")), begun)
            ends = [u for u in scheduled.users[update.name] if u.opcode.endswith("-done")]
            places = [names.index(end.name) for end in (update, *ends)]
        if len(places) == 1:
            return False
        return any(
            self._works(scheduled.instructions[name]) for name in names[min(places) + 1 : max(places)]
        )

    def _works(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("convolution", "dot"):
            return True
        if instruction.opcode == "custom-call":
            return not _MARKS.search(instruction.attributes) and "Bitcast" not in instruction.attributes
        return any(
            self._works(inner)
            for name in self._inner(instruction)
            if name in self.computations
            for inner in self.computations[name].instructions.values()
        )

    # ------------------------------------------------------------ bytes

    def bytes_of(self, instruction: Instruction, computation: Computation) -> float:
        """Returns the HBM traffic of one instruction of a scheduled computation."""
        opcode = instruction.opcode
        if host_bytes := instruction.host_bytes:
            return host_bytes
        if opcode in _FREE or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
            return 0.0
        if "ConcatBitcast" in instruction.attributes:
            return 0.0
        fused = opcode in _FUSIONS and instruction.calls
        inner = self.computations.get(instruction.calls[0]) if fused else None
        total = 0.0
        for index, name in enumerate(instruction.operands):
            operand = computation.instructions.get(name)
            if operand is None:
                continue
            held = sum(shape.size for shape in operand.shapes if shape.in_hbm)
            if not held:
                continue
            if inner is None:
                total += used(instruction, index, held)
            else:
                total += min(held, self._read(inner, index))
        written = sum(shape.size for shape in instruction.shapes if shape.in_hbm)
        if opcode.endswith("-start") and inner is None:  # its result lists the operand again
            return total + sum(shape.size for shape in instruction.shapes[1:2] if shape.in_hbm)
        if inner is None:
            return total + changed(instruction, computation, written)
        return total + min(written, self._written_by(inner, inner.root))

    def _read(self, computation: Computation, index: int) -> float:
        """Returns the bytes of its operand that a fusion reads."""
        parameter = computation.parameter(index)
        if parameter is None:
            return math.inf
        return self._read_of(computation, parameter)

    def _read_of(self, computation: Computation, source: Instruction) -> float:
        total = 0.0
        for user in computation.users[source.name]:
            if user.opcode == "bitcast" and not user.is_root:
                total += self._read_of(computation, user)
            elif user.opcode in _ELEMENTWISE and not user.is_root:  # only for used elements
                total += (
                    self._read_of(computation, user) * source.shapes[0].size / max(user.shapes[0].size, 1.0)
                )
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name:
                user_size = sum(shape.size for shape in user.shapes)
                # The slice may be used only in part, like the array itself: rows of rows.
                total += user_size if user.is_root else min(user_size, self._read_of(computation, user))
            elif self._hands_on(user, source, computation):
                continue
            elif user.opcode == "fusion" and user.calls[0] in self.computations:
                total += self._read_inside(user, source, computation)
            else:
                return math.inf
        return total

    def _read_inside(self, user: Instruction, source: Instruction, computation: Computation) -> float:
        """Returns the bytes of an operand that a nested fusion reads.

        If the nested fusion only changes the shape, the reads of its users are counted, too.
        """
        inner, total = self.computations[user.calls[0]], 0.0
        for index in (i for i, name in enumerate(user.operands) if name == source.name):
            total += self._read(inner, index)
            if not user.is_root and without_bitcasts(inner.root, inner) is inner.parameter(index):
                total += self._read_of(computation, user)
        return total

    @staticmethod
    def _hands_on(user: Instruction, source: Instruction, computation: Computation) -> bool:
        """Returns True if a fusion returns an operand in place without reading it.

        The operand may be modified.
        """
        updated = user.opcode == "dynamic-update-slice" and user.operands[0] == source.name
        unchanged = without_bitcasts(source, computation).opcode == "parameter"
        returned = user.opcode in ("tuple", "bitcast") and user.is_root and unchanged
        return updated or returned or is_continued(user, computation)

    def _written_by(self, computation: Computation, result: Instruction) -> float:
        """Returns the bytes of a result that a fusion writes: of an updated stack, the update."""
        if result.opcode == "dynamic-update-slice":
            update = computation.instructions.get(result.operands[1])
            return sum(shape.size for shape in (update or result).shapes)
        if result.opcode == "bitcast" and result.operands[0] in computation.instructions:
            return self._written_by(computation, computation.instructions[result.operands[0]])
        if result.opcode == "tuple":
            parts = (
                computation.instructions[name]
                for name in result.operands
                if name in computation.instructions
            )
            return sum(self._written_by(computation, output) for output in parts if output.shapes[0].in_hbm)
        if result.opcode == "parameter" or is_continued(result, computation):  # returned in place
            return 0.0
        # The gathered array, without the operand, which is returned in place.
        if STARTS in result.attributes:
            return sum(
                shape.size for name in result.operands for shape in computation.instructions[name].shapes
            )
        if result.opcode == "fusion" and result.calls[0] in self.computations:
            called = self.computations[result.calls[0]]
            return self._written_by(called, called.root)
        return sum(shape.size for shape in result.shapes)
