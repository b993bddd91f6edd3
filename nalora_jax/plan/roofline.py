"""How fast a compiled program can be: the time that each of a chip's resources needs, and what waits for what.

A step takes the longest of the matrix unit's time (at 75% of its peak), HBM's time, and the times of the interconnect
and of the link to the host for what the schedule hides behind products; the time of all other collectives and
transfers comes on top. It is a bound from the program and the data sheet; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from nalora_jax.config import RunConfig
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig, projection_shapes
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.splash_attention import block_sizes, computed_pairs
from nalora_jax.ops.triton_attention import computed_pairs as triton_pairs
from nalora_jax.plan.accounting import Collective
from nalora_jax.plan.figures import Figures
from nalora_jax.plan.machines import Topology

# Products of attention's kernels on GPUs, in one layer. The backward pass computes the scores again, and Triton's does
# so twice. cuDNN's tiles are taken to be as large as Triton's; it knows causality and no windows.
_ON_GPUS = {"mha_forward": 2, "mha_backward": 7, "cudnn_attention_forward": 2, "cudnn_attention_backward": 5}


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on each chip, by resource."""

    matrix: float
    hbm: float
    hidden: float  # interconnect, behind products
    exposed: float  # interconnect, nothing else runs
    useful_flops: float  # a chip
    peak: float  # flops a second
    host: float = 0.0  # link to the host's memory, behind products
    host_exposed: float = 0.0  # the same, nothing else runs

    @property
    def seconds(self) -> float:
        """The step's time that all of them allow."""
        return max(self.matrix, self.hbm, self.hidden, self.host) + self.exposed + self.host_exposed

    @property
    def mfu(self) -> float:
        """Implied model flops utilisation: useful flops over what the chip's peak does in that time."""
        return self.useful_flops / (self.peak * self.seconds)


def attention_flops(base: ModelConfig, seq: int) -> float:
    """Flops of scores and weighted sums of all layers for one row, forward, of what causality and windows leave."""
    total = 0.0
    for window in base.layer_windows:
        seen = min(window, seq) if window < GLOBAL_WINDOW else seq
        pairs = seq * seen - seen * (seen - 1) / 2 if seen < seq else seq * (seq + 1) / 2
        total += 4.0 * pairs * base.n_heads * base.head_dim
    return total


def splash_flops(base: ModelConfig, seq: int, *, forward: float, backward: float = 1.0) -> float:
    """Flops of splash attention's kernels in all layers for one row, of all blocks that they compute.

    2 products in each forward pass; behind them 5 where one kernel makes all gradients, and 7 where two do.
    """
    total = 0.0
    for window in base.layer_windows:
        fused = "use_fused_bwd_kernel" in block_sizes(seq, window)
        products = 2 * forward + (5 if fused else 7) * backward
        total += products * 2.0 * computed_pairs(seq, window) * base.n_heads * base.head_dim
    return total


def causal_flops(base: ModelConfig, seq: int, products: float) -> float:
    """Flops of ``products`` of attention in one layer for one row, as kernels of GPUs compute them.

    All blocks of 128 queries and keys that causality touches, whatever the layer's window.
    """
    return products * 2.0 * triton_pairs(seq) * base.n_heads * base.head_dim


def active_parameters(base: ModelConfig) -> float:
    """Weights that multiply every token, the head included and the embedding not."""
    total = 0.0
    for path, shape in projection_shapes(base).items():
        size = float(shape[-1] * shape[-2])
        if base.n_experts and "/ffn/" in path:
            size *= base.experts_per_token
        total += base.n_layers * size
    return total + base.d_model * base.vocab_size + base.n_layers * base.d_model * base.n_experts


def useful_flops(base: ModelConfig, spec: AdapterSpec, rows: float, seq: int) -> float:
    """What a step has to do for ``rows`` rows.

    4 flops a frozen weight and token (forward, and the gradient of the input; a frozen weight has none of its own), 6
    an adapter's weight and token, attention and its gradient (twice the forward pass).
    """
    shapes = projection_shapes(base)
    adapters = sum(sum(shapes[path][-2:]) * rank for path, target in spec.targets for rank in target.ranks)
    tokens = rows * seq
    return tokens * (4 * active_parameters(base) + 6 * adapters) + 3 * rows * attention_flops(base, seq)


def kernel_flops(
    program: Figures, base: ModelConfig, rows: float, seq: int, n_tensor: int, accumulate: int = 1
) -> float:
    """Flops of attention's kernels in a step of ``rows`` rows, which XLA does not count."""
    calls = program.custom_calls
    if any(name in calls for name in _ON_GPUS):
        products = sum(count * calls.get(name, 0.0) for name, count in _ON_GPUS.items())
        return rows / accumulate * causal_flops(base, seq, products) / n_tensor
    # Every window is a branch, and each layer takes one of them.
    layers = len(set(base.layer_windows)) * base.n_layers * accumulate
    runs = {
        part: sum(times for name, times in calls.items() if "splash" in name and f"_{part}" in name)
        for part in ("fwd", "dkv")
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
    """The bound of a compiled training step of ``rows`` rows over all chips, in ``accumulate`` micro-batches."""
    chip, share = where.chip, rows / where.size * n_tensor
    flops = program.flops + kernel_flops(program, base, share, seq, n_tensor, accumulate)
    times = [(c.total / _inbound(c, where), c.overlapped) for c in program.collectives]
    hidden, exposed = (sum(seconds for seconds, behind in times if behind == which) for which in (True, False))
    links = [(one.total / chip.host_link, one.overlapped) for one in program.transfers]
    host, host_exposed = (sum(seconds for seconds, behind in links if behind == which) for which in (True, False))
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
    found: Figures, where: Topology, base: ModelConfig, spec: AdapterSpec, config: RunConfig, seq: int
) -> Roofline:
    """The roofline of a step."""
    train = config.train
    return roofline(found, where, base, spec, train.batch_size, seq, config.mesh.tensor, train.accumulate)


def _inbound(collective: Collective, where: Topology) -> float:
    """Bytes a second that reach a chip in a collective."""
    return where.chip.network if collective.between_slices else where.inbound(collective.devices)
