"""Layouts, and estimates of their bytes, flops and seconds on one chip.

The constants are fitted to compiled programs (docs/pods.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from nalora_jax.common.devices import AXES, DATA, FSDP, RUN_AXIS, TENSOR
from nalora_jax.config import ComputeConfig, RunConfig
from nalora_jax.kinds.record import run_kind
from nalora_jax.mesh import distributed
from nalora_jax.mesh.distributed import program_shape
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.experts import SLACK, block_rows
from nalora_jax.models.remat import OFFLOAD, position_policy
from nalora_jax.models.stacks import (
    groups,
    param_shapes,
    parts,
    projection_shapes,
    stacks,
)
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.attention_tpu import (
    REGISTER_LANES,
    SPLASH,
    block_sizes,
    computed_pairs,
    takes,
)
from nalora_jax.ops.losses import rows_of_chunk
from nalora_jax.ops.quantize import kernels
from nalora_jax.planner.machines import Topology

_GATHERED = (
    3  # kernels that are gathered at once, each as large as the largest of a layer
)
# Kernels of experts in memory at once, gathered or not: of two layers, with copies for the backward
# pass. v5e has more.
_OF_EXPERTS = 8
_OF_EXPERTS_ON_V5E = 10
# Bytes of HBM traffic for each number of an expert's row, d_model or d_ff wide.
_READ_NARROW = 92
_READ_WIDE = 120
# Times that the bytes of a mixture's weights are read or written in a step: by grouped matmuls, as
# transposed copies for the backward pass and, if they are gathered, by the gathers.
_WEIGHTS_OF_EXPERTS = 4.5
_GATHERED_WEIGHTS_OF_EXPERTS = 6.5
# Share of gathered experts that overlaps with matmuls (from compiled programs of Mixtral-8x7B); on
# GPUs and on v5p it is faster to split experts over ``tensor``.
_HIDDEN_EXPERTS = {"v5e": 0.65, "v6e": 0.85}
# Bytes of HBM traffic for each forward flop of a delta rule and its layer's elementwise functions:
# GPUs write the arrays of its loop over chunks, TPUs keep them in VMEM (from compiled steps of
# Qwen3.5).
_MIXER_BYTES = {"gpu": 1.3, "tpu": 0.06}
# Times that rows are sent to experts or back: forward, recomputed forward, backward.
_SENT = 6
# Times that keys and values of split rows, or their gradients, are exchanged in a step.
_KEYS_SENT = 3
# Bytes of a quantized weight, scales included.
WIDTHS = {"int8": 1.0, "nf4": 0.55, "mxfp4": 0.53125}
# Arrays as wide as queries, and as keys, that a layer saves, by kernel of attention.
_SAVED_HEADS = {
    SPLASH: (2, 2),
    attention_gpu.CUDNN: (2, 2),
    attention_gpu.SPLIT_TRITON: (2, 2),
    attention_gpu.TRITON: (1, 2),
}
# Float32 arrays as wide as the FFN that are live within a layer.
_WIDE = 4
_WIDE_ON_TPUS = 3
# Periods of layers whose activations are on the chip while all others are in the host's memory.
_UNDER_WAY = 2


@dataclass(frozen=True)
class Layout:
    """A mesh with a rematerialization policy, and its estimated resources on each chip.

    Sizes and policies are those of `nalora_jax.config.MeshConfig` and
    `nalora_jax.config.ComputeConfig`.
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
    # Duration of a step, by roofline, with its part of a rollout; of a sweep: of a step of all its
    # runs.
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
        names = (DATA, FSDP, TENSOR, RUN_AXIS, "runs_per_device")
        mesh = replace(config.mesh, **{name: getattr(self, name) for name in names})
        if self.context > 1:
            mesh = replace(mesh, context=self.context)
        compute = replace(
            config.compute, remat=cast(Any, self.remat), experts=cast(Any, self.experts)
        )
        return replace(config, mesh=mesh, compute=compute)

    def record(self) -> dict[str, Any]:
        """Returns the fields for JSON, without the axes of sweeps."""
        return {
            name: value
            for name, value in asdict(self).items()
            if not name.startswith("run")
        }

    @property
    def axes(self) -> str:
        """The sizes of the axes as text."""
        if self.run and self.runs_per_device:
            sizes = f"run {self.run} x fsdp {self.fsdp} x tensor {self.tensor}"
            return f"{sizes}, {self.runs_per_device} a group"
        return distributed.describe_axes({name: getattr(self, name) for name in AXES})

    @property
    def short(self) -> str:
        """The layout without its estimates."""
        text = f"{self.axes}, remat {self.remat}"
        if self.experts == "send":
            text += ", rows sent to experts"
        return text

    def __str__(self) -> str:
        """Returns one line for the log and for `nalora plan`."""
        if self.host:
            of_host = f" and {self.host / 1e9:.1f} of the host's"
        else:
            of_host = ""
        if self.rollout:
            sampling = f", {self.rollout:.3g} of them for its rollout"
        else:
            sampling = ""
        return (
            f"{self.short}: {self.memory / 1e9:.1f} GB a chip{of_host}, "
            f"at least {self.seconds:.3g} s a step{sampling} (MFU at most {self.mfu:.0%})"
        )


# ---------------------------------------------------------------- flops of a model


def decoder_alone(
    config: RunConfig, base: ModelConfig
) -> tuple[ModelConfig, AdapterSpec]:
    """Returns a model and its adapters without the image tower and projector, which estimates
    ignore as small."""
    spec = adapter_spec(config, base)
    targets = tuple(
        (path, target) for path, target in spec.targets if path.startswith("layers/")
    )
    return replace(base, vision=None), replace(spec, targets=targets)


def uniform(base: ModelConfig) -> list[ModelConfig]:
    """Returns the uniform config of every stack."""
    return [stack.config for stack in stacks(base)]


def attention_stacks(base: ModelConfig) -> list[ModelConfig]:
    """Returns the uniform config of every stack with attention."""
    return [config for config in uniform(base) if config.attends]


def attention_flops(base: ModelConfig, seq: int) -> float:
    """Returns the forward flops of scores and weighted sums for one row, over all layers.

    The mixers of layers without attention count with all their flops outside of projections.
    """
    return sum(parts(config)[0].flops(config, seq) for config in uniform(base))


def mixer_flops(base: ModelConfig, seq: int) -> float:
    """Returns the part of `attention_flops` in layers without attention."""
    return sum(parts(c)[0].flops(c, seq) for c in uniform(base) if not c.attends)


def splash_flops(
    base: ModelConfig, seq: int, *, forward: float, backward: float = 1.0
) -> float:
    """Returns the flops of splash attention's kernels for one row, over all layers.

    All computed blocks count. A forward pass takes 2 matmuls; a backward pass takes 5 with one
    fused kernel and 7 with two kernels.
    """
    total = 0.0
    for config in attention_stacks(base):
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
    widths = sum(
        config.n_layers * config.n_heads * config.head_dim
        for config in attention_stacks(base)
    )
    return products * 2.0 * attention_gpu.triton_pairs(seq) * widths


def active_parameters(base: ModelConfig) -> float:
    """Returns the weights that multiply every token: with the head, without the embedding."""
    total = float(base.d_model * base.vocab_size)
    for config in uniform(base):
        layer = sum(
            active_size(config, shape) for shape in projection_shapes(config).values()
        )
        total += config.n_layers * (layer + config.d_model * config.n_experts)
    return total


def active_size(config: ModelConfig, shape: tuple[int, ...]) -> float:
    """Returns the weights of a projection that multiply one token.

    ``shape`` comes from `projection_shapes`: experts have a leading axis, and a token reaches
    ``config.experts_per_token`` of them.
    """
    size = shape[-1] * shape[-2]
    if len(shape) == 3:
        size *= config.experts_per_token
    return float(size)


def useful_flops(base: ModelConfig, spec: AdapterSpec, rows: float, seq: int) -> float:
    """Returns the useful flops of a step of ``rows`` rows.

    They are 4 per frozen weight and token (the forward pass and the gradient of the input; a frozen
    weight has no gradient), 6 per adapter weight, or weight that is trained itself, and token,
    attention, and its gradient (twice the forward pass).
    """
    shapes = projection_shapes(base)
    adapters = sum(
        sum(shapes[path][-2:]) * sum(target.ranks) for path, target in spec.targets
    )
    of_token = 4 * active_parameters(base) + 6 * adapters
    of_token += 2 * tuned_parameters(base, spec, of_matmuls=True)
    return rows * seq * of_token + 3 * rows * attention_flops(base, seq)


def tuned_parameters(
    base: ModelConfig, spec: AdapterSpec, *, of_matmuls: bool = False
) -> int:
    """Returns the weights of the base that are trained themselves, or those that matmuls read."""
    shapes = param_shapes(base)
    total = 0
    for path, _ in spec.tuned:
        is_head = path == "embed/embedding" and base.tie_embeddings
        if path.endswith("kernel") or is_head or not of_matmuls:
            total += math.prod(shapes[path])
    return total


def _expert_weights(config: ModelConfig) -> int:
    """Returns the weights of the experts in a layer of a stack."""
    return sum(
        math.prod(shape)
        for shape in projection_shapes(config).values()
        if len(shape) == 3
    )


# ---------------------------------------------------------------- arrays of a layer


def attention_kernel(
    where: Topology, base: ModelConfig, rows: float, seq: int, context: int = 1
) -> str:
    """Returns attention's implementation for rows of a shard; "" for the plain function."""
    if where.chip.platform == "tpu":
        if takes(seq, base.head_dim):
            return SPLASH
        return ""
    if context > 1:
        if base.head_dim in attention_gpu.HEAD_DIMS:
            return attention_gpu.SPLIT_TRITON
        return ""
    by_cudnn = attention_gpu.cudnn_takes(seq, base.head_dim, base.attn_softcap)
    if by_cudnn and attention_gpu.fits_as_bias(rows, seq):
        return attention_gpu.CUDNN
    by_triton = attention_gpu.triton_takes(
        seq, base.head_dim, base.layer_windows, base.attn_softcap
    )
    if by_triton and not base.attn_sinks:
        return attention_gpu.TRITON
    return ""


def quantized_widths(base: ModelConfig, compute: ComputeConfig) -> dict[str, float]:
    """Returns the bytes of a weight, scales included, of each projection that is stored quantized,
    by path of its kernel: by ``--compute.quantize``, or otherwise as in the base's files."""
    if compute.quantize == "none":
        return {path: bits / 8 for path, bits in base.stored_bits}
    projections = {f"{path}/kernel" for path in projection_shapes(base)}
    pattern = re.compile(kernels(compute.quantize))
    return dict.fromkeys(filter(pattern.search, projections), WIDTHS[compute.quantize])


def weight_bytes(
    base: ModelConfig, compute: ComputeConfig
) -> tuple[float, float, float]:
    """Returns bytes of a base on one device: of its layers, outside of them, of quantized kernels
    as floats."""
    wide = float(compute.itemsize)
    widths = quantized_widths(base, compute)
    layers = ends = expanded = 0.0
    for path, shape in param_shapes(base).items():
        size = wide * math.prod(shape)
        if path in widths:
            expanded += size
            size = widths[path] * math.prod(shape)
        if path.startswith("layers/"):
            layers += size
        else:
            ends += size
    return layers, ends, expanded


def _policies(base: ModelConfig, remat: str) -> Iterator[tuple[ModelConfig, str]]:
    """Yields the uniform config and the rematerialization policy of every stack."""
    for group in groups(base):
        for position, stack in enumerate(group):
            yield stack.config, position_policy(remat, position, len(group))


def values_for_backward(
    base: ModelConfig, saves: str, tensor: int, kernel: str
) -> tuple[float, float]:
    """Returns numbers a token: saved by all layers, and recomputed for one layer at a time.

    If only inputs are saved, a backward pass recomputes the results that "attention" saves. They
    are live while the FFN's gradients are computed.
    """
    saved = sum(
        c.n_layers * saved_values(c, policy, tensor, kernel)
        for c, policy in _policies(base, saves)
    )
    if saves != "full":
        return saved, 0.0
    return saved, max(
        saved_values(c, "attention", tensor, kernel) - c.d_model for c in uniform(base)
    )


def saved_values(base: ModelConfig, remat: str, tensor: int, kernel: str) -> float:
    """Returns the values per token and layer that are saved for the backward pass."""
    if base.mixer is not None and not base.mixer.attends:
        heads = base.mixer.saved(base) / tensor
    else:
        # With splash attention and cuDNN the result is saved with the projections; the plain
        # function also saves its inputs.
        queries, keys = _SAVED_HEADS.get(kernel, (3, 4))
        # Query and key norms save their inputs; their results are saved as well, except by kernels.
        normed = bool(base.qk_norm) and kernel in ("", attention_gpu.SPLIT_TRITON)
        # A TPU pads narrow heads to whole tiles, except of values, whose tokens are the last axis.
        if kernel == SPLASH:
            padded = max(base.head_dim, REGISTER_LANES)
        else:
            padded = base.head_dim
        of_queries = (queries + normed + base.attn_gate) * base.n_heads * padded
        heads = (
            of_queries
            + base.n_kv_heads * ((keys - 1 + normed) * padded + base.head_dim)
        ) / tensor
        heads += parts(base)[0].saved(base)  # of latents, which devices do not split
    # The layer's input and the FFN's; or the results of both parts, if norms follow them.
    residuals = (2 + base.post_norm) * base.d_model
    wide = (1 + base.gated) * base.d_ff * max(base.experts_per_token, 1) / tensor
    if base.ffn is not None:
        wide = base.ffn.saved(base) / tensor
    return {
        "full": base.d_model,
        "attention": residuals + heads,
        "dots": residuals + heads + wide,
        "none": 6 * base.d_model + 3 * heads + 4 * wide,
    }[remat]


def _count_recomputed(config: ModelConfig, remat: str) -> float:
    """Returns the weights of one layer that a token meets again in the backward pass."""
    sizes = {
        path: active_size(config, shape)
        for path, shape in projection_shapes(config).items()
    }

    def of(*names: str) -> float:
        return sum(size for path, size in sizes.items() if path.endswith(names))

    # A norm after the FFN reads its result in the backward pass.
    every = sum(sizes.values())
    if not config.post_norm:
        every -= of("/down_proj", "/out_proj")
    recomputed = {"full": every, "attention": of("/gate_proj", "/up_proj", "/in_proj")}
    return recomputed.get(remat, 0.0)


def summed_bytes(
    base: ModelConfig, tokens: float, tensor: int, remat: str, wide: float
) -> float:
    """Returns the bytes that reach a chip in the sums over ``tensor``; 0 if it is 1.

    Each layer has two sums in the forward and two in the backward pass, of ``[tokens, d_model]``;
    recomputed layers repeat their sums.
    """
    sums = 4
    if remat == "full":
        sums = 6
    return (
        sums * base.n_layers * 2 * (tensor - 1) / tensor * tokens * base.d_model * wide
    )


# ---------------------------------------------------------------- a chip's share of a step


def estimate(
    layout: Layout,
    config: RunConfig,
    base: ModelConfig,
    spec: AdapterSpec,
    where: Topology,
) -> Layout:
    """Returns ``layout`` with its memory and time.

    Args:
      layout: sizes and policies.
      config: a run, or a run of a sweep, whose rows have ``data.max_length`` tokens.
      base: architecture of the base model.
      spec: the adapters.
      where: the machine.
    """
    return _Share(layout, config, base, spec, where).estimate()


class _Share:
    """A chip's share of the micro-batches of a step."""

    def __init__(
        self,
        layout: Layout,
        config: RunConfig,
        base: ModelConfig,
        spec: AdapterSpec,
        where: Topology,
    ) -> None:
        self.layout = layout
        self.config = config
        self.base = base
        self.spec = spec
        self.where = where
        self.on_tpu = where.chip.platform == "tpu"
        # split: of the weights
        self.tensor = layout.tensor
        self.split = layout.fsdp * layout.context
        self.runs = max(layout.runs_per_device, 1)
        self.seq = config.data.max_length
        self.micro = self.runs * config.train.batch_size // config.train.accumulate
        # a chip may have part of one
        self.rows = self.micro / (layout.data * self.split)
        self.tokens = self.rows * self.seq
        self.wide = float(config.compute.itemsize)
        widths = quantized_widths(base, config.compute).values()
        self.narrow = max(widths, default=self.wide)
        self.weights, self.ends, self.expanded = weight_bytes(base, config.compute)
        self.kernel = attention_kernel(where, base, self.rows, self.seq, layout.context)
        self.saves, self.offloads = (
            layout.remat.removesuffix(OFFLOAD),
            layout.remat.endswith(OFFLOAD),
        )
        self.sends = layout.experts == "send" and layout.fsdp > 1

    def estimate(self) -> Layout:
        """Returns the layout with its memory and time."""
        layout = self.layout
        base = self.base
        where = self.where
        tensor = self.tensor
        split = self.split
        chip = where.chip
        times = self.config.train.accumulate
        values, again = values_for_backward(base, self.saves, tensor, self.kernel)
        saved = self.wide * self.tokens * values
        recomputed = self.wide * self.tokens * again
        host = 0.0
        activations = saved
        if self.offloads:
            # layers whose activations are on the chip
            on_chip = _UNDER_WAY * max(map(len, groups(base)))
            host = saved
            activations = saved * min(on_chip / base.n_layers, 1)
        out = host / chip.host_link
        passes = 2.0
        if self.saves == "full":
            passes = 2.3
        stay, sent = self._rows_for_experts()
        received = (
            passes
            * (self.weights - stay + self.ends / 2)
            / tensor
            * (split - 1)
            / split
        )
        gathered = received / where.inbound(split * tensor)
        moved = self._weight_traffic(
            passes, self.weights - stay * (1 - 1 / split) + self.ends
        )
        hbm = (moved / tensor + self._activation_traffic(saved)) / chip.bandwidth
        hidden = 1.0
        if base.n_experts:
            hidden = _HIDDEN_EXPERTS.get(where.kind, 0.0)
        exposed = (1 - hidden) * gathered
        sums = summed_bytes(
            base, self.tokens, tensor, self.saves, self.wide
        ) / where.inbound(tensor)
        exposed += sums + sent / where.inbound(layout.fsdp)
        live_keys, received_keys = self._gathered_keys()
        exposed += received_keys / tensor / where.inbound(layout.context)
        dense, of_experts, tables = self._trained_bytes()
        replicas = layout.data * split
        tuned = tuned_parameters(base, self.spec)
        # in float32; its gradient is summed in parts, an adapter's on every device
        tuned_bytes = 4.0 * tuned / tensor
        gradients = 0.0
        if replicas > 1:
            summed = 2 * (dense + of_experts + tables) + tuned_bytes
            gradients = summed / where.inbound(replicas)
        seconds = (
            times * (max(self._matmul_seconds(out), hbm, hidden * gathered) + exposed)
            + gradients
        )
        working = self._working_bytes(recomputed) + live_keys / tensor
        working += tuned_bytes / split
        if split > 1:
            working += 2 * tables + self._copied_weights() / (split * tensor)
        useful = useful_flops(base, self.spec, self.micro, self.seq) / where.size
        if run_kind(self.config).draws_samples(self.config):
            rollout, cache = self._rollout()
        else:
            rollout, cache = (0.0, 0.0)
        # Parameters, gradients and two moments. A or B of a dense adapter is split over ``split``
        # devices; adapters of experts and tables are split completely. A step gathers the tables
        # and their gradients.
        adapters = dense / max(1, split) ** 0.5 + of_experts / split
        return replace(
            layout,
            weights=(self.weights + self.ends - self.wide * tuned) / (split * tensor),
            state=self.runs
            * (4 * (adapters / tensor + tables / split) + 3 * tuned_bytes / split),
            activations=activations,
            working=max(working, cache - activations),
            host=host,
            gathers=times * gathered,
            transfers=2 * times * out,
            seconds=seconds + rollout,
            rollout=rollout,
            mfu=times * useful / (chip.flops * seconds) * max(layout.run, 1),
        )

    def _trained_bytes(self) -> tuple[float, float, float]:
        """Returns bytes in float32 of adapters of projections and of experts, and of trained
        tables."""
        base = self.base
        spec = self.spec
        shapes = projection_shapes(self.base)
        adapters = {False: 0.0, True: 0.0}  # by experts
        for path, target in spec.targets:
            *lead, d_in, d_out = shapes[path]
            magnitudes = d_out * len(target.ranks) if spec.dora else 0
            adapters[bool(lead)] += (
                4.0
                * math.prod(lead)
                * ((d_in + d_out) * sum(target.ranks) + magnitudes)
            )
        tables = 4.0 * base.d_model * base.vocab_size * len(spec.saved)
        # an axis that does not divide their rows is dropped
        if base.vocab_size % self.tensor == 0:
            tables /= self.tensor
        return adapters[False], adapters[True], tables

    def _matmul_seconds(self, transfer: float) -> float:
        """Returns the time of a chip's matmuls with the transfers that they overlap.

        Activations move to the host in ``transfer`` seconds and return in the same time.
        """
        executed = self._executed_flops(self.saves) / self.tensor
        matrix = executed / self.where.chip.matrix_rate
        # The GPU compiler overlaps only a sixth of the transfers with matmuls.
        if not self.on_tpu:
            return matrix + 2 * transfer
        # Activations are offloaded during matmuls of the forward pass, which are half of all
        # matmuls without recomputation.
        ahead = matrix * self._executed_flops("dots") / self.tensor / executed / 2
        return max(ahead, transfer) + max(matrix - ahead, transfer)

    def _executed_flops(self, remat: str) -> float:
        """Returns the flops on the rows of one shard, recomputation included."""
        base = self.base
        rows = self.rows
        seq = self.seq
        tokens = self.tokens
        again = sum(
            c.n_layers * _count_recomputed(c, policy)
            for c, policy in _policies(base, remat)
        )
        flops = rows * attention_flops(base, seq)
        frozen = tokens * 4 * active_parameters(base)
        adapters = useful_flops(base, self.spec, rows, seq) - frozen - 3 * flops
        # Only "full" recomputes the forward pass of splash attention and cuDNN; every policy
        # recomputes it for the others. The backward pass takes five matmuls for the plain function
        # and cuDNN, seven for Triton, against two in the forward pass.
        passes = 1
        if remat == "full":
            passes = 2
        if self.kernel == SPLASH:
            attention = rows * (
                splash_flops(base, seq, forward=passes) + 4 * mixer_flops(base, seq)
            )
        elif self.kernel == attention_gpu.CUDNN:
            attention = rows * causal_flops(base, seq, 2 * passes + 5)
        elif self.kernel == attention_gpu.SPLIT_TRITON:
            attention = (passes + 3.5) * flops
        elif self.kernel == attention_gpu.TRITON:
            attention = 5.5 * flops
        else:
            attention = 4.5 * flops
        return tokens * (4 * active_parameters(base) + 2 * again) + adapters + attention

    def _rows_for_experts(self) -> tuple[float, float]:
        """Returns the bytes of experts that are not gathered, and of rows that reach a chip in a
        step.

        All rows are sent to their experts (`nalora_jax.models.moe`).
        """
        stay = 0.0
        sent = 0.0
        fsdp = self.layout.fsdp
        for config in uniform(self.base) if self.sends else ():
            stay += config.n_layers * _expert_weights(config) * self.narrow
            blocks = block_rows(int(self.tokens * config.experts_per_token), fsdp) * (
                fsdp - 1
            )
            sent += config.n_layers * _SENT * blocks * config.d_model * self.wide
        return stay, sent

    def _gathered_keys(self) -> tuple[float, float]:
        """Returns live and received bytes of a step for the keys and values of rows that chips
        share.

        Live are the keys and values of one layer's rows, and their gradients. They are gathered in
        both passes, and the gradients are summed. Of a window within a block only its halo is
        exchanged.
        """
        most = 0.0
        received = 0.0
        context = self.layout.context
        for config in attention_stacks(self.base) if context > 1 else ():
            each = (
                2
                * config.n_kv_heads
                * config.head_dim
                * self.rows
                * context
                * self.wide
            )
            most = max(most, 2 * each * self.seq)
            for window in config.layer_windows:
                near = window <= self.seq / (2 * context)
                exchanged = self.seq * (context - 1) / context
                if near:
                    exchanged = 2 * window
                received += _KEYS_SENT * each * exchanged
        return most, received

    def _weight_traffic(self, passes: float, held: float) -> float:
        """Returns the HBM traffic of a step for weights, of which a chip holds or gathers ``held``
        bytes."""
        reads = passes
        if self.base.n_experts:
            if self.split > 1:
                reads = _GATHERED_WEIGHTS_OF_EXPERTS
            else:
                reads = _WEIGHTS_OF_EXPERTS
        # Quantized kernels are written as floats in every pass, and read by the matmuls.
        return reads * held + (passes + reads) * self.expanded

    def _activation_traffic(self, saved: float) -> float:
        """Returns the HBM traffic of a step for activations; all layers save ``saved`` bytes."""
        base = self.base
        tensor = self.tensor
        per_flop = _MIXER_BYTES.get(self.where.chip.platform, 0.0)
        mixers = self.rows * mixer_flops(base, self.seq) * per_flop / tensor
        if not base.n_experts:
            return 8 * saved + mixers
        # Of rows sorted by expert (from two compiled mixtures).
        sorted_rows = sum(
            config.n_layers
            * self.tokens
            * config.experts_per_token
            * (_READ_NARROW * config.d_model + _READ_WIDE * config.d_ff / tensor)
            for config in uniform(base)
        )
        if self.sends:
            sorted_rows *= SLACK
        return sorted_rows + mixers

    def _copied_weights(self) -> float:
        """Returns the bytes of kernels that are copied at the start of a step, summed over devices.

        NCCL gathers along the first axis in memory: GPUs transpose experts, and kernels whose
        outputs fsdp splits. If ``context`` splits the experts too, XLA gathers them from a copy of
        all layers with the experts' axis first.
        """
        base = self.base
        total = 0.0
        late = ("/down_proj", "/o_proj")
        splits_experts = (
            self.layout.context > 1
            and base.n_experts
            and not base.n_experts % self.split
        )
        for config in uniform(base):
            for path, shape in projection_shapes(config).items():
                is_transposed = not self.on_tpu and (
                    path.endswith(late) or len(shape) == 3
                )
                copies = is_transposed + (len(shape) == 3 and splits_experts)
                total += copies * config.n_layers * math.prod(shape)
        return self.narrow * total

    def _working_bytes(self, recomputed: float) -> float:
        """Returns the peak of live bytes without saved activations; a layer has ``recomputed``
        bytes more.

        It occurs in one layer, or in the loss with its head.
        """
        base = self.base
        tokens = self.tokens
        layer = max(map(self._layer_bytes, uniform(base))) + recomputed
        if self.split > 1:
            table = base.d_model * base.vocab_size * self.wide / self.tensor
        else:
            table = 0.0
        head = (1 + self._head_copies()) * table
        rows = min(tokens, rows_of_chunk(base.vocab_size))
        loss = (
            2 * 4.0 * rows * base.vocab_size / self.tensor
            + 2 * tokens * base.d_model * 4.0
        )
        if self.on_tpu and not base.n_experts:
            return max(layer, head, table + loss)
        # If activations are offloaded, the head is gathered after the last layer has been computed.
        if self.offloads:
            return max(layer, head + loss)
        return head + max(layer, loss)

    def _layer_bytes(self, config: ModelConfig) -> float:
        """Returns the live bytes within a layer of a stack."""
        kernel = (
            max(map(math.prod, projection_shapes(config).values()))
            / self.tensor
            * self.wide
        )
        width = config.d_ff / self.tensor
        if not config.n_experts:
            arrays = _WIDE
            if self.on_tpu:
                arrays = _WIDE_ON_TPUS
            width *= max(config.experts_per_token, 1)
            live = arrays * 4.0 * self.tokens * width
            if self.split > 1:
                live += _GATHERED * kernel
            return live
        # Each expert has separate rows.
        width = max(width, config.d_model) * max(config.experts_per_token, 1)
        rows = _WIDE * 4.0 * self.tokens * width
        copies = _OF_EXPERTS_ON_V5E if self.where.kind == "v5e" else _OF_EXPERTS
        # With all copies of kernels, half of the rows are live; with all rows, few kernels.
        return max(copies * kernel + rows / 2, rows + _GATHERED * kernel)

    def _head_copies(self) -> float:
        """Returns the number of transposed or padded copies of the gathered head (docs/pods.md).

        A tied head is split along its rows' elements, and a part of an untied one may not consist
        of whole tiles of 16 rows.
        """
        base = self.base
        if not self.on_tpu:
            return 0.9 * base.tie_embeddings
        if self.where.kind == "v5e":
            return 0.9 * (base.tie_embeddings or not self.offloads)
        if base.tie_embeddings or base.d_model // self.split % 16:
            return 1.0
        return 0.0

    def _rollout(self) -> tuple[float, float]:
        """Returns the least seconds a step of rollouts without an early end, and a chip's bytes of
        keys and values."""
        rl = self.config.rl
        base = self.base
        where = self.where
        tensor = self.tensor
        prompts = self.config.train.batch_size // rl.samples
        shards = self.layout.data * self.layout.fsdp
        at_once, count, samples = program_shape(prompts, rl.samples, shards)
        rows = count // shards * samples
        # Numbers of a token in all layers.
        stored = sum(
            of.n_layers * parts(of)[0].state_values(of, tensor)
            for of in attention_stacks(base)
        )
        cache = rows * self.seq * stored * self.wide
        weights = (self.weights + self.ends) / tensor
        gathering = (
            weights * (self.split - 1) / self.split / where.inbound(self.split * tensor)
        )

        def seconds(tokens: float, read: float) -> float:
            flops = 2 * active_parameters(base) * tokens / tensor
            # Each layer sums the results of attention and of the FFN: two of the four sums of an
            # update.
            sums = (
                summed_bytes(base, tokens, tensor, "dots", self.wide)
                / 2
                / where.inbound(tensor)
            )
            hbm = (weights + read) / where.chip.bandwidth
            return max(flops / where.chip.matrix_rate, hbm) + gathering + sums

        longest = self.seq - rl.max_new_tokens
        program = seconds(count / shards * longest, 0.0) + rl.max_new_tokens * seconds(
            rows, cache
        )
        return -(-prompts // at_once) * program / rl.updates, cache
