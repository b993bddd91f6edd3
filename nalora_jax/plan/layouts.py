"""The mesh and the rematerialization policy of a run: the fastest by roofline that fits.

A frozen base has no gradients and no optimizer state, so the best layout is not the one for
full training. A model of 16 GB may be replicated on chips of 32 GB, which then gather no weights. A
split model is gathered once in the forward and once in the backward pass, and the saved activations
determine how much is recomputed. Activations that do not fit on the chip may be stored in the
host's memory, if their transfers take no longer than the matmuls. The estimates here need no
compiler and take milliseconds; `nalora plan` compiles the chosen layout and shows how accurate they
are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nalora_jax import distributed
from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig, param_shapes, projection_shapes
from nalora_jax.models.remat import OFFLOAD
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.cudnn_attention import CUDNN, fits_as_bias
from nalora_jax.ops.cudnn_attention import takes as cudnn_takes
from nalora_jax.ops.quantize import kernels
from nalora_jax.ops.splash_attention import SPLASH, takes
from nalora_jax.ops.triton_attention import TRITON
from nalora_jax.ops.triton_attention import takes as triton_takes
from nalora_jax.plan.machines import Topology
from nalora_jax.plan.roofline import active_parameters, attention_flops, causal_flops, splash_flops, useful_flops

# Policies ordered by the amount that they save, most first; on the chip, then in the host's memory.
POLICIES = tuple(name + where for where in ("", OFFLOAD) for name in ("dots", "attention", "full"))
# With more, sums of activations cost more than gathers of weights on every machine of the table.
_MOST_TENSOR = 8
# Usable share of the memory, a margin for the error of the estimates (docs/pods.md).
_USABLE = {"tpu": 0.95, "gpu": 0.9}
_USABLE_OF_HOST = 0.5  # the rest is for processes that read data, for loading, and for the system
_UNDER_WAY = 2  # layers whose activations are on the chip while all others are in the host's memory
_LOGITS = 1 << 27  # floats of a chunk of the loss (`nalora_jax.ops.cross_entropy`)
_GATHERED = 3  # kernels that are gathered at once, each as large as the largest of a layer
# Kernels of experts in memory at once, gathered or not: of two layers, with copies for the backward
# pass. v5e has more.
_OF_EXPERTS, _OF_EXPERTS_ON_V5E = 8, 10
# Bytes of HBM traffic for each number of an expert's row, d_model or d_ff wide.
_READ_NARROW, _READ_WIDE = 130, 170
# Bytes of a quantized weight, scales included.
_WIDTHS = {"int8": 1.0, "nf4": 0.55, "mxfp4": 0.53125}
_WIDE = 4  # float32 arrays as wide as the FFN that are live within a layer


@dataclass(frozen=True)
class Layout:
    """A mesh with a rematerialization policy, and its estimated resources on each chip."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    weights: float  # bytes of the frozen base
    state: float  # bytes of adapters and optimizer
    activations: float  # bytes saved for the backward pass
    working: float  # bytes of gathered kernels, of one layer's arrays and of the loss
    host: float  # bytes saved for the backward pass in the host's memory
    # seconds per step to gather kernels, overlapped with matmuls if the compiler can
    gathers: float
    # seconds per step to offload activations and load them again, overlapped with matmuls
    transfers: float
    seconds: float  # duration of a step, by roofline
    mfu: float

    @property
    def memory(self) -> float:
        """The total bytes."""
        return self.weights + self.state + self.activations + self.working

    @property
    def mesh(self) -> tuple[int, int, int]:
        """The sizes of the axes."""
        return self.data, self.fsdp, self.tensor

    @property
    def short(self) -> str:
        """The layout without its estimates."""
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}, remat {self.remat}"

    def __str__(self) -> str:
        """Returns one line for the log and for `nalora plan`."""
        beside = f" and {self.host / 1e9:.1f} of the host's" if self.host else ""
        return (
            f"{self.short}: {self.memory / 1e9:.1f} GB a chip{beside}, "
            f"at least {self.seconds:.3g} s a step (MFU at most {self.mfu:.0%})"
        )


def choose(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> Layout:
    """Returns the layout with the best estimate; see `fitting`."""
    return preferred(fitting(config, base, spec, where, seq))


def fitting(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> list[Layout]:
    """Returns layouts that are estimated to fit and match the axes and policy of ``config``.

    Raises:
      NaloraError: no layout fits, or no mesh divides the batch.
    """
    found = list(candidates(config, base, spec, where, seq))
    if not found:
        micro = config.train.batch_size // config.train.accumulate
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch that {where.size} devices can share (a multiple of mesh axes data x fsdp)",
            found=micro,
            remedy=f"use a multiple of {where.size}, a smaller --train.accumulate, or a larger --mesh.tensor",
        )
    chip = where.chip
    hosted = [layout for layout in found if layout.host <= _USABLE_OF_HOST * chip.host_memory]
    usable = [layout for layout in hosted if layout.memory <= _USABLE.get(chip.platform, 0.9) * chip.memory]
    if not usable:
        smallest = min(hosted or found, key=lambda layout: layout.memory if hosted else layout.host)
        room = chip.memory if hosted else _USABLE_OF_HOST * chip.host_memory
        of = "a chip" if hosted else "of the host's memory for each chip"
        raise NaloraError(
            f"{where.name}",
            expected=f"{base.model_type} with {seq} tokens a row to fit in {room / 1e9:.0f} GB {of}",
            found=f"{(smallest.memory if hosted else smallest.host) / 1e9:.0f} GB at the least ({smallest})",
            remedy="use more chips, fewer rows a device (--train.accumulate), shorter rows, or --compute.quantize int8",
        )
    return usable


def preferred(layouts: Sequence[Layout], seconds: Callable[[Layout], float] = lambda layout: layout.seconds) -> Layout:
    """Returns the fastest layout.

    Among layouts within 1% of the fastest it prefers the least communication to hide, then the
    least ``tensor``, then the least memory.
    """
    fastest = min(seconds(layout) for layout in layouts)
    equal = [layout for layout in layouts if seconds(layout) <= 1.01 * fastest]
    return min(equal, key=lambda layout: (round(layout.gathers + layout.transfers, 3), layout.tensor, layout.memory))


def candidates(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> Iterator[Layout]:
    """Yields every layout that divides the devices, the batch and the heads."""
    micro = config.train.batch_size // config.train.accumulate
    policies = POLICIES if config.compute.remat == "auto" else (config.compute.remat,)
    mesh = config.mesh
    if -1 in (mesh.data, mesh.fsdp, mesh.tensor):  # with an axis of -1 no axis is left to choose
        mesh = MeshConfig(*distributed.resolve_sizes(mesh, where.size))
    distributed.check_axes(mesh, where.size, where.slices)
    distributed.check_tensor(max(mesh.tensor, 1), n_heads=base.n_heads, n_kv_heads=base.n_kv_heads)
    for tensor in _divisors(where.size):
        if mesh.tensor == 0 and (tensor > _MOST_TENSOR or base.n_heads % tensor or base.n_kv_heads % tensor):
            continue
        if where.chip.platform == "gpu" and mesh.tensor == 0 and where.dims[-1] % tensor:
            continue
        for fsdp in _divisors(where.size // tensor):
            data = where.size // tensor // fsdp
            fits = all(
                wanted in (0, size) for wanted, size in ((mesh.data, data), (mesh.fsdp, fsdp), (mesh.tensor, tensor))
            )
            if fits and micro % (data * fsdp) == 0 and data % where.slices == 0:
                for remat in policies:
                    yield estimate(config, base, spec, where, seq, (data, fsdp, tensor), remat)


def estimate(
    config: RunConfig,
    base: ModelConfig,
    spec: AdapterSpec,
    where: Topology,
    seq: int,
    sizes: tuple[int, int, int],
    remat: str,
) -> Layout:
    """Returns the memory and time of one layout."""
    data, fsdp, tensor = sizes
    micro = config.train.batch_size // config.train.accumulate
    rows = micro / (data * fsdp)
    tokens = rows * seq
    quantize = config.compute.quantize
    wide = 4.0 if config.compute.dtype == "float32" else 2.0
    width = _WIDTHS.get(quantize, wide)
    layer, ends = _weights(base, width, wide, "" if quantize == "none" else kernels(quantize))
    adapters = 4.0 * sum(sum(projection_shapes(base)[path][-2:]) * sum(target.ranks) for path, target in spec.targets)
    tables = 4.0 * base.d_model * base.vocab_size * len(spec.saved)
    tables /= tensor if base.vocab_size % tensor == 0 else 1  # an axis that does not divide their rows is dropped
    kernel = _attention_kernel(where, base, rows, seq)
    saves, offloads = remat.removesuffix(OFFLOAD), remat.endswith(OFFLOAD)
    kept = _saved(base, saves, tensor, kernel) * wide * tokens
    layout = Layout(
        data, fsdp, tensor, remat,
        weights=(layer * base.n_layers + ends) / (fsdp * tensor),
        # A or B is split over fsdp. Tables are, too; in a step they and their gradients are
        # gathered.
        state=adapters * 4 / max(1, fsdp) ** 0.5 / tensor + tables * 4 / fsdp,
        activations=kept * min(_UNDER_WAY if offloads else base.n_layers, base.n_layers),
        working=_working(where, base, tokens, (fsdp, tensor), wide=wide, offloads=offloads)
        + (2 * tables + _transposed(where, base, width) / (fsdp * tensor) if fsdp > 1 else 0.0),
        host=kept * base.n_layers if offloads else 0.0,
        gathers=0.0,
        transfers=0.0,
        seconds=0.0,
        mfu=0.0,
    )  # fmt: skip
    times = config.train.accumulate
    useful = useful_flops(base, spec, micro, seq) / where.size
    once, executed = (_executed(base, spec, policy, rows, seq, kernel) for policy in ("dots", saves))
    matrix = executed / tensor / where.chip.matrix_rate
    # Activations are offloaded during matmuls of the forward pass, which are half of all matmuls
    # without recomputation.
    ahead, out = matrix * once / executed / 2, layout.host / where.chip.host_link
    products = max(ahead, out) + max(matrix - ahead, out)
    # The GPU compiler overlaps only a sixth of the transfers with matmuls.
    if where.chip.platform == "gpu":
        products = matrix + 2 * out
    passes = 2.3 if saves == "full" else 2.0
    gathered = passes * (layer * base.n_layers + ends / 2) / tensor * (fsdp - 1) / fsdp / where.inbound(fsdp * tensor)
    traffic = 8 * kept * base.n_layers if not base.n_experts else _of_sorted_rows(base, tokens, tensor)
    hbm = (passes * (layer * base.n_layers + ends) / tensor + traffic) / where.chip.bandwidth
    gradients = 2 * (adapters + tables) / where.inbound(data * fsdp) if data * fsdp > 1 else 0.0
    hidden = _hidden(where, base)
    behind, beside = hidden * gathered, (1 - hidden) * gathered
    beside += _sums(base, tokens, tensor, saves, wide) / where.inbound(tensor)
    seconds = times * (max(products, hbm, behind) + beside) + gradients
    mfu = times * useful / (where.chip.flops * seconds)
    return replace(layout, gathers=times * gathered, transfers=2 * times * out, seconds=seconds, mfu=mfu)


def decoder_alone(base: ModelConfig, spec: AdapterSpec) -> tuple[ModelConfig, AdapterSpec]:
    """Returns a model without its image tower and projector, which estimates ignore as small."""
    own = tuple((path, target) for path, target in spec.targets if path.startswith("layers/"))
    return replace(base, sight=None), replace(spec, targets=own)


def _weights(base: ModelConfig, narrow: float, wide: float, pattern: str) -> tuple[float, float]:
    """Returns the bytes of one layer, and the bytes outside of layers.

    Projections whose paths ``pattern`` matches have ``narrow`` bytes per weight, other weights ``wide``.
    """
    projections = {f"{path}/kernel" for path in projection_shapes(base) if re.search(pattern, f"{path}/kernel")}
    layer = ends = 0.0
    for path, shape in param_shapes(base).items():
        size = math.prod(shape) * (narrow if path in projections else wide)
        if path.startswith("layers/"):
            layer += size / base.n_layers
        else:
            ends += size
    return layer, ends


def _sums(base: ModelConfig, tokens: float, tensor: int, remat: str, wide: float) -> float:
    """Returns the bytes that reach a chip in the sums over ``tensor``; 0 if it is 1.

    Each layer has two sums in the forward and two in the backward pass, of ``[tokens, d_model]``;
    recomputed layers repeat their sums.
    """
    sums = 4 + {"full": 2, "attention": 0, "dots": 0}.get(remat, 0)
    return sums * base.n_layers * 2 * (tensor - 1) / tensor * tokens * base.d_model * wide


def _attention_kernel(where: Topology, base: ModelConfig, rows: float, seq: int) -> str:
    """Returns attention's implementation for rows of a shard; "" for the plain function."""
    if where.chip.platform == SPLASH.platform and takes(seq, base.head_dim):
        return SPLASH.name
    if base.attn_sinks:  # no kernel of a GPU has them
        return ""
    by_cudnn = cudnn_takes(seq, base.head_dim, base.attn_softcap) and fits_as_bias(rows, seq)
    if where.chip.platform == CUDNN.platform and by_cudnn:
        return CUDNN.name
    known = (base.head_dim, base.layer_windows, base.attn_softcap)
    if where.chip.platform == TRITON.platform and triton_takes(seq, *known):
        return TRITON.name
    return ""


def _hidden(where: Topology, base: ModelConfig) -> float:
    """Returns the share of gathered bytes that overlaps with matmuls.

    See `nalora_jax.distributed.compiler_options`. The shares for experts are from compiled programs
    of Mixtral-8x7B; on GPUs and on v5p it is faster to split experts over ``tensor``.
    """
    return {"v5e": 0.65, "v6e": 0.85}.get(where.kind, 0.0) if base.n_experts else 1.0


def _transposed(where: Topology, base: ModelConfig, wide: float) -> float:
    """Returns the bytes of kernels that are transposed at the start of a step, summed over devices.

    NCCL gathers along the first axis in memory. That axis differs from the split axis if fsdp
    splits outputs. Kernels of experts are transposed on TPUs, too, for the backward pass.
    """
    late = ("/down_proj", "/o_proj") if where.chip.platform == "gpu" else ()
    shapes = projection_shapes(base).items()
    sizes = (math.prod(shape) for path, shape in shapes if path.endswith(late) or (base.n_experts and "/ffn/" in path))
    return wide * base.n_layers * sum(sizes)


def _of_sorted_rows(base: ModelConfig, tokens: float, tensor: int) -> float:
    """Returns the bytes of HBM traffic of a step for rows sorted by expert (from two compiled mixtures)."""
    each = _READ_NARROW * base.d_model + _READ_WIDE * base.d_ff / tensor
    return base.n_layers * tokens * base.experts_per_token * each


def _saved(base: ModelConfig, remat: str, tensor: int, kernel: str) -> float:
    """Returns the values per token and layer that are saved for the backward pass."""
    # With splash attention and cuDNN the result is saved with the projections; the plain function
    # also saves its inputs.
    queries, keys = {SPLASH.name: (2, 2), CUDNN.name: (2, 2), TRITON.name: (1, 2)}.get(kernel, (3, 4))
    # Query and key norms save their inputs, and so do norms after attention.
    normed = bool(base.qk_norm)
    heads = ((queries + normed) * base.n_heads + (keys + normed) * base.n_kv_heads) * base.head_dim / tensor
    residuals = (2 + base.post_norm) * base.d_model
    chosen = base.experts_per_token if base.n_experts else 1
    wide = (2 if base.gated else 1) * base.d_ff * chosen / tensor
    return {
        "full": base.d_model,
        "attention": residuals + heads,
        "dots": residuals + heads + wide,
        "none": 6 * base.d_model + 3 * heads + 4 * wide,
    }[remat]


def _working(
    where: Topology, base: ModelConfig, tokens: float, split: tuple[int, int], *, wide: float, offloads: bool
) -> float:
    """Returns the peak of live bytes without saved activations.

    It occurs in one layer, or in the loss with its head.
    """
    fsdp, tensor = split
    chosen = base.experts_per_token if base.n_experts else 1
    kernel = max(math.prod(shape) for shape in projection_shapes(base).values()) / tensor
    at_once = _GATHERED * (fsdp > 1)
    if base.n_experts:
        at_once = _OF_EXPERTS_ON_V5E if where.kind == "v5e" else _OF_EXPERTS
    # Each expert has separate rows.
    width = max(base.d_ff / tensor, base.d_model if base.n_experts else 0) * chosen
    layer = _WIDE * 4.0 * tokens * width + at_once * kernel * wide
    table = base.d_model * base.vocab_size * wide / tensor
    head = (1 + _copies(where, base, fsdp, offloads=offloads)) * table if fsdp > 1 else 0.0
    rows = min(tokens, max(_LOGITS // base.vocab_size // 128 * 128, 128))
    loss = 2 * 4.0 * rows * base.vocab_size / tensor + 2 * tokens * base.d_model * 4.0
    # If activations are offloaded, the head is gathered after the last layer has been computed.
    return max(layer, head + loss) if offloads else head + max(layer, loss)


def _copies(where: Topology, base: ModelConfig, fsdp: int, *, offloads: bool) -> float:
    """Returns the number of transposed or padded copies of the gathered head (docs/pods.md).

    A tied head is split along its rows' elements, and a part of an untied one may not consist of
    whole tiles of 16 rows.
    """
    if where.chip.platform == "gpu":
        return 0.9 if base.tie_embeddings else 0.0
    if where.kind == "v5e":
        return 0.9 if base.tie_embeddings or not offloads else 0.0
    return 2.4 if base.tie_embeddings or base.d_model // fsdp % 16 else 0.0


def _executed(base: ModelConfig, spec: AdapterSpec, remat: str, rows: float, seq: int, kernel: str) -> float:
    """Returns the flops of a step on the rows of one shard, recomputation included."""
    chosen = base.experts_per_token if base.n_experts else 1
    inner = sum(
        float(shape[-1] * shape[-2]) * (chosen if "/ffn/" in path else 1)
        for path, shape in projection_shapes(base).items()
        if not path.endswith(("/down_proj", "/out_proj"))
    )
    ffn_in = (2 if base.gated else 1) * base.d_model * base.d_ff * chosen
    # No policy saves the FFN's result, which a norm after it, or the weights of experts, read in
    # the backward pass.
    down = base.d_model * base.d_ff * chosen if base.post_norm or base.n_experts else 0
    again = ({"full": inner, "attention": ffn_in}.get(remat, 0.0) + down) * base.n_layers
    tokens, seen = rows * seq, rows * attention_flops(base, seq)
    adapters = useful_flops(base, spec, rows, seq) - tokens * 4 * active_parameters(base) - 3 * seen
    # Only "full" recomputes the forward pass of splash attention and cuDNN; every policy recomputes
    # it for the others. The backward pass takes five matmuls for the plain function and cuDNN,
    # seven for Triton, against two in the forward pass.
    passes = 2 if remat == "full" else 1
    if kernel == SPLASH.name:
        kernels = rows * splash_flops(base, seq, forward=passes)
    elif kernel == CUDNN.name:
        kernels = rows * base.n_layers * causal_flops(base, seq, 2 * passes + 5)
    else:
        kernels = (5.5 if kernel == TRITON.name else 4.5) * seen
    return tokens * (4 * active_parameters(base) + 2 * again) + adapters + kernels


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
