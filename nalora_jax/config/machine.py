"""Settings of where and how a run computes: the mesh, numerics and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented


@documented
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh: 0 leaves an axis to the library, -1 takes what is left.

    What is left to it is chosen by roofline, together with ``compute.remat``: the fastest that fits.
    """

    # Batch is split, weights are replicated.
    data: int = 0
    # Batch is split, weights are split too (gathered layer by layer).
    fsdp: int = 0
    # Heads and FFN channels are split.
    tensor: int = 0


# What waits for the backward pass: `nalora_jax.models.remat.REMAT`, or what is best.
Remat = Literal[
    "auto", "none", "full", "attention", "dots", "full_offload", "attention_offload", "dots_offload"
]  # fmt: skip


@documented
@dataclass(frozen=True)
class ComputeConfig:
    """Numerics and memory."""

    # Dtype of base weights and matrix operands; adapters, sums and norms stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Hold the adapted model's projections quantized (QLoRA): "int8", "nf4" (4 bits), or "none".
    quantize: Literal["none", "int8", "nf4"] = "none"
    # How operations are computed: "auto" (what is fastest on the platform), "xla" (plain JAX), or an implementation by
    # name, such as "cpu".
    implementation: str = "auto"
    # Rematerialisation: "auto" (by platform, as measured), "none", "full", "dots" (save what takes a matmul), or
    # "attention" (of that, nothing that is d_ff wide). With _offload, what is saved is in the host's memory (TPU, GPU).
    remat: Remat = "auto"
    # Take the channel statistics on one in n positions of each row (1: on all).
    stats_stride: int = 4
    # Positions that they take of a row at most: longer rows have larger strides, the probe's too; 0: no bound.
    stats_positions: int = 256
    # Take the misalignment probe on one in n positions.
    probe_stride: int = 8
    # Rows of hidden states per chunk of the cross-entropy, on each device; 0 chooses by platform and vocabulary.
    loss_chunk: int = 0
    # Keep compiled programs in the cache folder, so that the next start skips compilation.
    compilation_cache: bool = True
