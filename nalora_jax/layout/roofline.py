"""Upper bounds of the speed of a compiled program from the times of each chip's resources.

The time of a step is the longest of the matrix unit's time (at 75% of its peak), HBM's time, and
the times of the interconnect and of the host link for transfers that the schedule overlaps with
matmuls. The time of all other collectives and transfers is added. The bound is computed from the
program and the data sheet, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from nalora_jax.config import RunConfig
from nalora_jax.layout.collectives import Collective
from nalora_jax.layout.figures import Figures
from nalora_jax.layout.machines import Topology
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes, stacks
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops import split_triton
from nalora_jax.ops.splash_attention import block_sizes, computed_pairs
from nalora_jax.ops.triton_attention import computed_pairs as triton_pairs

# Matmuls of attention kernels on GPUs, in one layer. The backward pass recomputes the scores;
# Triton's does so twice. cuDNN's tiles are assumed to be as large as Triton's; it skips blocks by
# causality, not by window.
_ON_GPUS = {
    "mha_forward": 2,
    "mha_backward": 7,
    "cudnn_attention_forward": 2,
    "cudnn_attention_backward": 5,
    **split_triton.PRODUCTS,
}


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
        return max(self.matrix, self.hbm, self.hidden, self.host) + self.exposed + self.host_exposed

    @property
    def mfu(self) -> float:
        """The implied model flops utilization: useful flops over the chip's peak in that time."""
        return self.useful_flops / (self.peak * self.seconds)


def attention_flops(base: ModelConfig, seq: int) -> float:
    """Returns the forward flops of scores and weighted sums for one row, over all layers.

    Only pairs within causality and windows count. The mixers of layers without attention count with
    all their flops outside of projections.
    """
    total = 0.0
    for config in uniform(base):
        if config.mixer is not None and not config.mixer.attends:
            total += config.n_layers * config.mixer.flops(config, seq)
            continue
        for window in config.layer_windows:
            span = min(window, seq)
            pairs = seq * span - span * (span - 1) / 2
            total += 4.0 * pairs * config.n_heads * config.head_dim
    return total


def mixer_flops(base: ModelConfig, seq: int) -> float:
    """Returns the part of `attention_flops` in layers without attention."""
    return sum(c.n_layers * c.mixer.flops(c, seq) for c in uniform(base) if c.mixer is not None)


def uniform(base: ModelConfig) -> list[ModelConfig]:
    """Returns the uniform config of every stack."""
    return [stack.config for stack in stacks(base)]


def splash_flops(base: ModelConfig, seq: int, *, forward: float, backward: float = 1.0) -> float:
    """Returns the flops of splash attention's kernels for one row, over all layers.

    All computed blocks count.

    A forward pass takes 2 matmuls; a backward pass takes 5 with one fused kernel and 7 with two
    kernels.
    """
    total = 0.0
    for config in _attending(base):
        for window in config.layer_windows:
            fused = "use_fused_bwd_kernel" in block_sizes(seq, window, config.head_dim)
            products = 2 * forward + (5 if fused else 7) * backward
            pairs = computed_pairs(seq, window, config.head_dim)
            total += products * 2.0 * pairs * config.n_heads * config.head_dim
    return total


def causal_flops(base: ModelConfig, seq: int, products: float) -> float:
    """Returns the flops of ``products`` attention matmuls for one row on GPUs, over all layers.

    Kernels compute all blocks of 128 queries and keys that causality touches, for any window.
    """
    widths = sum(config.n_layers * config.n_heads * config.head_dim for config in _attending(base))
    return products * 2.0 * triton_pairs(seq) * widths


def _attending(base: ModelConfig) -> list[ModelConfig]:
    return [config for config in uniform(base) if config.attends]


def active_parameters(base: ModelConfig) -> float:
    """Returns the weights that multiply every token: with the head, without the embedding."""
    total = float(base.d_model * base.vocab_size)
    for config in uniform(base):
        layer = sum(active_size(config, shape) for shape in projection_shapes(config).values())
        total += config.n_layers * (layer + config.d_model * config.n_experts)
    return total


def active_size(config: ModelConfig, shape: tuple[int, ...]) -> float:
    """Returns the weights of a projection that multiply one token.

    ``shape`` comes from `projection_shapes`: experts have a leading axis, and a token reaches
    ``config.experts_per_token`` of them.
    """
    chosen = config.experts_per_token if len(shape) == 3 else 1
    return float(shape[-1] * shape[-2] * chosen)


def useful_flops(base: ModelConfig, spec: AdapterSpec, rows: float, seq: int) -> float:
    """Returns the useful flops of a step of ``rows`` rows.

    They are 4 per frozen weight and token (the forward pass and the gradient of the input; a frozen
    weight has no gradient), 6 per adapter weight and token, attention, and its gradient (twice the
    forward pass).
    """
    shapes = projection_shapes(base)
    adapters = sum(sum(shapes[path][-2:]) * rank for path, target in spec.targets for rank in target.ranks)
    tokens = rows * seq
    return tokens * (4 * active_parameters(base) + 6 * adapters) + 3 * rows * attention_flops(base, seq)


def kernel_flops(
    program: Figures, base: ModelConfig, rows: float, seq: int, n_tensor: int, accumulate: int = 1
) -> float:
    """Returns the flops of attention kernels in a step, which XLA does not count."""
    calls = program.custom_calls
    if any(name in calls for name in _ON_GPUS):
        layers = sum(config.n_layers for config in _attending(base))
        products = sum(count * calls.get(name, 0.0) for name, count in _ON_GPUS.items()) / layers
        return rows / accumulate * causal_flops(base, seq, products) / n_tensor
    # Every window is a branch, and each layer runs one of them.
    layers = accumulate * sum(
        len(set(config.layer_windows)) * config.n_layers for config in _attending(base)
    )
    runs = {
        direction: sum(
            times for name, times in calls.items() if "splash" in name and f"_{direction}" in name
        )
        for direction in ("fwd", "dkv")
    }
    if not runs["fwd"]:
        return 0.0
    each = splash_flops(base, seq, forward=runs["fwd"] / layers, backward=runs["dkv"] / layers)
    return rows * each / n_tensor


def roofline(
    program: Figures,
    where: Topology,
    base: ModelConfig,
    spec: AdapterSpec,
    rows: int,
    seq: int,
    n_tensor: int = 1,
    accumulate: int = 1,
) -> Roofline:
    """Returns the bound of a compiled training step of ``rows`` rows over all chips.

    The step has ``accumulate`` micro-batches.
    """
    chip, share = where.chip, rows / where.size * n_tensor
    flops = program.flops + kernel_flops(program, base, share, seq, n_tensor, accumulate)
    times = [(c.total / _inbound(c, where), c.overlapped) for c in program.collectives]
    hidden, exposed = (
        sum(seconds for seconds, behind in times if behind == which) for which in (True, False)
    )
    links = [(transfer.total / chip.host_link, transfer.overlapped) for transfer in program.transfers]
    host, host_exposed = (
        sum(seconds for seconds, behind in links if behind == which) for which in (True, False)
    )
    return Roofline(
        flops / chip.matrix_rate,
        program.memory_bytes / chip.bandwidth,
        hidden,
        exposed,
        useful_flops(base, spec, rows, seq) / where.size,
        chip.flops,
        host,
        host_exposed,
    )


def bound_of(
    figures: Figures, where: Topology, base: ModelConfig, spec: AdapterSpec, config: RunConfig, seq: int
) -> Roofline:
    """Returns the roofline of a step."""
    train = config.train
    return roofline(figures, where, base, spec, train.batch_size, seq, config.mesh.tensor, train.accumulate)


def _inbound(collective: Collective, where: Topology) -> float:
    """Returns the bytes per second that reach a chip in a collective."""
    if collective.between_slices:
        return where.chip.network
    return where.inbound(collective.devices)
