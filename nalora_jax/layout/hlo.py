"""A parser of scheduled HLO, the text of a compiled program, into computations and instructions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "token": 0, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8,
}  # fmt: skip
_HOST = 5  # memory space of the host in layouts: S(5)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:branch|called)_computations|(?:true|false)_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory next to the cores (TPU: VMEM), not in HBM
    on_host: bool = False  # in the host's memory

    @property
    def in_hbm(self) -> bool:
        """True if it is stored in the device's main memory."""
        return not (self.on_chip or self.on_host)

    @property
    def size(self) -> float:
        """The size in bytes."""
        return math.prod(self.dims) * _DTYPE_BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs; for a loop, body and condition."""
        return tuple(
            name.strip().lstrip("%")
            for several, single in _CALLED.findall(self.attributes)
            for name in (several or single).split(",")
            if name.strip()
        )

    @property
    def source(self) -> str:
        """The path of the JAX operation that it computes; "" if unknown."""
        return next(iter(re.findall(r'op_name="([^"]*)"', self.attributes)), "")

    @property
    def host_bytes(self) -> float:
        """The bytes that it moves between device and host memory; 0 if it moves none."""
        if not self.opcode.endswith("-start") or not any(shape.on_host for shape in self.shapes):
            return 0.0
        # One side is a stack of all layers, the other the slice that is written or read; the rest
        # are indices.
        return sum(shape.size for shape in self.shapes if shape.dims and not shape.on_host)

    @property
    def to_host(self) -> bool:
        """True if the bytes move to the host.

        It is decided by the result, which a copy lists first and other instructions last.
        """
        return self.shapes[0 if self.opcode == "copy-start" else -2].on_host


@dataclass
class Computation:
    """Instructions in their scheduled order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's result."""
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                if operand in users:
                    users[operand].append(instruction)
        return users

    def parameter(self, index: int) -> Instruction | None:
        """Returns the parameter with a number."""
        number = f"{index}"
        return next(
            (
                i
                for i in self.instructions.values()
                if i.opcode == "parameter" and i.attributes.startswith(number + ")")
            ),
            None,
        )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            current = Computation(header.group(2))
            computations[current.name] = current
            if header.group(1):
                entry = current.name
        elif line == "}":
            current = None
        elif current is not None and (named := _NAME.match(line)):
            instruction = _instruction(named, line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    return computations, entry


def first_count(loop: Instruction, holder: Computation) -> int:
    """Returns the initial value of a ``while`` counter; 0 if the text does not contain it.

    It is above 0 if the compiler has peeled the first iterations off the loop. The counter is the
    first array in the carry of JAX's loops.
    """
    carried = holder.instructions.get(loop.operands[0])
    if carried is None or carried.opcode != "tuple":
        return 0
    counter = holder.instructions.get(carried.operands[0])
    while counter is not None and counter.opcode == "copy":
        counter = holder.instructions.get(counter.operands[0])
    if counter is None or counter.opcode != "constant":
        return 0
    return int(next(iter(re.findall(r"^(\d+)\)", counter.attributes)), 0))


def _instruction(named: re.Match[str], line: str) -> Instruction | None:
    remainder = line[named.end() :]
    end = _closing(remainder, 0) + 1 if remainder.startswith("(") else remainder.index(" ")
    opcode = _OPCODE.match(remainder, end)
    if opcode is None:
        return None
    closing = _closing(remainder, opcode.end() - 1)
    inside = remainder[opcode.end() : closing]
    shapes = tuple(_shape(*shape) for shape in _SHAPE.findall(remainder[:end]))
    # For parameters and constants the attributes include the text in their parentheses.
    attributes = remainder[closing + 1 :]
    if opcode.group(1) in ("parameter", "constant"):
        attributes = f"{inside}){attributes}"
    operands, is_root = tuple(_OPERAND.findall(inside)), bool(named.group(1))
    return Instruction(named.group(2), opcode.group(1), shapes, operands, attributes, is_root)


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout or "")
    on_host = space is not None and int(space.group(1)) == _HOST
    return Shape(
        dtype, tuple(int(n) for n in dims.split(",") if n), space is not None and not on_host, on_host
    )


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes ``text[opening]``."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)
