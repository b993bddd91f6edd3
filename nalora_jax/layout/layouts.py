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
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import jax

from nalora_jax.common.devices import AXES
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed, estimates
from nalora_jax.layout.machines import Topology, of_devices
from nalora_jax.layout.rollouts import rollout_estimate
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.remat import DOTS_LAST, OFFLOAD
from nalora_jax.models.stacks import groups, key_heads
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.quantize import kernels

log = logging.getLogger(__name__)

# Policies ordered by the amount that they save, most first; on the chip, then in the host's memory.
_POLICIES = tuple(name + where for where in ("", OFFLOAD) for name in ("dots", "attention", "full"))
# With more, sums of activations cost more than gathers of weights on every machine of the table.
_MOST_TENSOR = 8
# Usable share of the memory, a margin for the error of the estimates (docs/pods.md).
_USABLE = {"tpu": 0.97, "gpu": 0.9}
_USABLE_OF_HOST = 0.5  # the rest is for processes that read data, for loading, and for the system
# Tokens of a block of a split row (`nalora_jax.ops.split_rows`), if --mesh auto splits it.
_LEAST_BLOCK = 1024
# Periods of layers whose activations are on the chip while all others are in the host's memory.
_UNDER_WAY = 2


@dataclass(frozen=True)
class Layout:
    """A mesh with a rematerialization policy, and its estimated resources on each chip.

    Sizes and policies are those of `nalora_jax.config.MeshConfig` and `nalora_jax.config.ComputeConfig`.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    experts: str
    weights: float = 0.0  # bytes of the frozen base
    state: float = 0.0  # bytes of adapters and optimizer
    activations: float = 0.0  # bytes saved for the backward pass
    # bytes of gathered kernels, of one layer's arrays and of the loss; or what keys and values of a
    # rollout take more than the activations of an update
    working: float = 0.0
    host: float = 0.0  # bytes saved for the backward pass in the host's memory
    # seconds per step to gather kernels, overlapped with matmuls if the compiler can
    gathers: float = 0.0
    # seconds per step to offload activations and load them again, overlapped with matmuls
    transfers: float = 0.0
    # Duration of a step, by roofline, with its part of a rollout; of a sweep: of a step of all its runs.
    seconds: float = 0.0
    rollout: float = 0.0  # the part of a rollout
    mfu: float = 0.0  # of the update
    context: int = 1
    run: int = 0  # 0 and 1: not of a sweep
    runs_per_device: int = 0

    @property
    def memory(self) -> float:
        """The total bytes."""
        return self.weights + self.state + self.activations + self.working

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of data, fsdp and tensor, and of context if it is above 1."""
        sizes = (self.data, self.fsdp, self.tensor)
        if self.context == 1:
            return sizes
        return *sizes, self.context

    @property
    def together(self) -> int:
        """The runs of one program."""
        return max(self.run, 1) * max(self.runs_per_device, 1)

    def into(self, config: RunConfig) -> RunConfig:
        """Returns ``config`` with the mesh and the policies of the layout."""
        mesh = replace(
            config.mesh,
            data=self.data,
            fsdp=self.fsdp,
            tensor=self.tensor,
            context=self.context if self.context > 1 else config.mesh.context,
            run=self.run,
            runs_per_device=self.runs_per_device,
        )
        compute: Any = replace(config.compute, remat=cast(Any, self.remat), experts=cast(Any, self.experts))
        return replace(config, mesh=mesh, compute=compute)

    def record(self) -> dict[str, Any]:
        """Returns the fields for JSON, without the axes of sweeps."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("run")}

    @property
    def axes(self) -> str:
        """The sizes of the axes as text."""
        if self.run and self.runs_per_device:
            sizes = f"run {self.run} x fsdp {self.fsdp} x tensor {self.tensor}"
            return f"{sizes}, {self.runs_per_device} a group"
        return distributed.shown_axes({name: getattr(self, name) for name in AXES})

    @property
    def short(self) -> str:
        """The layout without its estimates."""
        sends = ", rows sent to experts" if self.experts == "send" else ""
        return f"{self.axes}, remat {self.remat}{sends}"

    def __str__(self) -> str:
        """Returns one line for the log and for `nalora plan`."""
        of_host = f" and {self.host / 1e9:.1f} of the host's" if self.host else ""
        sampling = f", {self.rollout:.3g} of them for its rollout" if self.rollout else ""
        return (
            f"{self.short}: {self.memory / 1e9:.1f} GB a chip{of_host}, "
            f"at least {self.seconds:.3g} s a step{sampling} (MFU at most {self.mfu:.0%})"
        )


def laid_out(
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
    where = of_devices(list(devices or jax.devices()))
    if where is None:  # `make_mesh` takes the simplest mesh
        return config
    layout = fastest(fitting(config, base, where))
    log.info("mesh: %s", layout)
    return layout.into(config)


def fitting(config: RunConfig, base: ModelConfig, where: Topology) -> list[Layout]:
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
            expected=f"rows per micro-batch that {where.size} devices can share (a multiple of mesh axes data x fsdp)",
            found=micro,
            remedy=f"use a multiple of {where.size}, a smaller --train.accumulate, or a larger --mesh.context or "
            "--mesh.tensor",
        )
    fits = usable_layouts(layouts, where)
    if not fits:
        raise _too_large(layouts, base, where, config.data.max_length)
    return fits


def usable_layouts(layouts: Sequence[Layout], where: Topology) -> list[Layout]:
    """Returns the layouts that are estimated to fit in the memory of a chip and of its host."""
    limit = usable_memory(where)
    return [layout for layout in _hosted(layouts, where) if layout.memory <= limit]


def usable_memory(where: Topology) -> float:
    """Returns the bytes of a chip's memory that a layout's estimate may have."""
    return _USABLE.get(where.chip.platform, 0.9) * where.chip.memory


def _hosted(layouts: Sequence[Layout], where: Topology) -> list[Layout]:
    """Returns the layouts whose offloaded activations fit in the host's memory."""
    return [layout for layout in layouts if layout.host <= _USABLE_OF_HOST * where.chip.host_memory]


def _too_large(layouts: Sequence[Layout], base: ModelConfig, where: Topology, seq: int) -> NaloraError:
    """Returns the error for a model that fits in no layout."""
    hosted = _hosted(layouts, where)
    if hosted:
        smallest = min(hosted, key=lambda layout: layout.memory)
        needed, room, of = smallest.memory, usable_memory(where), "a chip"
    else:
        smallest = min(layouts, key=lambda layout: layout.host)
        needed, room = smallest.host, _USABLE_OF_HOST * where.chip.host_memory
        of = "of the host's memory for each chip"
    return NaloraError(
        f"{where.name}",
        expected=f"{base.model_type} with {seq} tokens a row to fit in {room / 1e9:.2f} GB {of}",
        found=f"{needed / 1e9:.2f} GB at the least ({smallest})",
        remedy="use more chips, fewer rows a device (--train.accumulate), shorter rows, or --compute.quantize int8",
    )


def fastest(
    layouts: Sequence[Layout], seconds: Callable[[Layout], float] = lambda layout: layout.seconds
) -> Layout:
    """Returns the fastest layout.

    Among layouts within 1% of the fastest it prefers the least communication to hide, then the
    least ``tensor``, then the least memory.
    """
    fastest = min(seconds(layout) for layout in layouts)
    equal = [layout for layout in layouts if seconds(layout) <= 1.01 * fastest]
    return min(
        equal,
        key=lambda layout: (round(layout.gathers + layout.transfers, 3), layout.tensor, layout.memory),
    )


def candidates(config: RunConfig, base: ModelConfig, where: Topology) -> Iterator[Layout]:
    """Yields every layout that divides the devices, the batch and the heads."""
    base, spec = estimates.decoder_alone(config, base)
    micro = config.train.batch_size // config.train.accumulate
    policies = policies_of(config, base)
    # libtpu 0.0.42 aborts with both on most meshes of one slice (`nalora_jax.models.remat.chosen_experts`).
    asked_for_both = "auto" not in (config.compute.remat, config.compute.experts)
    mesh = distributed.requested_axes(config.mesh, where.size, where.slices)
    distributed.check_tensor(max(mesh.tensor, 1), n_heads=base.n_heads, n_kv_heads=key_heads(base))
    for tensor in _divisors(where.size):
        if mesh.tensor == 0 and (
            tensor > _MOST_TENSOR or base.n_heads % tensor or key_heads(base) % tensor
        ):
            continue
        if where.chip.platform == "gpu" and mesh.tensor == 0 and where.dims[-1] % tensor:
            continue
        for data, fsdp, context in _splits(where.size // tensor):
            pairs = (mesh.data, data), (mesh.fsdp, fsdp), (mesh.context, context), (mesh.tensor, tensor)
            fits = all(requested in (0, size) for requested, size in pairs) and micro % (data * fsdp) == 0
            if context > 1 and not mesh.context:
                fits = (
                    fits
                    and _splits_well(base, where, config.data.max_length, context)
                    and micro == data * fsdp
                )
            if fits and data % where.slices == 0:
                for remat, experts in itertools.product(policies, _ways(config, base, where, fsdp)):
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


def _splits(devices: int) -> Iterator[tuple[int, int, int]]:
    """Yields the sizes of data, fsdp and context whose product is ``devices``."""
    for fsdp in _divisors(devices):
        for context in _divisors(devices // fsdp):
            yield devices // fsdp // context, fsdp, context


def _splits_well(base: ModelConfig, where: Topology, seq: int, context: int) -> bool:
    """Returns True if ``--mesh auto`` may split rows: long rows whose parts the platform's kernels take."""
    mixers = (stack.mixer for stack in estimates.uniform(base) if stack.mixer is not None)
    can_split = not base.attn_dropout and all(mixer.splits_rows for mixer in mixers)
    has_kernel = where.chip.platform == "tpu" or all(
        estimates.attention_kernel(where, of_stack, 1, seq, context)
        for of_stack in estimates.attending(base)
    )
    return can_split and has_kernel and seq >= 2 * context * _LEAST_BLOCK


def _ways(config: RunConfig, base: ModelConfig, where: Topology, fsdp: int) -> tuple[str, ...]:
    """Returns the values of ``--compute.experts`` to choose from."""
    if fsdp == 1 or not base.n_experts or base.n_experts % fsdp or config.lora.dropout:
        return ("gather",)
    if config.compute.experts != "auto":
        return (config.compute.experts,)
    # On GPUs the estimates are fitted to programs that gather experts or split their channels.
    if where.chip.platform == "gpu":
        return ("gather",)
    return ("gather", "send")


def estimate(
    layout: Layout, config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology
) -> Layout:
    """Returns ``layout`` with its memory and time.

    Args:
      layout: sizes and policies.
      config: a run, or a run of a sweep, whose rows have ``data.max_length`` tokens.
      base: architecture of the base model.
      spec: the adapters.
      where: the machine.
    """
    fsdp, tensor, context, remat = layout.fsdp, layout.tensor, layout.context, layout.remat
    runs, seq = max(layout.runs_per_device, 1), config.data.max_length
    split = fsdp * context  # devices that share the weights
    micro = runs * config.train.batch_size // config.train.accumulate
    rows = micro / (layout.data * split)  # of a chip, which may have part of one
    tokens = rows * seq
    wide, narrow = _widths(config)
    layer, ends = _weight_bytes(base, config, narrow, wide)
    trained = estimates.trained_bytes(base, spec, tensor)
    live_keys, received_keys = estimates.gathered_keys(base, rows * context, seq, context, wide)
    kernel = estimates.attention_kernel(where, base, rows, seq, context)
    saves, offloads = remat.removesuffix(OFFLOAD), remat.endswith(OFFLOAD)
    saved_bytes, recomputed = (
        wide * tokens * n for n in estimates.values_for_backward(base, saves, tensor, kernel)
    )
    saved = saved_bytes * base.n_layers
    on_chip = base.n_layers  # layers whose activations are on the chip
    if offloads:
        on_chip = _UNDER_WAY * max(map(len, groups(base)))
    host = saved if offloads else 0.0
    times = config.train.accumulate
    once, executed = (
        estimates.executed_flops(base, spec, policy, rows, seq, kernel) for policy in ("dots", saves)
    )
    out = host / where.chip.host_link
    products = _matmul_seconds(where, once / tensor, executed / tensor, out)
    passes = 2.3 if saves == "full" else 2.0
    weights = layer * base.n_layers
    copied = estimates.transposed_bytes(where, base, narrow) + estimates.copied_experts(
        base, fsdp, context, narrow
    )
    stay, sent = 0.0, 0.0
    if layout.experts == "send" and fsdp > 1:
        stay, sent = estimates.rows_for_experts(base, tokens, fsdp, narrow, wide)
    received = passes * (weights - stay + ends / 2) / tensor * (split - 1) / split
    gathered = received / where.inbound(split * tensor)
    traffic = estimates.activation_traffic(where, base, rows, seq, tensor, saved, sends=stay > 0)
    moved = _weight_traffic(base, config, split, passes, weights - stay * (1 - 1 / split) + ends)
    hbm = (moved / tensor + traffic) / where.chip.bandwidth
    replicas = layout.data * split
    gradients = 2 * sum(trained) / where.inbound(replicas) if replicas > 1 else 0.0
    share = estimates.hidden_share(where, base)
    exposed = (1 - share) * gathered
    sums = estimates.summed_bytes(base, tokens, tensor, saves, wide) / where.inbound(tensor)
    exposed += sums + sent / where.inbound(fsdp)
    exposed += received_keys / tensor / where.inbound(context)
    seconds = times * (max(products, hbm, share * gathered) + exposed) + gradients
    shared = 2 * trained.tables + copied / (split * tensor) if split > 1 else 0.0
    working = estimates.working_bytes(
        where, base, tokens, (split, tensor), wide=wide, offloads=offloads, recomputed=recomputed
    )
    useful = estimates.useful_flops(base, spec, micro, seq) / where.size
    rollout, cache = 0.0, 0.0
    if config.rl.rewards:
        held = (weights + ends) / tensor
        gathering = held * (split - 1) / split / where.inbound(split * tensor)
        shares = {"shards": layout.data * fsdp, "tensor": tensor}
        rollout, cache = rollout_estimate(config, base, where, **shares, weights=held, gathering=gathering)
    activations = saved_bytes * min(on_chip, base.n_layers)
    return replace(
        layout,
        weights=(weights + ends) / (split * tensor),
        state=runs * estimates.state_bytes(trained, split, tensor),
        activations=activations,
        working=max(working + shared + live_keys / tensor, cache - activations),
        host=host,
        gathers=times * gathered,
        transfers=2 * times * out,
        seconds=seconds + rollout,
        rollout=rollout,
        mfu=times * useful / (where.chip.flops * seconds) * max(layout.run, 1),
    )


def _widths(config: RunConfig) -> tuple[float, float]:
    """Returns the bytes of a number, and of a weight of the base's projections."""
    wide = float(config.compute.itemsize)
    return wide, estimates.WIDTHS.get(config.compute.quantize, wide)


def _weight_bytes(base: ModelConfig, config: RunConfig, narrow: float, wide: float) -> tuple[float, float]:
    """Returns `weight_bytes` of a base, quantized or not."""
    quantize = config.compute.quantize
    return estimates.weight_bytes(base, narrow, wide, "" if quantize == "none" else kernels(quantize))


def _weight_traffic(base: ModelConfig, config: RunConfig, split: int, passes: float, held: float) -> float:
    """Returns the HBM traffic of a step for weights, of which a chip holds or gathers ``held`` bytes."""
    reads = estimates.weight_passes(base, split, passes)
    # Quantized kernels are written as floats in every pass, and read by the matmuls.
    return reads * held + (passes + reads) * _expanded_bytes(base, config)


def _expanded_bytes(base: ModelConfig, config: RunConfig) -> float:
    """Returns the bytes of all quantized kernels as floats."""
    wide, narrow = _widths(config)
    if narrow == wide:
        return 0.0
    floats, codes = (_weight_bytes(base, config, width, wide)[0] for width in (wide, narrow))
    return wide * (floats - codes) * base.n_layers / (wide - narrow)


def _matmul_seconds(where: Topology, once: float, executed: float, transfer: float) -> float:
    """Returns the time of a chip's matmuls with the transfers that they overlap.

    Args:
      where: the machine.
      once: flops without recomputation.
      executed: flops with recomputation.
      transfer: seconds in which the activations move to the host; they return in the same time.
    """
    matrix = executed / where.chip.matrix_rate
    # The GPU compiler overlaps only a sixth of the transfers with matmuls.
    if where.chip.platform == "gpu":
        return matrix + 2 * transfer
    # Activations are offloaded during matmuls of the forward pass, which are half of all matmuls
    # without recomputation.
    ahead = matrix * once / executed / 2
    return max(ahead, transfer) + max(matrix - ahead, transfer)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ---------------------------------------------------------------- sweeps


def fitting_sweep(config: RunConfig, base: ModelConfig, where: Topology, runs: int) -> list[Layout]:
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
            expected="groups of devices that can share the rows and heads of a run, or one device a run",
            found=config.mesh.run,
        )
    fits = usable_layouts(layouts, where)
    if not fits:
        smallest = min(layouts, key=lambda layout: layout.memory)
        raise NaloraError(
            "--sweep",
            expected=f"runs that fit in {usable_memory(where) / 1e9:.2f} GB a chip",
            found=f"{smallest.memory / 1e9:.2f} GB ({smallest.axes})",
            remedy="use shorter rows, --compute.quantize int8, or fewer runs on a device (--mesh.runs-per-device)",
        )
    return fits


def sweep_candidates(config: RunConfig, base: ModelConfig, where: Topology, runs: int) -> Iterator[Layout]:
    """Yields layouts from the smallest group of devices to all, each with fewer and fewer runs.

    Within a group, "fsdp" splits as many rows as there are, and "tensor" takes the other devices.
    Mixtures of experts need one device a run, or all devices for one. A run stays within a slice.
    """
    decoder, spec = estimates.decoder_alone(config, base)
    rows, size = config.train.batch_size // config.train.accumulate, where.size
    groups = [size // n for n in range(1, size + 1) if size % n == 0 and size // n <= runs]
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
                    1, fsdp, tensor, remat, config.compute.experts, run=run, runs_per_device=shared
                )
                layout = estimate(layout, config, decoder, spec, where)
                yield replace(layout, seconds=layout.seconds * math.ceil(runs / layout.together))
            if config.mesh.runs_per_device:
                break
            shared //= 2
