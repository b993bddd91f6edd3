"""Work of the parts of a compiled program that `jax.named_scope` names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nalora_jax.layout.accounting import Program
from nalora_jax.layout.hlo import Instruction
from nalora_jax.layout.products import flops_of
from nalora_jax.ops.delta_rule import SCOPE as DELTA_RULE

SCOPES = (DELTA_RULE,)  # of which `nalora plan` prints a roofline


@dataclass(frozen=True)
class Work:
    """Flops of matmuls and bytes of HBM traffic in a step."""

    flops: float
    memory_bytes: float


def work_of(program: Program, scope: str) -> Work:
    """Returns the work of a scope's instructions, and of all instructions of its loops."""
    name = re.compile(rf"\b{scope}\b")
    inside: set[str] = set()

    def is_inside(instruction: Instruction) -> bool:
        return name.search(instruction.source) is not None

    def enter(computation: str) -> None:
        if computation in inside or computation not in program.computations:
            return
        inside.add(computation)
        for instruction in program.computations[computation].instructions.values():
            for called in instruction.calls:
                enter(called)

    every = [(c, i) for c in program.computations.values() for i in c.instructions.values()]
    for _, instruction in every:
        if instruction.opcode == "while" and is_inside(instruction):
            for called in instruction.calls:
                enter(called)
    scheduled = {computation.name for computation in program.scheduled()}
    flops = memory_bytes = 0.0
    for computation, instruction in every:
        if computation.name in inside or is_inside(instruction):
            times = program.times[computation.name]
            flops += times * flops_of(instruction, computation)
            if computation.name in scheduled:
                memory_bytes += times * program.bytes_of(instruction, computation)
    return Work(flops, memory_bytes)


def works(program: Program) -> dict[str, Work]:
    """Returns the work of each of `SCOPES` that the program has."""
    by_scope = {scope: work_of(program, scope) for scope in SCOPES}
    return {scope: work for scope, work in by_scope.items() if work.flops}
