"""Memory traffic of single instructions of a compiled program."""

from __future__ import annotations

from nalora_jax.layout.hlo import Computation, Instruction

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
STARTS = 'custom_call_target="AsyncCollectiveStart"'  # ends the first part of a collective


def origin(instruction: Instruction, computation: Computation) -> Instruction:
    """Returns the instruction that a value comes from, without bitcasts."""
    while instruction.opcode == "bitcast" and instruction.operands[0] in computation.instructions:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def is_between_slices(instruction: Instruction) -> bool:
    """Returns True for a transfer between TPU slices."""
    return "megascale" in instruction.attributes


def is_continued(instruction: Instruction, computation: Computation) -> bool:
    """Returns True if a fusion has a later part of a collective that the TPU compiler has split.

    Every part lists the entire gathered array. Its bytes are counted once, in the first part.
    """
    if 'custom_call_target="AsyncCollectiveDone"' in instruction.attributes:
        return True
    return instruction.opcode in COLLECTIVES and STARTS not in computation.root.attributes


def used(instruction: Instruction, index: int, held: float) -> float:
    """Returns the bytes that an instruction reads of an operand of ``held`` bytes."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start") and index == 0:
        return min(held, instruction.shapes[-1 if instruction.opcode != "slice-start" else 1].size)
    if instruction.opcode == "dynamic-update-slice" and index == 0:
        return 0.0
    return held


def changed(instruction: Instruction, computation: Computation, written: float) -> float:
    """Returns the bytes that an instruction changes of a result of ``written`` bytes."""
    if instruction.opcode == "dynamic-update-slice":
        update = computation.instructions.get(instruction.operands[1])
        if update is None:
            return written
        return sum(shape.size for shape in update.shapes)
    return written
