"""What makes XLA compile the small programs of tests quickly."""

from __future__ import annotations

import functools

EMITTERS = "xla_cpu_use_fusion_emitters"  # of fusions: two thirds of a small program's compilation
# Small programs are compiled in one piece: 5% less time than in up to 32.
ONE_PIECE = "--xla_cpu_parallel_codegen_split_count=1"


@functools.cache
def knows(option: str) -> bool:
    """Whether this XLA has an option; the one above is gone from that of JAX 0.12."""
    import jax

    try:
        jax.jit(lambda x: x + 1).lower(0.0).compile(compiler_options={option: "True"})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def flags(devices: int) -> str:
    """``XLA_FLAGS`` of a process of its own with simulated devices."""
    chosen = [f"--xla_force_host_platform_device_count={devices}", ONE_PIECE]
    return " ".join(chosen + [f"--{EMITTERS}=false"] * knows(EMITTERS))
