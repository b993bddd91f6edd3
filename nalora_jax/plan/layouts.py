"""The mesh and the rematerialisation of a run, chosen by roofline: the fastest that fits.

A frozen base has neither gradients nor optimizer state, so the best layout is not that of full training: a model of
16 GB may be whole on every chip of 32 GB, which then gathers no weights at all; one that is split is gathered once
forward and once backward, and what is kept of the activations decides how much is computed twice. What the chip has no
room for may wait in the host's memory, as far as its link takes no longer than the products. The estimates here need no
compiler and take milliseconds; `nalora plan` compiles what was chosen and shows how well they hold.
"""

from __future__ import annotations

import math
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
from nalora_jax.ops.splash_attention import SPLASH, takes
from nalora_jax.ops.triton_attention import TRITON
from nalora_jax.ops.triton_attention import takes as triton_takes
from nalora_jax.plan.machines import Topology
from nalora_jax.plan.roofline import active_parameters, attention_flops, causal_flops, splash_flops, useful_flops

# Policies in the order of what they keep for the backward pass, most first; on the chip, or in the host's memory.
POLICIES = tuple(name + where for where in ("", OFFLOAD) for name in ("dots", "attention", "full"))
_MOST_TENSOR = 8  # beyond it, sums of activations cost more than gathers of weights on every machine of the table
# Of the memory: how far estimates may be off (docs/pods.md).
_USABLE = {"tpu": 0.95, "gpu": 0.9}
_USABLE_OF_HOST = 0.5  # the rest is of the processes that read data, of loading, and of the system
_UNDER_WAY = 2  # layers whose activations are on the chip while all others wait in the host's memory
_LOGITS = 1 << 27  # floats of a chunk of the loss (`nalora_jax.ops.cross_entropy`)
_GATHERED = 3  # kernels that are gathered at once, each the largest of a layer
# Kernels of experts at once, gathered or not: of two layers, with copies for the backward pass. v5e has more.
_OF_EXPERTS, _OF_EXPERTS_ON_V5E = 8, 10
_READ_NARROW, _READ_WIDE = 130, 170  # bytes of HBM traffic for each number of a row of an expert, d_model or d_ff wide
_WIDE = 4  # float32 arrays as wide as the FFN that are alive within a layer


@dataclass(frozen=True)
class Layout:
    """A mesh with a rematerialisation policy, and what is expected of them on each chip."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    weights: float  # bytes of the frozen base
    state: float  # bytes of adapters and optimizer
    activations: float  # bytes that wait for the backward pass
    working: float  # bytes of gathered kernels, of one layer's arrays and of the loss
    host: float  # bytes that wait for the backward pass in the host's memory
    gathers: float  # seconds of a step in which kernels are gathered, behind products where the compiler manages
    transfers: float  # seconds of a step in which activations go to the host's memory and come back, behind products
    seconds: float  # a step, by roofline
    mfu: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.weights + self.state + self.activations + self.working

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the axes."""
        return self.data, self.fsdp, self.tensor

    @property
    def short(self) -> str:
        """The layout without its estimates."""
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}, remat {self.remat}"

    def __str__(self) -> str:
        """One line for the log and for `nalora plan`."""
        beside = f" and {self.host / 1e9:.1f} of the host's" if self.host else ""
        return (
            f"{self.short}: {self.memory / 1e9:.1f} GB a chip{beside}, "
            f"at least {self.seconds:.3g} s a step (MFU at most {self.mfu:.0%})"
        )


def choose(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> Layout:
    """The layout that estimates prefer; see `fitting`."""
    return preferred(fitting(config, base, spec, where, seq))


def fitting(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> list[Layout]:
    """Layouts that are estimated to fit and have the axes and the policy that ``config`` gives.

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
    """The fastest layout; of those as fast to 1% the one that has the least to hide, then the smallest."""
    fastest = min(seconds(layout) for layout in layouts)
    equal = [layout for layout in layouts if seconds(layout) <= 1.01 * fastest]
    return min(equal, key=lambda layout: (round(layout.gathers + layout.transfers, 3), layout.tensor, layout.memory))


def candidates(config: RunConfig, base: ModelConfig, spec: AdapterSpec, where: Topology, seq: int) -> Iterator[Layout]:
    """Every layout that divides the devices, the batch and the heads."""
    micro = config.train.batch_size // config.train.accumulate
    policies = POLICIES if config.compute.remat == "auto" else (config.compute.remat,)
    mesh = config.mesh
    if -1 in (mesh.data, mesh.fsdp, mesh.tensor):  # "what is left" leaves nothing open
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
    """Memory and time of one layout."""
    data, fsdp, tensor = sizes
    micro = config.train.batch_size // config.train.accumulate
    rows = micro / (data * fsdp)
    tokens = rows * seq
    width = {"int8": 1.0, "nf4": 0.55}.get(config.compute.quantize, 0.0)
    wide = 4.0 if config.compute.dtype == "float32" else 2.0
    layer, ends = _weights(base, width or wide, wide)
    adapters = 4.0 * sum(sum(projection_shapes(base)[path][-2:]) * sum(target.ranks) for path, target in spec.targets)
    tables = 4.0 * base.d_model * base.vocab_size * len(spec.saved)
    tables /= tensor if base.vocab_size % tensor == 0 else 1  # an axis that does not divide their rows is dropped
    kernel = _attention_kernel(where, base, rows, seq)
    saves, offloads = remat.removesuffix(OFFLOAD), remat.endswith(OFFLOAD)
    kept = _saved(base, saves, tensor, kernel) * wide * tokens
    layout = Layout(
        data, fsdp, tensor, remat,
        weights=(layer * base.n_layers + ends) / (fsdp * tensor),
        # Of A and B one is split over fsdp. Tables are; in a step they and their gradients are gathered over it.
        state=adapters * 4 / max(1, fsdp if fsdp > 1 else 1) ** 0.5 / tensor + tables * 4 / fsdp,
        activations=kept * min(_UNDER_WAY if offloads else base.n_layers, base.n_layers),
        working=_working(where, base, tokens, (fsdp, tensor), wide=wide, offloads=offloads)
        + (2 * tables + _transposed(where, base, width or wide) / (fsdp * tensor) if fsdp > 1 else 0.0),
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
    # Activations leave behind the products of the forward pass, which are half of what nothing is made again for.
    ahead, out = matrix * once / executed / 2, layout.host / where.chip.host_link
    products = max(ahead, out) + max(matrix - ahead, out)
    if where.chip.platform == "gpu":  # whose compiler puts but a sixth of the transfers behind products
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
    """A model without what it sees images by, which is small beside the decoder: what estimates are made of."""
    own = tuple((path, target) for path, target in spec.targets if path.startswith("layers/"))
    return replace(base, sight=None), replace(spec, targets=own)


def _weights(base: ModelConfig, of_projections: float, of_others: float) -> tuple[float, float]:
    """Bytes of one layer, and of what is not in a layer."""
    projections = {f"{path}/kernel" for path in projection_shapes(base)}
    layer = ends = 0.0
    for path, shape in param_shapes(base).items():
        size = math.prod(shape) * (of_projections if path in projections else of_others)
        if path.startswith("layers/"):
            layer += size / base.n_layers
        else:
            ends += size
    return layer, ends


def _sums(base: ModelConfig, tokens: float, tensor: int, remat: str, wide: float) -> float:
    """Bytes that reach a chip in the sums over ``tensor`` of a forward and backward pass; 0 where nothing is split.

    Two forward and two backward in each layer, of ``[tokens, d_model]``; layers that are made again sum again.
    """
    sums = 4 + {"full": 2, "attention": 0, "dots": 0}.get(remat, 0)
    return sums * base.n_layers * 2 * (tensor - 1) / tensor * tokens * base.d_model * wide


def _attention_kernel(where: Topology, base: ModelConfig, rows: float, seq: int) -> str:
    """The implementation that attention of ``rows`` whole rows of a shard takes; "" for the plain function."""
    if where.chip.platform == SPLASH.platform and takes(seq, base.head_dim):
        return SPLASH.name
    by_cudnn = cudnn_takes(seq, base.head_dim, base.attn_softcap) and fits_as_bias(rows, seq)
    if where.chip.platform == CUDNN.platform and by_cudnn:
        return CUDNN.name
    known = (base.head_dim, base.layer_windows, base.attn_softcap)
    if where.chip.platform == TRITON.platform and triton_takes(seq, *known):
        return TRITON.name
    return ""


def _hidden(where: Topology, base: ModelConfig) -> float:
    """Share of the gathered bytes that overlaps with matmuls (`nalora_jax.distributed.compiler_options`).

    For experts as compiled for Mixtral-8x7B; on GPUs and on v5p it is faster to split them over ``tensor``.
    """
    return {"v5e": 0.65, "v6e": 0.85}.get(where.kind, 0.0) if base.n_experts else 1.0


def _transposed(where: Topology, base: ModelConfig, wide: float) -> float:
    """Bytes of kernels that are transposed at the start of a step, on all devices together.

    NCCL gathers along the first axis in memory: another one if fsdp splits outputs. Kernels of experts are
    transposed on TPUs, too, for the backward pass.
    """
    late = ("/down_proj", "/o_proj") if where.chip.platform == "gpu" else ()
    shapes = projection_shapes(base).items()
    sizes = (math.prod(shape) for path, shape in shapes if path.endswith(late) or (base.n_experts and "/ffn/" in path))
    return wide * base.n_layers * sum(sizes)


def _of_sorted_rows(base: ModelConfig, tokens: float, tensor: int) -> float:
    """HBM traffic of a step for rows sorted by expert, in bytes, as compiled for Mixtral-8x7B and Qwen3-30B-A3B."""
    each = _READ_NARROW * base.d_model + _READ_WIDE * base.d_ff / tensor
    return base.n_layers * tokens * base.experts_per_token * each


def _saved(base: ModelConfig, remat: str, tensor: int, kernel: str) -> float:
    """Numbers a token and layer that wait for the backward pass."""
    # Splash attention's result and cuDNN's are saved with the projections; of the plain function also its inputs.
    queries, keys = {SPLASH.name: (2, 2), CUDNN.name: (2, 2), TRITON.name: (1, 2)}.get(kernel, (3, 4))
    normed = bool(base.qk_norm)  # norms of queries and keys save their inputs, and so do norms after attention
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
    """Bytes alive at the peak besides saved activations: of one layer, or of the loss with its head."""
    fsdp, tensor = split
    chosen = base.experts_per_token if base.n_experts else 1
    kernel = max(math.prod(shape) for shape in projection_shapes(base).values()) / tensor
    at_once = _GATHERED * (fsdp > 1)
    if base.n_experts:
        at_once = _OF_EXPERTS_ON_V5E if where.kind == "v5e" else _OF_EXPERTS
    width = max(base.d_ff / tensor, base.d_model if base.n_experts else 0) * chosen  # each expert has its own rows
    layer = _WIDE * 4.0 * tokens * width + at_once * kernel * wide
    table = base.d_model * base.vocab_size * wide / tensor
    head = (1 + _copies(where, base, fsdp, offloads=offloads)) * table if fsdp > 1 else 0.0
    rows = min(tokens, max(_LOGITS // base.vocab_size // 128 * 128, 128))
    loss = 2 * 4.0 * rows * base.vocab_size / tensor + 2 * tokens * base.d_model * 4.0
    # If the activations are in the host's memory, the head is gathered after the last layer has been computed.
    return max(layer, head + loss) if offloads else head + max(layer, loss)


def _copies(where: Topology, base: ModelConfig, fsdp: int, *, offloads: bool) -> float:
    """Copies of the gathered head, in another order or with padding, that are alive with it (docs/pods.md).

    A tied head is split along its rows' elements, and a part of an untied one may have no whole tiles of 16 rows.
    """
    if where.chip.platform == "gpu":
        return 0.9 if base.tie_embeddings else 0.0
    if where.kind == "v5e":
        return 0.9 if base.tie_embeddings or not offloads else 0.0
    return 2.4 if base.tie_embeddings or base.d_model // fsdp % 16 else 0.0


def _executed(base: ModelConfig, spec: AdapterSpec, remat: str, rows: float, seq: int, kernel: str) -> float:
    """Flops of a step on the rows of one shard, with what is computed twice."""
    chosen = base.experts_per_token if base.n_experts else 1
    inner = sum(
        float(shape[-1] * shape[-2]) * (chosen if "/ffn/" in path else 1)
        for path, shape in projection_shapes(base).items()
        if not path.endswith(("/down_proj", "/out_proj"))
    )
    ffn_in = (2 if base.gated else 1) * base.d_model * base.d_ff * chosen
    # No policy saves the FFN's result, which a norm after it, or the weights of experts, read in the backward pass.
    down = base.d_model * base.d_ff * chosen if base.post_norm or base.n_experts else 0
    again = ({"full": inner, "attention": ffn_in}.get(remat, 0.0) + down) * base.n_layers
    tokens, seen = rows * seq, rows * attention_flops(base, seq)
    adapters = useful_flops(base, spec, rows, seq) - tokens * 4 * active_parameters(base) - 3 * seen
    # The forward pass of splash attention and of cuDNN is made again by "full" alone, of the others under every policy;
    # behind it the plain function's gradients and cuDNN's take five products to its two, and Triton's seven.
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
