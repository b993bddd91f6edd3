"""Flops of a decoder, and estimates of its bytes and flops on one chip, which `layouts.estimate` combines.

The constants are fitted to compiled programs (docs/pods.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from nalora_jax.config import RunConfig
from nalora_jax.layout.machines import Topology
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.experts import SLACK, block_rows
from nalora_jax.models.remat import of_position
from nalora_jax.models.stacks import groups, param_shapes, parts, projection_shapes, stacks
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.attention_tpu import LANES, SPLASH, block_sizes, computed_pairs, takes
from nalora_jax.ops.losses import rows_of_chunk

_GATHERED = 3  # kernels that are gathered at once, each as large as the largest of a layer
# Kernels of experts in memory at once, gathered or not: of two layers, with copies for the backward
# pass. v5e has more.
_OF_EXPERTS, _OF_EXPERTS_ON_V5E = 8, 10
# Bytes of HBM traffic for each number of an expert's row, d_model or d_ff wide.
_READ_NARROW, _READ_WIDE = 92, 120
# Times that the bytes of a mixture's weights are read or written in a step: by grouped matmuls, as transposed
# copies for the backward pass and, if they are gathered, by the gathers.
_WEIGHTS_OF_EXPERTS, _GATHERED_WEIGHTS_OF_EXPERTS = 4.5, 6.5
# Bytes of HBM traffic for each forward flop of a delta rule and its layer's elementwise functions: GPUs write
# the arrays of its loop over chunks, TPUs keep them in VMEM (from compiled steps of Qwen3.5).
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
_WIDE, _WIDE_ON_TPUS = 4, 3


def decoder_alone(config: RunConfig, base: ModelConfig) -> tuple[ModelConfig, AdapterSpec]:
    """Returns a model and its adapters without the image tower and projector, which estimates ignore as small."""
    spec = adapter_spec(config, base)
    targets = tuple((path, target) for path, target in spec.targets if path.startswith("layers/"))
    return replace(base, sight=None), replace(spec, targets=targets)


# ---------------------------------------------------------------- flops of a model


def attention_flops(base: ModelConfig, seq: int) -> float:
    """Returns the forward flops of scores and weighted sums for one row, over all layers.

    The mixers of layers without attention count with all their flops outside of projections.
    """
    return sum(parts(config)[0].flops(config, seq) for config in uniform(base))


def mixer_flops(base: ModelConfig, seq: int) -> float:
    """Returns the part of `attention_flops` in layers without attention."""
    return sum(parts(c)[0].flops(c, seq) for c in uniform(base) if not c.attends)


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
    for config in attending(base):
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
    widths = sum(config.n_layers * config.n_heads * config.head_dim for config in attending(base))
    return products * 2.0 * attention_gpu.triton_pairs(seq) * widths


def attending(base: ModelConfig) -> list[ModelConfig]:
    """Returns the uniform config of every stack with attention."""
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


# ---------------------------------------------------------------- bytes and flops of a chip


def weight_bytes(base: ModelConfig, narrow: float, wide: float, pattern: str) -> tuple[float, float]:
    """Returns the mean bytes of a layer, and the bytes outside of layers.

    Projections that ``pattern`` matches have ``narrow`` bytes per weight, others ``wide``.
    """
    projections = {
        f"{path}/kernel" for path in projection_shapes(base) if re.search(pattern, f"{path}/kernel")
    }
    layer = ends = 0.0
    for path, shape in param_shapes(base).items():
        size = math.prod(shape) * (narrow if path in projections else wide)
        if path.startswith("layers/"):
            layer += size / base.n_layers
        else:
            ends += size
    return layer, ends


def summed_bytes(base: ModelConfig, tokens: float, tensor: int, remat: str, wide: float) -> float:
    """Returns the bytes that reach a chip in the sums over ``tensor``; 0 if it is 1.

    Each layer has two sums in the forward and two in the backward pass, of ``[tokens, d_model]``;
    recomputed layers repeat their sums.
    """
    sums = 4 + {"full": 2, "attention": 0, "dots": 0}.get(remat, 0)
    return sums * base.n_layers * 2 * (tensor - 1) / tensor * tokens * base.d_model * wide


def gathered_keys(
    base: ModelConfig, rows: float, seq: int, context: int, wide: float
) -> tuple[float, float]:
    """Returns live and received bytes of a step for the keys and values of rows that chips share.

    Live are the keys and values of one layer's ``rows``, and their gradients. They are gathered in both
    passes, and the gradients are summed. Of a window within a block only its halo is exchanged.
    """
    if context == 1:
        return 0.0, 0.0
    most = received = 0.0
    for config in uniform(base):
        if config.mixer is not None and not config.mixer.attends:
            continue
        each = 2 * config.n_kv_heads * config.head_dim * rows * wide
        most = max(most, 2 * each * seq)
        for window in config.layer_windows:
            near = window <= seq / (2 * context)
            received += _KEYS_SENT * each * (2 * window if near else seq * (context - 1) / context)
    return most, received


def attention_kernel(where: Topology, base: ModelConfig, rows: float, seq: int, context: int = 1) -> str:
    """Returns attention's implementation for rows of a shard; "" for the plain function."""
    if context > 1 and where.chip.platform == "gpu":
        return attention_gpu.SPLIT_TRITON if base.head_dim in attention_gpu.HEAD_DIMS else ""
    if where.chip.platform == "tpu" and takes(seq, base.head_dim):
        return SPLASH
    by_cudnn = attention_gpu.cudnn_takes(
        seq, base.head_dim, base.attn_softcap
    ) and attention_gpu.fits_as_bias(rows, seq)
    if where.chip.platform == "gpu" and by_cudnn:
        return attention_gpu.CUDNN
    if base.attn_sinks:
        return ""
    shape = (base.head_dim, base.layer_windows, base.attn_softcap)
    if where.chip.platform == "gpu" and attention_gpu.triton_takes(seq, *shape):
        return attention_gpu.TRITON
    return ""


def hidden_share(where: Topology, base: ModelConfig) -> float:
    """Returns the share of gathered bytes that overlaps with matmuls.

    See `nalora_jax.layout.distributed.compiler_options`. The shares for experts are from compiled programs
    of Mixtral-8x7B; on GPUs and on v5p it is faster to split experts over ``tensor``.
    """
    if not base.n_experts:
        return 1.0
    return {"v5e": 0.65, "v6e": 0.85}.get(where.kind, 0.0)


def transposed_bytes(where: Topology, base: ModelConfig, wide: float) -> float:
    """Returns the bytes of kernels that are transposed at the start of a step, summed over devices.

    NCCL gathers along the first axis in memory. That axis differs from the split axis if fsdp
    splits outputs.
    """
    if where.chip.platform != "gpu":
        return 0.0
    late, total = ("/down_proj", "/o_proj"), 0.0
    for config in uniform(base):
        shapes = projection_shapes(config).items()
        total += config.n_layers * sum(
            math.prod(s) for path, s in shapes if path.endswith(late) or len(s) == 3
        )
    return wide * total


def copied_experts(base: ModelConfig, fsdp: int, context: int, narrow: float) -> float:
    """Returns the bytes of experts whose stacks are copied at the start of a step, summed over devices.

    If ``context`` splits the experts too, XLA gathers them from a copy of all layers with the
    experts' axis first.
    """
    if context == 1 or not base.n_experts or base.n_experts % (fsdp * context):
        return 0.0
    shapes = [(of.n_layers, s) for of in uniform(base) for s in projection_shapes(of).values()]
    return narrow * sum(layers * math.prod(shape) for layers, shape in shapes if len(shape) == 3)


def activation_traffic(
    where: Topology, base: ModelConfig, rows: float, seq: int, tensor: int, saved: float, *, sends: bool
) -> float:
    """Returns the HBM traffic of a step for the activations of ``rows``; all layers save ``saved`` bytes."""
    mixers = rows * mixer_flops(base, seq) * _MIXER_BYTES.get(where.chip.platform, 0.0) / tensor
    if not base.n_experts:
        return 8 * saved + mixers
    slack = SLACK if sends else 1.0
    # Of rows sorted by expert (from two compiled mixtures).
    sorted_rows = sum(
        config.n_layers
        * (rows * seq)
        * config.experts_per_token
        * (_READ_NARROW * config.d_model + _READ_WIDE * config.d_ff / tensor)
        for config in uniform(base)
    )
    return slack * sorted_rows + mixers


def weight_passes(base: ModelConfig, split: int, passes: float) -> float:
    """Returns the times that the weights' bytes are read or written in a step; ``passes`` of a dense model."""
    if not base.n_experts:
        return passes
    return _GATHERED_WEIGHTS_OF_EXPERTS if split > 1 else _WEIGHTS_OF_EXPERTS


def rows_for_experts(
    base: ModelConfig, tokens: float, fsdp: int, narrow: float, wide: float
) -> tuple[float, float]:
    """Returns the bytes of experts that are not gathered, and of rows that reach a chip in a step.

    All rows are sent to their experts (`nalora_jax.models.moe`).
    """
    stay = sent = 0.0
    for config in uniform(base):
        experts = sum(math.prod(shape) for shape in projection_shapes(config).values() if len(shape) == 3)
        stay += config.n_layers * experts * narrow
        blocks = block_rows(int(tokens * config.experts_per_token), fsdp) * (fsdp - 1)
        sent += config.n_layers * _SENT * blocks * config.d_model * wide
    return stay, sent


class Trained(NamedTuple):
    """Bytes of trained parameters in float32."""

    dense: float  # adapters of single projections
    of_experts: float  # adapters of experts
    tables: float


def trained_bytes(base: ModelConfig, spec: AdapterSpec, tensor: int) -> Trained:
    """Returns the bytes of the trained parameters, of which ``tensor`` splits the tables' part."""
    shapes, adapters, of_experts = projection_shapes(base), 0.0, 0.0
    for path, target in spec.targets:
        *lead, d_in, d_out = shapes[path]
        magnitudes = d_out * len(target.ranks) if spec.dora else 0
        size = 4.0 * math.prod(lead) * ((d_in + d_out) * sum(target.ranks) + magnitudes)
        if lead:
            of_experts += size
        else:
            adapters += size
    tables = 4.0 * base.d_model * base.vocab_size * len(spec.saved)
    if base.vocab_size % tensor == 0:  # an axis that does not divide their rows is dropped
        tables /= tensor
    return Trained(adapters, of_experts, tables)


def state_bytes(trained: Trained, split: int, tensor: int) -> float:
    """Returns the bytes of parameters, gradients and two moments on a chip.

    A or B of a dense adapter is split over ``split`` devices; adapters of experts and tables are split
    completely. A step gathers the tables and their gradients.
    """
    adapters = trained.dense / max(1, split) ** 0.5 + trained.of_experts / split
    return 4 * (adapters / tensor + trained.tables / split)


def values_for_backward(base: ModelConfig, saves: str, tensor: int, kernel: str) -> tuple[float, float]:
    """Returns numbers a token: saved by a layer in the mean, and recomputed for one layer at a time.

    If only inputs are saved, a backward pass recomputes the results that "attention" saves. They are
    live while the FFN's gradients are computed.
    """
    stacks = stack_policies(base, saves)
    saved = sum(config.n_layers * saved_values(config, policy, tensor, kernel) for config, policy in stacks)
    recomputed = 0.0
    if saves == "full":
        recomputed = max(
            saved_values(config, "attention", tensor, kernel) - config.d_model for config in uniform(base)
        )
    return saved / base.n_layers, recomputed


def stack_policies(base: ModelConfig, remat: str) -> Iterator[tuple[ModelConfig, str]]:
    """Yields the uniform config and the rematerialization policy of every stack."""
    for group in groups(base):
        for position, stack in enumerate(group):
            yield stack.config, of_position(remat, position, len(group))


def saved_values(base: ModelConfig, remat: str, tensor: int, kernel: str) -> float:
    """Returns the values per token and layer that are saved for the backward pass."""
    if base.mixer is not None and not base.mixer.attends:
        heads = base.mixer.saved(base) / tensor
        return _saved_with(base, remat, tensor, heads)
    # With splash attention and cuDNN the result is saved with the projections; the plain function
    # also saves its inputs.
    queries, keys = _SAVED_HEADS.get(kernel, (3, 4))
    # Query and key norms save their inputs; their results are saved as well, except by kernels.
    normed = bool(base.qk_norm) and kernel in ("", attention_gpu.SPLIT_TRITON)
    # A TPU pads narrow heads to whole tiles, except of values, whose tokens are the last axis.
    padded = max(base.head_dim, LANES) if kernel == SPLASH else base.head_dim
    of_queries = (queries + normed + base.attn_gate) * base.n_heads * padded
    of_keys = base.n_kv_heads * ((keys - 1 + normed) * padded + base.head_dim)
    return _saved_with(base, remat, tensor, (of_queries + of_keys) / tensor)


def _saved_with(base: ModelConfig, remat: str, tensor: int, heads: float) -> float:
    """Returns `saved_values` for the values that the mixer saves."""
    # The layer's input and the FFN's; or the results of both parts, if norms follow them.
    residuals = (2 + base.post_norm) * base.d_model
    chosen = max(base.experts_per_token, 1)
    wide = (2 if base.gated else 1) * base.d_ff * chosen / tensor
    if base.ffn is not None:
        wide = base.ffn.saved(base) / tensor
    return {
        "full": base.d_model,
        "attention": residuals + heads,
        "dots": residuals + heads + wide,
        "none": 6 * base.d_model + 3 * heads + 4 * wide,
    }[remat]


def working_bytes(
    where: Topology,
    base: ModelConfig,
    tokens: float,
    split: tuple[int, int],
    *,
    wide: float,
    offloads: bool,
    recomputed: float = 0.0,
) -> float:
    """Returns the peak of live bytes without saved activations; a layer has ``recomputed`` bytes more.

    It occurs in one layer, or in the loss with its head.
    """
    fsdp, tensor = split
    layer = max(_in_layer(where, config, tokens, split, wide) for config in uniform(base)) + recomputed
    table = base.d_model * base.vocab_size * wide / tensor
    if fsdp == 1:
        table = 0.0
    head = (1 + _copies(where, base, fsdp, offloads=offloads)) * table
    rows = min(tokens, rows_of_chunk(base.vocab_size))
    loss = 2 * 4.0 * rows * base.vocab_size / tensor + 2 * tokens * base.d_model * 4.0
    if where.chip.platform == "tpu" and not base.n_experts:
        return max(layer, head, table + loss)
    # If activations are offloaded, the head is gathered after the last layer has been computed.
    return max(layer, head + loss) if offloads else head + max(layer, loss)


def _in_layer(
    where: Topology, base: ModelConfig, tokens: float, split: tuple[int, int], wide: float
) -> float:
    """Returns the live bytes within a layer of a stack."""
    fsdp, tensor = split
    kernel = max(math.prod(shape) for shape in projection_shapes(base).values()) / tensor * wide
    # Each expert has separate rows.
    width = max(base.d_ff / tensor, base.d_model if base.n_experts else 0) * max(base.experts_per_token, 1)
    if not base.n_experts:
        arrays = _WIDE_ON_TPUS if where.chip.platform == "tpu" else _WIDE
        return arrays * 4.0 * tokens * width + (_GATHERED * kernel if fsdp > 1 else 0.0)
    rows = _WIDE * 4.0 * tokens * width
    copies = _OF_EXPERTS_ON_V5E if where.kind == "v5e" else _OF_EXPERTS
    # With all copies of kernels, half of the rows are live; with all rows, few kernels.
    return max(copies * kernel + rows / 2, rows + _GATHERED * kernel)


def _copies(where: Topology, base: ModelConfig, fsdp: int, *, offloads: bool) -> float:
    """Returns the number of transposed or padded copies of the gathered head (docs/pods.md).

    A tied head is split along its rows' elements, and a part of an untied one may not consist of
    whole tiles of 16 rows.
    """
    if where.chip.platform == "gpu":
        return 0.9 if base.tie_embeddings else 0.0
    if where.kind == "v5e":
        return 0.9 if base.tie_embeddings or not offloads else 0.0
    return 1.0 if base.tie_embeddings or base.d_model // fsdp % 16 else 0.0


def executed_flops(
    base: ModelConfig, spec: AdapterSpec, remat: str, rows: float, seq: int, kernel: str
) -> float:
    """Returns the flops of a step on the rows of one shard, recomputation included."""
    again = sum(
        config.n_layers * _recomputed(config, policy) for config, policy in stack_policies(base, remat)
    )
    tokens, flops = rows * seq, rows * attention_flops(base, seq)
    adapters = useful_flops(base, spec, rows, seq) - tokens * 4 * active_parameters(base) - 3 * flops
    # Only "full" recomputes the forward pass of splash attention and cuDNN; every policy recomputes
    # it for the others. The backward pass takes five matmuls for the plain function and cuDNN,
    # seven for Triton, against two in the forward pass.
    passes = 2 if remat == "full" else 1
    if kernel == SPLASH:
        kernels = rows * (splash_flops(base, seq, forward=passes) + 4 * mixer_flops(base, seq))
    elif kernel == attention_gpu.CUDNN:
        kernels = rows * causal_flops(base, seq, 2 * passes + 5)
    elif kernel == attention_gpu.SPLIT_TRITON:
        kernels = (passes + 3.5) * flops
    else:
        kernels = (5.5 if kernel == attention_gpu.TRITON else 4.5) * flops
    return tokens * (4 * active_parameters(base) + 2 * again) + adapters + kernels


def _recomputed(config: ModelConfig, remat: str) -> float:
    """Returns the weights of one layer that a token meets again in the backward pass."""
    sizes = {path: active_size(config, shape) for path, shape in projection_shapes(config).items()}
    outputs = sum(size for path, size in sizes.items() if path.endswith(("/down_proj", "/out_proj")))
    inputs = sum(
        size for path, size in sizes.items() if path.endswith(("/gate_proj", "/up_proj", "/in_proj"))
    )
    # A norm after the FFN reads its result in the backward pass.
    every = sum(sizes.values()) - (0.0 if config.post_norm else outputs)
    return {"full": every, "attention": inputs}.get(remat, 0.0)
