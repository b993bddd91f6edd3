"""XLA's options with which the small programs of tests compile quickly."""

from __future__ import annotations

from importlib.metadata import version

# Emitters of fusions take two thirds of a small program's compilation; JAX 0.12 cannot do without them.
PLAIN_LOOPS = ["--xla_cpu_use_fusion_emitters=false"] * (version("jaxlib") < "0.12")
# Small programs are compiled in one piece: 5% less time than in up to 32.
ONE_PIECE = "--xla_cpu_parallel_codegen_split_count=1"


def flags(devices: int) -> str:
    """``XLA_FLAGS`` of a process with simulated devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", ONE_PIECE, *PLAIN_LOOPS])
