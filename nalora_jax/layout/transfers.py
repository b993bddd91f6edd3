"""Transfers between device and host memory in a compiled program, for offloaded activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nalora_jax.layout.accounting import Program


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


def transfers(program: Program) -> Iterator[Transfer]:
    """Yields all transfers of a program, in the order of the text."""
    for computation in program.scheduled():
        for instruction in computation.instructions.values():
            if host_bytes := instruction.host_bytes:
                times = program.times[computation.name]
                overlapped = program.overlapped(computation, [instruction.name])
                yield Transfer(instruction.to_host, host_bytes, times, overlapped)
