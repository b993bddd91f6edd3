"""Figures of a compiled step, cached by its text, and the upper bound of its speed by a roofline.

The time of a step is the longest of the matrix unit's time (at 75% of its peak), HBM's time, and
the times of the interconnect and of the host link for transfers that the schedule overlaps with
matmuls. The time of all other collectives and transfers is added. The bound is computed from the
program and the data sheet, not measured.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from nalora_jax.common import downloads
from nalora_jax.common.devices import kind_of
from nalora_jax.common.digests import FIELD, digest_of, seal, unseal
from nalora_jax.common.files import write_atomically
from nalora_jax.common.imports import installed_version
from nalora_jax.config import RunConfig
from nalora_jax.config.structured import parse_dataclass
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.delta_rule import SCOPE as DELTA_RULE
from nalora_jax.planner.accounting import Collective, Program, Transfer, Work
from nalora_jax.planner.estimates import (
    attention_stacks,
    causal_flops,
    decoder_alone,
    splash_flops,
    useful_flops,
)
from nalora_jax.planner.machines import Chip, Topology

log = logging.getLogger(__name__)
SCOPES = (DELTA_RULE,)  # of which `nalora plan` prints a roofline
_ACCOUNTING = (
    "21"  # version of the accounting; cached figures of other versions are ignored
)

# Matmuls of attention kernels on GPUs, in one layer. The backward pass recomputes the scores;
# Triton's does so twice. cuDNN's tiles are assumed to be as large as Triton's; it skips blocks by
# causality, not by window.
_ON_GPUS = {
    "mha_forward": 2,
    "mha_backward": 7,
    "cudnn_attention_forward": 2,
    "cudnn_attention_backward": 5,
    **attention_gpu.PRODUCTS,
}


@dataclass(frozen=True)
class Figures:
    """Resources that one program needs on each device."""

    arguments: float  # bytes
    temporary: float  # bytes that are live at once, besides the arguments
    flops: float  # of XLA's matmuls
    memory_bytes: float  # read from and written to HBM in a step
    custom_calls: dict[str, float]  # executions of kernels that XLA did not generate
    collectives: tuple[Collective, ...]
    host: float = 0.0  # bytes of the host's memory
    transfers: tuple[Transfer, ...] = ()  # between the host's and the device's memory
    scopes: dict[str, Work] = field(default_factory=dict)  # by name
    inputs: tuple[
        str, ...
    ] = ()  # shardings of the arguments' arrays, as compiled; "None" of unused ones

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
        return sum(
            c.total for c in self.collectives if overlapped in (None, c.overlapped)
        )


def figures(
    step: Any, arguments: tuple[Any, ...], *, cache: Path | None = None
) -> Figures:
    """Returns the figures of ``step`` for shapes of its arguments, from the cache or the compiler.

    A damaged file of the cache is replaced.

    Args:
      step: a jitted function.
      arguments: ``jax.ShapeDtypeStruct`` trees with shardings.
      cache: folder; default: `downloads.cache_dir`.
    """
    lowered = step.lower(*arguments)
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    versions = [f"{name} {installed_version(name)}" for name in ("jaxlib", "libtpu")]
    text = "\n".join([_ACCOUNTING, lowered.as_text(), kind_of(device), *versions])
    text += repr(
        sorted((lowered._lowering.compile_args or {}).get("compiler_options_kvs", ()))
    )
    digest = digest_of(text)
    file = (cache or downloads.cache_dir()) / "plans" / f"{digest[:32]}.json"
    if file.exists():
        try:
            record = json.loads(file.read_bytes())
            if FIELD not in record:  # `unseal` accepts that
                raise KeyError(FIELD)
            return parse_dataclass(Figures, unseal(record, str(file)))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            log.warning("%s is damaged: the program is compiled again", file)
    compiled = measure_compiled(lowered.compile())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(seal(asdict(compiled))))
    return compiled


def measure_compiled(compiled: Any) -> Figures:
    """Returns the figures of a ``jax.stages.Compiled``."""
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes
    if memory.peak_memory_in_bytes:
        # libtpu 0.0.42 adds up temporary arrays of which some are never live together.
        temporary = min(temporary, memory.peak_memory_in_bytes - arguments)
    scopes = {scope: program.work_of(scope) for scope in SCOPES}
    inputs = jax.tree.leaves(
        compiled.input_shardings, is_leaf=lambda sharding: sharding is None
    )
    return Figures(
        arguments,
        temporary,
        program.flops,
        program.memory_bytes,
        program.custom_calls,
        program.collectives,
        memory.host_temp_size_in_bytes,
        program.transfers,
        {scope: work for scope, work in scopes.items() if work.flops},
        tuple(str(getattr(sharding, "spec", None)) for sharding in inputs),
    )


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on each chip, by resource."""

    matrix: float
    hbm: float
    hidden: float  # interconnect, overlapped with matmuls
    exposed: float  # interconnect, not overlapped
    useful_flops: float  # per chip
    peak: float  # flops a second
    host: float = 0.0  # host link, overlapped with matmuls
    host_exposed: float = 0.0  # host link, not overlapped

    @property
    def seconds(self) -> float:
        """The lower bound of the step's time."""
        return (
            max(self.matrix, self.hbm, self.hidden, self.host)
            + self.exposed
            + self.host_exposed
        )

    @property
    def mfu(self) -> float:
        """The implied model flops utilization: useful flops over the chip's peak in that time."""
        return self.useful_flops / (self.peak * self.seconds)


def kernel_flops(
    program: Figures,
    base: ModelConfig,
    rows: float,
    seq: int,
    n_tensor: int,
    accumulate: int = 1,
) -> float:
    """Returns the flops of attention kernels in a step, which XLA does not count."""
    calls = program.custom_calls
    if any(name in calls for name in _ON_GPUS):
        layers = sum(config.n_layers for config in attention_stacks(base))
        products = (
            sum(count * calls.get(name, 0.0) for name, count in _ON_GPUS.items())
            / layers
        )
        return rows / accumulate * causal_flops(base, seq, products) / n_tensor
    splash = {name: times for name, times in calls.items() if "splash" in name}
    forward = sum(times for name, times in splash.items() if "_fwd" in name)
    backward = sum(times for name, times in splash.items() if "_dkv" in name)
    if not forward:
        return 0.0
    # Every window is a branch, and each layer runs one of them.
    windows = sum(
        len(set(config.layer_windows)) * config.n_layers
        for config in attention_stacks(base)
    )
    layers = accumulate * windows
    each = splash_flops(base, seq, forward=forward / layers, backward=backward / layers)
    return rows * each / n_tensor


def roofline(
    program: Figures, config: RunConfig, base: ModelConfig, where: Topology
) -> Roofline:
    """Returns the bound of a compiled training step.

    Args:
      program: figures of the step of a run, or of the runs of a sweep that share a program.
      config: settings of a run, with a concrete mesh; its rows have ``data.max_length`` tokens.
      base: the model; only the work of its decoder counts.
      where: the machine.
    """
    base, spec = decoder_alone(config, base)
    mesh = config.mesh
    seq = config.data.max_length
    rows = config.train.batch_size * max(mesh.run, 1) * max(mesh.runs_per_device, 1)
    n_tensor = max(mesh.tensor, 1)
    share = rows / where.size * n_tensor
    flops = program.flops + kernel_flops(
        program, base, share, seq, n_tensor, config.train.accumulate
    )
    return bound_program(
        program, flops, useful_flops(base, spec, rows, seq) / where.size, where
    )


def bound_program(
    program: Figures, flops: float, useful: float, where: Topology
) -> Roofline:
    """Returns the bound of a compiled program with ``flops`` on each chip, of which ``useful``
    count for the MFU."""
    chip = where.chip

    def rate(collective: Collective) -> float:
        """Returns the bytes per second that reach a chip."""
        if collective.between_slices:
            return chip.network
        return where.inbound(collective.devices)

    hidden = sum(c.total / rate(c) for c in program.collectives if c.overlapped)
    exposed = sum(c.total / rate(c) for c in program.collectives if not c.overlapped)
    link = chip.host_link
    host = sum(t.total / link for t in program.transfers if t.overlapped)
    host_exposed = sum(t.total / link for t in program.transfers if not t.overlapped)
    return Roofline(
        flops / chip.matrix_rate,
        program.memory_bytes / chip.bandwidth,
        hidden,
        exposed,
        useful,
        chip.flops,
        host,
        host_exposed,
    )
