"""Figures of a compiled step, cached by its text so that each program is compiled once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from nalora_jax.common import downloads
from nalora_jax.common.devices import kind_of
from nalora_jax.common.digests import FIELD, digest_of, seal, unseal
from nalora_jax.common.files import write_atomically
from nalora_jax.layout.accounting import Program
from nalora_jax.layout.collectives import Collective
from nalora_jax.layout.machines import Chip
from nalora_jax.layout.scopes import Work, works
from nalora_jax.layout.transfers import Transfer, transfers

log = logging.getLogger(__name__)
_ACCOUNTING = "19"  # version of the accounting; cached figures of other versions are ignored


@dataclass(frozen=True)
class Figures:
    """Resources that one program needs on each device."""

    arguments: float  # bytes
    temporary: float  # bytes that are live at once, besides the arguments
    flops: float  # of XLA's matmuls
    memory_bytes: float  # read from and written to HBM in a step
    custom_calls: Mapping[str, float]  # executions of kernels that XLA did not generate
    collectives: tuple[Collective, ...]
    host: float = 0.0  # bytes of the host's memory
    transfers: tuple[Transfer, ...] = ()  # between the host's and the device's memory
    scopes: Mapping[str, Work] = field(default_factory=dict)  # by name

    @property
    def memory(self) -> float:
        """Bytes that the program needs at once; results reuse the memory of the arguments."""
        return self.arguments + self.temporary

    def fits(self, chip: Chip) -> bool:
        """Returns True if the program fits in the chip's memory and in its share of the host's."""
        return self.memory <= chip.memory and self.host <= chip.host_memory

    def moved(self, *, overlapped: bool | None = None) -> float:
        """Returns the bytes that a step receives over the interconnect.

        Args:
          overlapped: count only collectives that matmuls do (True) or do not (False) hide; None:
            all.
        """
        return sum(c.total for c in self.collectives if overlapped in (None, c.overlapped))


def figures(step: Any, arguments: tuple[Any, ...], *, cache: Path | None = None) -> Figures:
    """Returns the figures of ``step`` for shapes of its arguments, from the cache or the compiler.

    A damaged file of the cache is replaced.

    Args:
      step: a jitted function.
      arguments: ``jax.ShapeDtypeStruct`` trees with shardings.
      cache: folder; default: `downloads.cache_dir`.
    """
    lowered = step.lower(*arguments)
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    versions = map(_version, ("jaxlib", "libtpu"))
    text = "\n".join([_ACCOUNTING, lowered.as_text(), kind_of(device), *versions])
    text += repr(sorted((lowered._lowering.compile_args or {}).get("compiler_options_kvs", ())))
    digest = digest_of(text)
    file = (cache or downloads.cache_dir()) / "plans" / f"{digest[:32]}.json"
    if file.exists():
        try:
            return _read(file)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            log.warning("%s is damaged: the program is compiled again", file)
    compiled = of_compiled(lowered.compile())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(seal(asdict(compiled))))
    return compiled


def of_compiled(compiled: Any) -> Figures:
    """Returns the figures of a ``jax.stages.Compiled``."""
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    if memory.peak_memory_in_bytes:
        # libtpu 0.0.42 adds up temporary arrays of which some are never live together.
        temporary = min(temporary, memory.peak_memory_in_bytes - arguments)
    return Figures(
        arguments,
        temporary,
        program.flops,
        program.memory_bytes,
        program.custom_calls,
        program.collectives,
        memory.host_temp_size_in_bytes,
        tuple(transfers(program)),
        works(program),
    )


def _read(file: Path) -> Figures:
    """Returns the figures in a file of the cache.

    Raises:
      OSError, ValueError, TypeError, KeyError, RecursionError: the file is damaged.
    """
    record = json.loads(file.read_bytes())
    if FIELD not in record:  # `unseal` accepts that
        raise KeyError(FIELD)
    record = unseal(record, str(file))
    collectives = tuple(Collective(**entry) for entry in record.pop("collectives"))
    transfers = tuple(Transfer(**entry) for entry in record.pop("transfers"))
    scopes = {name: Work(**entry) for name, entry in record.pop("scopes").items()}
    return Figures(**record, collectives=collectives, transfers=transfers, scopes=scopes)


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""
