"""Scheduled HLO, the text of a compiled program: its computations, and flops and bytes of
instructions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

from nalora_jax.ops.grouped_matmul import KERNEL_NAMES as GROUPED_MATMUL

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
STARTS = (
    'custom_call_target="AsyncCollectiveStart"'  # ends the first part of a collective
)
_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5,
    "token": 0, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8,
}  # fmt: skip
HOST = 5  # memory space of the host in layouts: S(5)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{(?:[^}]*S\((\d+)\))?[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:branch|called)_computations"
    r"|(?:true|false)_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    # 0: the device's main memory (HBM), `HOST`, or a memory next to the cores (TPU: VMEM)
    space: int

    @property
    def size(self) -> float:
        """The size in bytes."""
        return math.prod(self.dims) * _DTYPE_BYTES.get(self.dtype, 4)


@dataclass(eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]  # names
    attributes: str
    is_root: bool
    holder: Computation

    @cached_property
    def inputs(self) -> tuple[Instruction, ...]:
        """The instructions whose results it reads."""
        return tuple(self.holder.instructions[name] for name in self.operands)

    @property
    def users(self) -> list[Instruction]:
        """The instructions that read its result, once for each time."""
        return self.holder.users[self.name]

    @cached_property
    def calls(self) -> tuple[Computation, ...]:
        """The computations that it runs; for a loop, body and condition."""
        program = self.holder.program
        called = []
        for several, single in _CALLED.findall(self.attributes):
            for text in (several or single).split(","):
                name = text.strip().lstrip("%")
                if name in program:
                    called.append(program[name])
        return tuple(called)

    @property
    def size(self) -> float:
        """The bytes of its result."""
        return sum(shape.size for shape in self.shapes)

    @property
    def in_hbm(self) -> float:
        """The bytes of its result in the device's main memory."""
        return sum(shape.size for shape in self.shapes if shape.space == 0)

    @property
    def host_bytes(self) -> float:
        """The bytes that it moves between device and host memory; 0 if it moves none."""
        if not self.opcode.endswith("-start") or all(
            shape.space != HOST for shape in self.shapes
        ):
            return 0.0
        # One side is a stack of all layers, the other the slice that is written or read; the rest
        # are indices.
        return sum(
            shape.size for shape in self.shapes if shape.dims and shape.space != HOST
        )

    @property
    def to_host(self) -> bool:
        """True if the bytes move to the host.

        It is decided by the result, which a copy lists first and other instructions last.
        """
        if self.opcode == "copy-start":
            return self.shapes[0].space == HOST
        return self.shapes[-2].space == HOST

    @property
    def is_continued(self) -> bool:
        """True if a fusion has a later part of a collective that the TPU compiler has split.

        Every part lists the entire gathered array. Its bytes are counted once, in the first part.
        """
        if 'custom_call_target="AsyncCollectiveDone"' in self.attributes:
            return True
        return self.opcode in COLLECTIVES and STARTS not in self.holder.root.attributes

    @property
    def without_bitcasts(self) -> Instruction:
        """The instruction that its value comes from."""
        if self.opcode == "bitcast":
            return self.inputs[0].without_bitcasts
        return self


@dataclass
class Computation:
    """Instructions in their scheduled order."""

    name: str
    program: dict[str, Computation] = field(repr=False)  # all computations by name
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
                users[operand].append(instruction)
        return users

    def parameter(self, index: int) -> Instruction | None:
        """Returns the parameter with a number."""
        parameters = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(
            (i for i in parameters if i.attributes.startswith(f"{index})")), None
        )


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """Returns computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            current = Computation(header.group(2), computations)
            computations[current.name] = current
            if header.group(1):
                entry = current.name
        elif line == "}":
            current = None
        elif current is not None and (named := _NAME.match(line)):
            _add_instruction(current, named, line[named.end() :])
    return computations, entry


def first_count(loop: Instruction) -> int:
    """Returns the initial value of a ``while`` counter; 0 if the text does not contain it.

    It is above 0 if the compiler has peeled the first iterations off the loop. The counter is the
    first array in the carry of JAX's loops.
    """
    counter = loop.inputs[0]
    if counter.opcode != "tuple":
        return 0
    counter = counter.inputs[0]
    while counter.opcode == "copy":
        counter = counter.inputs[0]
    value = re.match(r"(\d+)\)", counter.attributes)
    if value and counter.opcode == "constant":
        return int(value[1])
    return 0


def _add_instruction(holder: Computation, named: re.Match[str], line: str) -> None:
    """Parses the shapes, opcode, operands and attributes after a name and its sign."""
    if line.startswith("("):
        end = _closing(line, 0) + 1
    else:
        end = line.index(" ")
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return
    closing = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : closing]
    attributes = line[closing + 1 :]
    operands = tuple(_OPERAND.findall(inside))
    # For parameters and constants the attributes include the text in their parentheses.
    if opcode[1] in ("parameter", "constant"):
        operands = ()
        attributes = f"{inside}){attributes}"
    shapes = []
    for dtype, dims, space in _SHAPE.findall(line[:end]):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space or 0)))
    is_root = bool(named[1])
    name = named[2]
    holder.instructions[name] = Instruction(
        name, opcode[1], tuple(shapes), operands, attributes, is_root, holder
    )


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes ``text[opening]``."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


# ---------------------------------------------------------------- flops


def flops_of(instruction: Instruction) -> float:
    """Returns the flops of an instruction; 0 unless it is a matmul or a known kernel."""
    if instruction.opcode in ("convolution", "dot"):
        return _product_flops(instruction)
    if instruction.opcode == "custom-call":
        name = kernel_name(instruction)
        # XLA's on a TPU, or this library's kernel on a GPU.
        if name == GROUPED_MATMUL or (
            name.startswith("ragged-dot") and "metadata" not in name
        ):
            return _grouped_flops(instruction)
    return 0.0


def kernel_name(instruction: Instruction) -> str:
    """Returns the name of a custom call's kernel.

    It is the direction of cuDNN's attention, the name of a Pallas kernel on a GPU, or the
    instruction's name without its number.
    """
    attention = re.search(
        r'custom_call_target="__cudnn\$fmha(\w*)"', instruction.attributes
    )
    if attention and "Backward" in attention[1]:
        return "cudnn_attention_backward"
    if attention:
        return "cudnn_attention_forward"
    name = re.sub(r"[.\d]+$", "", instruction.name)
    pallas_name = re.search(
        r'op_name="(?:[^"]*/)?(\w+)/pallas_call"', instruction.attributes
    )
    if pallas_name and name.startswith("pallas_call"):
        return pallas_name[1]
    return name


def _grouped_flops(instruction: Instruction) -> float:
    """Returns the flops of a grouped matmul of rows ``[m, k]``.

    The result is ``[m, n]``, or, with second operand ``[m, n]``, ``[groups, k, n]``.
    """
    result = instruction.shapes[0].dims
    operands = [operand.shapes[0].dims for operand in instruction.inputs]
    # The first operand with two axes (lists of groups have one, kernels three) shares a side with
    # the result.
    first, second = next((dims for dims in operands if len(dims) == 2), (0, 0))
    inner: float = second
    if len(result) != 2:
        inner = first * second / result[-2]
    return 2.0 * result[-2] * result[-1] * inner


def _product_flops(instruction: Instruction) -> float:
    """Returns twice the multiply-adds of a ``dot`` or ``convolution``."""
    first, second = (operand.shapes[0].dims for operand in instruction.inputs[:2])
    if instruction.opcode == "dot":
        contracted = re.search(
            r"lhs_contracting_dims=\{([\d,]+)\}", instruction.attributes
        )
        axes = map(int, contracted[1].split(",")) if contracted else ()
        return (
            2.0
            * math.prod(instruction.shapes[0].dims)
            * math.prod(first[axis] for axis in axes)
        )
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    dims = (first, second, instruction.shapes[0].dims)
    data, kernel, out = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), dims, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    if window:
        fields = dict(entry.split("=") for entry in window[1].split())
    else:
        fields = {}
    met = 1  # multiply-adds of a kernel's element along all axes of its window, without padding
    for axis in sorted(kernel.keys() - {"i", "o"}):
        sizes = {
            name: int(text.split("x")[int(axis)].split("_")[0])
            for name, text in fields.items()
        }
        stride = sizes.get("stride", 1)
        first_tap = -sizes.get("pad", 0)
        spread = sizes.get("lhs_dilate", 1)
        step = sizes.get("rhs_dilate", 1)
        # The TPU compiler writes a matmul whose columns have two axes as a convolution that slides
        # the kernel over a single element. All but one in ``kernel`` of its multiply-adds are with
        # padding and are not executed.
        places = range(first_tap, first_tap + out[axis] * stride, stride)
        inside = range(0, (data[axis] - 1) * spread + 1, spread)
        executed = 0
        for place in places:
            for tap in range(kernel[axis]):
                executed += place + tap * step in inside
        met *= executed
    return 2.0 * out["b"] * out["f"] * kernel["i"] * met


# ---------------------------------------------------------------- collectives


def ring_bytes(kind: str, instruction: Instruction, devices: int) -> float:
    """Returns the bytes that reach a device in a ring.

    For large arrays this is the minimum over all algorithms.
    """
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and len(shapes) > 1:
        if kind != "collective-permute":
            shapes = shapes[len(shapes) // 2 :]
        else:
            shapes = shapes[1:2]
    size = sum(shape.size for shape in shapes)
    share = (devices - 1) / devices if devices else 1.0
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "reduce-scatter":
        return size * (devices - 1)
    if kind.startswith("collective"):
        return size
    return size * share


def group_size(attributes: str) -> int:
    """Returns the devices in one group of a collective, from any of HLO's notations for groups."""
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[[^{]*)? \{([^}]*)\}",
        attributes,
    )
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    return 1
