"""Options of XLA's compilers that a training step is compiled with, by platform, and what each is for.

What they do to the scheduled program is in docs/pods.md, made by ``nalora plan``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from nalora_jax.distributed.devices import kind_of, platform_name

_GPU_ALWAYS: dict[str, Any] = {
    # Products of few rows are not made part of larger ones with the same factor, which would then have the finer of
    # both dtypes: the misalignment probe's made a gate's products float32, 2% of a step's HBM traffic.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Percent of the memory that rematerialisation and the scheduler may plan with. They take a step over scanned layers
    # for 1.5 times what it needs; at the default of 95 they compute products twice and let gathers wait for memory that
    # is free.
    "xla_gpu_memory_limit_slop_factor": 200,
}
# Gathered kernels are multiplied as a whole. The partitioner turns large ones into loops that multiply a shard and
# permute the next: on v5e:4x8 three kernels of 178 MB became 110 GB of exposed permutes, with float32 sums between.
_WHOLE_KERNELS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Gathers of kernels run behind products: without these v5e's compiler schedules some of them so. On other TPUs libtpu
# refuses the first of them from 0.0.50 on, because of wrong results and hangs.
_V5E = _WHOLE_KERNELS | {
    "xla_tpu_enable_async_collective_fusion": "true",  # collectives are cut into steps that ride along in products
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",  # gathers, too
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",  # over more than one product
    "xla_tpu_overlap_compute_collective_tc": "true",  # on the same core
    "xla_enable_async_all_gather": "true",
}
# The same on v5p and v6e, whose SparseCores gather while the TensorCore computes.
_SPARSE_CORES = _WHOLE_KERNELS | {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",  # over two dimensions of the torus
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
# By the names that JAX has for a kind of device.
_TPU = {"tpu v5 lite": _V5E, "tpu v5e": _V5E} | dict.fromkeys(
    ("tpu v5", "tpu v5p", "tpu v6 lite", "tpu v6e"), _SPARSE_CORES
)
# Schedules by latency, so that a layer's kernels are on their way while the one before it is computed.
_GPU: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,  # two layers in one iteration of the scan
}
# The same option by its names in the XLA of JAX 0.10 and of 0.12.
_PIPELINED: dict[str, Any] = {
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Returns the ``compiler_options`` of `jax.jit` for a step on ``mesh``."""
    device, gathers = mesh.devices.flat[0], mesh.shape["fsdp"] > 1
    if platform_name(device) == "gpu":
        pipelined = {name: value for name, value in _PIPELINED.items() if gathers and _is_known(name, value)}
        return _GPU_ALWAYS | (_GPU if gathers else {}) | pipelined
    if platform_name(device) != "tpu" or not gathers:
        return {}
    return dict(_TPU.get(kind_of(device).lower(), {}))


@cache
def _is_known(name: str, value: Any) -> bool:
    """Whether the XLA that is installed has this option: it refuses to compile with one that it does not know."""
    try:
        jax.jit(lambda: 0.0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
