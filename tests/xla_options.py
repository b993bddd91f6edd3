"""XLA's options with which the small programs of tests compile quickly."""

from __future__ import annotations

from importlib.metadata import version


def flags(devices: int) -> str:
    """``XLA_FLAGS`` of a process with simulated devices."""
    # Small programs are compiled in one piece: 5% less time than in up to 32.
    options = [f"force_host_platform_device_count={devices}", "cpu_parallel_codegen_split_count=1"]
    if (
        version("jaxlib") < "0.12"
    ):  # emitters of fusions take two thirds of a small program's compilation
        options.append("cpu_use_fusion_emitters=false")
    if (
        devices > 1
    ):  # they meet late on two busy cores; by default XLA aborts the process after 40 seconds
        options += [
            "cpu_collective_call_terminate_timeout_seconds=900",
            "cpu_collective_timeout_seconds=900",
        ]
    return " ".join(f"--xla_{option}" for option in options)
