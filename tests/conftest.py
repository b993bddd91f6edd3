"""Shared set-up: eight simulated CPU devices, strict numerics, warnings as errors (pyproject)."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight simulated devices on two busy cores meet late; by default XLA aborts the process after 40 seconds.
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",
        "--xla_cpu_collective_timeout_seconds=900",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's CPU client. By default one per device: where two collectives of one program do not depend on each
# other, devices may wait in different ones until no thread is left to finish either.
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
