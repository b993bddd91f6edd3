"""Figures of a compiled step, kept by the program's text, so that nothing is compiled twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from nalora_jax import downloads
from nalora_jax.distributed.devices import kind_of
from nalora_jax.files import write_atomically
from nalora_jax.plan.accounting import Collective, Program
from nalora_jax.plan.machines import Chip
from nalora_jax.plan.transfers import Transfer, transfers

_ACCOUNTING = "14"  # of what is read from programs: what an earlier one kept is not taken


@dataclass(frozen=True)
class Figures:
    """What one program needs of each device."""

    arguments: float  # bytes
    temporary: float  # bytes
    flops: float  # of XLA's own products
    memory_bytes: float  # read from and written to HBM in a step
    custom_calls: Mapping[str, float]  # how often kernels run that XLA did not make
    collectives: tuple[Collective, ...]
    host: float = 0.0  # bytes of the host's memory
    transfers: tuple[Transfer, ...] = ()  # between that and the device's

    @property
    def memory(self) -> float:
        """Bytes that the program holds at once; its results lie where its arguments were."""
        return self.arguments + self.temporary

    def fits(self, chip: Chip) -> bool:
        """Returns True if the program fits in the chip's memory and in its share of the host's."""
        return self.memory <= chip.memory and self.host <= chip.host_memory

    def moved(self, *, overlapped: bool | None = None) -> float:
        """Bytes that a step receives over the interconnect, all or those that products do or do not hide."""
        return sum(c.total for c in self.collectives if overlapped in (None, c.overlapped))


def figures(step: Any, arguments: tuple[Any, ...], *, cache: Path | None = None) -> Figures:
    """Figures of ``step`` for descriptions of its arguments, from the cache or from the compiler.

    Args:
      step: a jitted function.
      arguments: ``jax.ShapeDtypeStruct`` trees with shardings.
      cache: folder; `downloads.cache_dir` by default.
    """
    lowered = step.lower(*arguments)
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    text = "\n".join(
        [_ACCOUNTING, lowered.as_text(), kind_of(device), *(_version(name) for name in ("jaxlib", "libtpu"))]
    )
    text += repr(sorted((lowered._lowering.compile_args or {}).get("compiler_options_kvs", ())))
    file = (cache or downloads.cache_dir()) / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if file.exists():
        return _read(json.loads(file.read_text()))
    found = of_compiled(lowered.compile())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(found)))
    return found


def of_compiled(compiled: Any) -> Figures:
    """Figures of a ``jax.stages.Compiled``."""
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    return Figures(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        program.flops,
        program.memory_bytes,
        program.custom_calls,
        program.collectives,
        memory.host_temp_size_in_bytes,
        tuple(transfers(program)),
    )


def _read(record: dict[str, Any]) -> Figures:
    collectives = tuple(Collective(**entry) for entry in record.pop("collectives"))
    moved = tuple(Transfer(**entry) for entry in record.pop("transfers"))
    return Figures(**record, collectives=collectives, transfers=moved)


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""
