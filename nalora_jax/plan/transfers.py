"""Transfers between a device's memory and its host's in a compiled program: what offloaded activations cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nalora_jax.plan.accounting import Program


@dataclass(frozen=True)
class Transfer:
    """An array that goes to the host's memory, or comes from there, as a device sees it."""

    to_host: bool
    moved: float  # bytes, each time
    times: float  # a step
    overlapped: bool  # the schedule holds products between its start and its end

    @property
    def total(self) -> float:
        """Bytes in a step."""
        return self.moved * self.times


def transfers(program: Program) -> Iterator[Transfer]:
    """All of a program, in the order of the text."""
    for computation in program.scheduled():
        for instruction in computation.instructions.values():
            if moved := instruction.host_bytes:
                times = program.times[computation.name]
                overlapped = program.overlapped(computation, [instruction.name])
                yield Transfer(instruction.to_host, moved, times, overlapped)
