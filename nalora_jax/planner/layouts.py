"""The mesh and the rematerialization policy of runs and sweeps: the fastest by roofline that fits.

A frozen base has no gradients and no optimizer state, so the best layout is not the one for
full training. A model of 16 GB may be replicated on chips of 32 GB, which then gather no weights. A
split model is gathered once in the forward and once in the backward pass, and the saved activations
determine how much is recomputed. Activations that do not fit on the chip may be stored in the
host's memory, if their transfers take no longer than the matmuls. The estimates here need no
compiler and take milliseconds; `nalora plan` compiles the chosen layout and shows how accurate they
are.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax

from nalora_jax.common.devices import CONTEXT, DATA, FSDP, TENSOR
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.remat import DOTS_LAST, OFFLOAD
from nalora_jax.models.stacks import groups, key_heads, stacks
from nalora_jax.planner.estimates import (
    Layout,
    attention_kernel,
    attention_stacks,
    decoder_alone,
    estimate,
)
from nalora_jax.planner.machines import Topology, describe_machine

log = logging.getLogger(__name__)

# Policies ordered by the amount that they save, most first; on the chip, then in the host's memory.
_POLICIES = tuple(
    name + where for where in ("", OFFLOAD) for name in ("dots", "attention", "full")
)
# With more, sums of activations cost more than gathers of weights on every machine of the table.
_MOST_TENSOR = 8
# Usable share of the memory, a margin for the error of the estimates (docs/pods.md).
_USABLE = {"tpu": 0.97, "gpu": 0.9}
_USABLE_OF_HOST = (
    0.5  # the rest is for processes that read data, for loading, and for the system
)
# Tokens of a block of a split row (`nalora_jax.ops.split_rows`), if --mesh auto splits it.
_LEAST_BLOCK = 1024


def choose_axes(
    config: RunConfig, base: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> RunConfig:
    """Returns ``config`` with all mesh axes set to the layout with the best estimate.

    On TPUs and GPUs the rematerialization policy is set, too. On a CPU or an unknown chip
    ``config`` is returned unchanged.

    Args:
      config: the run; axes of 0 and a remat of "auto" are chosen by this function.
      base: architecture of the base model.
      devices: default: all devices of all processes.

    Raises:
      NaloraError: no layout fits, or the axes do not fit the devices, the batch or the heads.
    """
    where = describe_machine(list(devices or jax.devices()))
    if where is None:  # `make_mesh` takes the simplest mesh
        return config
    layout = fastest(fitting_layouts(config, base, where))
    log.info("mesh: %s", layout)
    return layout.into(config)


def fitting_layouts(
    config: RunConfig, base: ModelConfig, where: Topology
) -> list[Layout]:
    """Returns layouts that are estimated to fit and match the axes and policy of ``config``.

    Image towers and projectors are ignored as small.

    Raises:
      NaloraError: no layout fits, or no mesh divides the batch.
    """
    layouts = list(candidates(config, base, where))
    if not layouts:
        micro = config.train.batch_size // config.train.accumulate
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch that {where.size} devices can share "
            "(a multiple of mesh axes data x fsdp)",
            found=micro,
            remedy=f"use a multiple of {where.size}, a smaller --train.accumulate, "
            "or a larger --mesh.context or --mesh.tensor",
        )
    fits = usable_layouts(layouts, where)
    if not fits:
        hosted = [layout for layout in layouts if layout.host <= usable_host(where)]
        if hosted:
            smallest = min(hosted, key=lambda layout: layout.memory)
            needed = smallest.memory
            room = usable_memory(where)
            of = "a chip"
        else:
            smallest = min(layouts, key=lambda layout: layout.host)
            needed = smallest.host
            room = usable_host(where)
            of = "of the host's memory for each chip"
        raise NaloraError(
            where.name,
            expected=f"{base.model_type} with {config.data.max_length} tokens a row to fit in "
            f"{room / 1e9:.2f} GB {of}",
            found=f"{needed / 1e9:.2f} GB at the least ({smallest})",
            remedy="use more chips, fewer rows a device (--train.accumulate), "
            "shorter rows, or --compute.quantize int8",
        )
    return fits


def usable_layouts(layouts: Sequence[Layout], where: Topology) -> list[Layout]:
    """Returns the layouts that are estimated to fit in the memory of a chip and of its host."""
    limit = usable_memory(where)
    of_host = usable_host(where)
    return [
        layout
        for layout in layouts
        if layout.memory <= limit and layout.host <= of_host
    ]


def usable_memory(where: Topology) -> float:
    """Returns the bytes of a chip's memory that a layout's estimate may have."""
    return _USABLE[where.chip.platform] * where.chip.memory


def usable_host(where: Topology) -> float:
    """Returns the bytes of the host's memory that a chip's offloaded activations may have."""
    return _USABLE_OF_HOST * where.chip.host_memory


def fastest(
    layouts: Sequence[Layout],
    seconds: Callable[[Layout], float] = lambda layout: layout.seconds,
) -> Layout:
    """Returns the fastest layout.

    Among layouts within 1% of the fastest it prefers the least communication to hide, then the
    least ``tensor``, then the least memory.
    """
    fastest = min(seconds(layout) for layout in layouts)
    equal = [layout for layout in layouts if seconds(layout) <= 1.01 * fastest]
    return min(
        equal,
        key=lambda layout: (
            round(layout.gathers + layout.transfers, 3),
            layout.tensor,
            layout.memory,
        ),
    )


def candidates(
    config: RunConfig, base: ModelConfig, where: Topology
) -> Iterator[Layout]:
    """Yields every layout that divides the devices, the batch and the heads."""
    base, spec = decoder_alone(config, base)
    micro = config.train.batch_size // config.train.accumulate
    size = where.size
    heads = key_heads(base)
    # libtpu 0.0.42 aborts with both on most meshes of one slice
    # (`nalora_jax.models.remat.select_expert_kernel`).
    asked_for_both = "auto" not in (config.compute.remat, config.compute.experts)
    fixed = distributed.axis_sizes(config.mesh, size, where.slices, keep_open=True)
    distributed.check_heads(
        max(fixed[TENSOR], 1), n_heads=base.n_heads, n_kv_heads=heads
    )
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    for tensor, fsdp, context in itertools.product(divisors, repeat=3):
        data, rest = divmod(size, tensor * fsdp * context)
        sizes = {DATA: data, FSDP: fsdp, CONTEXT: context, TENSOR: tensor}
        if rest or any(fixed[name] not in (0, axis) for name, axis in sizes.items()):
            continue
        if micro % (data * fsdp) or data % where.slices:
            continue
        if not fixed[TENSOR]:
            in_a_node = where.chip.platform != "gpu" or where.dims[-1] % tensor == 0
            if (
                tensor > _MOST_TENSOR
                or base.n_heads % tensor
                or heads % tensor
                or not in_a_node
            ):
                continue
        if context > 1 and not fixed[CONTEXT]:
            whole_rows = micro != data * fsdp
            if whole_rows or not _splits_well(
                base, where, config.data.max_length, context
            ):
                continue
        for remat, experts in itertools.product(
            policies_of(config, base), _ways(config, base, where, fsdp)
        ):
            if experts == "send" and remat.endswith(OFFLOAD) and not asked_for_both:
                continue
            layout = Layout(data, fsdp, tensor, remat, experts, context=context)
            yield estimate(layout, config, base, spec, where)


def policies_of(config: RunConfig, base: ModelConfig) -> tuple[str, ...]:
    """Returns the rematerialization policies to choose from."""
    if config.compute.remat != "auto":
        return (config.compute.remat,)
    if max(map(len, groups(base))) > 1:
        return (DOTS_LAST, *_POLICIES)
    return _POLICIES


def _splits_well(base: ModelConfig, where: Topology, seq: int, context: int) -> bool:
    """Returns True if ``--mesh auto`` may split rows: long rows whose parts the platform's kernels
    take."""
    mixers = (stack.config.mixer for stack in stacks(base))
    can_split = not base.attn_dropout and all(
        mixer is None or mixer.splits_rows for mixer in mixers
    )
    has_kernel = where.chip.platform == "tpu" or all(
        attention_kernel(where, of_stack, 1, seq, context)
        for of_stack in attention_stacks(base)
    )
    return can_split and has_kernel and seq >= 2 * context * _LEAST_BLOCK


def _ways(
    config: RunConfig, base: ModelConfig, where: Topology, fsdp: int
) -> tuple[str, ...]:
    """Returns the values of ``--compute.experts`` to choose from."""
    if fsdp == 1 or not base.n_experts or base.n_experts % fsdp or config.lora.dropout:
        return ("gather",)
    if config.compute.experts != "auto":
        return (config.compute.experts,)
    # On GPUs the estimates are fitted to programs that gather experts or split their channels.
    if where.chip.platform == "gpu":
        return ("gather",)
    return ("gather", "send")


# ---------------------------------------------------------------- sweeps


def fitting_sweep_layouts(
    config: RunConfig, base: ModelConfig, where: Topology, runs: int
) -> list[Layout]:
    """Returns the layouts of a sweep that are estimated to fit.

    Their seconds are of a step of all runs, in programs after each other.

    Args:
      config: settings of a run, whose rows belong to one run; ``mesh.run`` and
        ``mesh.runs_per_device`` are chosen if they are 0, the policy if it is "auto".
      base: the model.
      where: the machine.
      runs: number of runs.

    Raises:
      NaloraError: no layout fits.
    """
    layouts = list(sweep_candidates(config, base, where, runs))
    if not layouts:
        raise NaloraError(
            "--mesh.run",
            expected="groups of devices that can share the rows and heads of a run, "
            "or one device a run",
            found=config.mesh.run,
        )
    fits = usable_layouts(layouts, where)
    if not fits:
        smallest = min(layouts, key=lambda layout: layout.memory)
        raise NaloraError(
            "--sweep",
            expected=f"runs that fit in {usable_memory(where) / 1e9:.2f} GB a chip",
            found=f"{smallest.memory / 1e9:.2f} GB ({smallest.axes})",
            remedy="use shorter rows, --compute.quantize int8, "
            "or fewer runs on a device (--mesh.runs-per-device)",
        )
    return fits


def sweep_candidates(
    config: RunConfig, base: ModelConfig, where: Topology, runs: int
) -> Iterator[Layout]:
    """Yields layouts from the smallest group of devices to all, each with fewer and fewer runs.

    Within a group, "fsdp" splits as many rows as there are, and "tensor" takes the other devices.
    Mixtures of experts need one device a run, or all devices for one. A run stays within a slice.
    """
    decoder, spec = decoder_alone(config, base)
    rows = config.train.batch_size // config.train.accumulate
    size = where.size
    groups = [
        size // n for n in range(1, size + 1) if size % n == 0 and size // n <= runs
    ]
    if config.mesh.run:
        groups = [config.mesh.run]
    for run in groups:
        fsdp = math.gcd(rows, size // run)
        tensor = size // run // fsdp
        if base.n_heads % tensor or base.n_kv_heads % tensor:
            continue
        if run % where.slices or (base.n_experts and 1 < run < size):
            continue
        shared = config.mesh.runs_per_device or math.ceil(runs / run)
        while shared >= 1:
            for remat in policies_of(config, base):
                layout = Layout(
                    1,
                    fsdp,
                    tensor,
                    remat,
                    config.compute.experts,
                    run=run,
                    runs_per_device=shared,
                )
                layout = estimate(layout, config, decoder, spec, where)
                yield replace(
                    layout, seconds=layout.seconds * math.ceil(runs / layout.together)
                )
            if config.mesh.runs_per_device:
                break
            shared //= 2
