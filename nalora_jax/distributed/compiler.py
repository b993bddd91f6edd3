"""Options of XLA's compilers that a training step is compiled with, by platform, and what each is for.

What they do to the scheduled program is in docs/pods.md, made by ``nalora plan``.
"""

from __future__ import annotations

from jax.sharding import Mesh

# Gathers of kernels run behind products: without these, v6e's compiler schedules none of them so, v5e's some.
_TPU = {
    "xla_tpu_enable_async_collective_fusion": "true",  # collectives are cut into steps that ride along in products
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",  # gathers, too
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",  # over more than one product
    "xla_tpu_overlap_compute_collective_tc": "true",  # on the same core
    "xla_enable_async_all_gather": "true",
}
# Schedules by latency, so that a layer's kernels are on their way while the one before it is computed.
_GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,  # two layers in one iteration of the scan
    "xla_gpu_enable_pipelined_all_gather": True,
}


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """For ``jax.jit(..., compiler_options=...)`` of a step on ``mesh``; none where no kernel is ever gathered."""
    if mesh.shape["fsdp"] == 1:
        return {}
    by_platform: dict[str, dict[str, str | bool]] = {"tpu": {**_TPU}, "gpu": {**_GPU}}
    return by_platform.get(mesh.devices.flat[0].platform, {})
