"""Settings of the mesh, numerics and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented


@documented
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh: 0 lets the library choose, -1 takes all others.

    Axes with 0 are chosen by a roofline model, together with ``compute.remat``: the fastest choice
    that fits in memory.
    """

    # Splits the batch; weights are replicated.
    data: int = 0
    # Splits the batch and the weights (gathered layer by layer).
    fsdp: int = 0
    # Splits heads and FFN channels.
    tensor: int = 0
    # Splits the tokens of rows that are too long for one device, and the weights as fsdp does.
    context: int = 0
    # Sweeps: groups of devices that train different runs; 0 lets the library choose.
    run: int = 0
    # Sweeps: runs that share one group of devices and its copy of the base; 0: as many as fit.
    runs_per_device: int = 0


# Activations stored for the backward pass: `nalora_jax.models.remat.REMAT`, or "auto" for the
# best.
Remat = Literal[
    "auto", "none", "full", "attention", "dots_last", "dots",
    "full_offload", "attention_offload", "dots_offload",
]  # fmt: skip
Experts = Literal["auto", "gather", "send"]


@documented
@dataclass(frozen=True)
class ComputeConfig:
    """Numerics and memory."""

    # Dtype of base weights and matmul operands; adapters, sums and norms stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Store the adapted model's projections quantized (QLoRA): "int8", "nf4" (4 bits), "mxfp4" (4
    # bits, feed-forward projections only), or "none".
    quantize: Literal["none", "int8", "nf4", "mxfp4"] = "none"
    # Implementation of the operations: "auto" (the fastest on the platform), "xla" (plain JAX), or
    # an implementation by name, such as "cpu".
    implementation: str = "auto"
    # Rematerialization: "auto" (by platform, as measured), "none", "full", "dots" (store the
    # results of matmuls), "attention" (the same without results of width d_ff), or "dots_last"
    # ("dots" in the last layer of each period of different layers, "attention" in the others). With
    # _offload, they are stored in the host's memory (TPU, GPU).
    remat: Remat = "auto"
    # Experts that "fsdp" splits: "gather" them for each layer, "send" each token to its experts, or
    # "auto" (the faster by the estimates of --mesh auto; elsewhere the way that moves fewer bytes;
    # "gather" with offloaded activations).
    experts: Experts = "auto"
    # Compute the channel statistics on one in n positions of each packed sequence (1: on all).
    stats_stride: int = 4
    # Largest number of these positions per packed sequence: longer sequences get larger strides,
    # also for the probe; 0: no limit.
    stats_positions: int = 256
    # Compute the misalignment probe on one in n positions.
    probe_stride: int = 8
    # Hidden states (tokens) per chunk of the cross-entropy, on each device; 0 chooses by platform
    # and vocabulary.
    loss_chunk: int = 0
    # Keep compiled programs in the cache folder, so that the next start skips compilation.
    compilation_cache: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of a base weight that is not quantized."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]

    @property
    def quantized(self) -> Literal["int8", "nf4", "mxfp4"] | None:
        """The storage of the projections; None if they are not quantized."""
        if self.quantize == "none":
            return None
        return self.quantize
