"""The numerics of a run from its settings."""

from __future__ import annotations

from nalora_jax.errors import NaloraError
from nalora_jax.ops.dispatch import AUTO, IMPLEMENTATIONS, XLA, Numerics, Platform, register_all


def numerics_for(dtype: str, platform: Platform | str, implementation: str = AUTO) -> Numerics:
    """Returns the numerics that measured fastest for base weights of ``dtype`` on a platform.

    On a CPU only bf16 x bf16 -> float32 reaches XLA's fast matmuls, so activations stay float32
    between matmuls. On TPU and GPU results are rounded to bf16 after float32 accumulation.

    Args:
      dtype: "float32" or "bfloat16".
      platform: a platform, or the name of one with a single device.
      implementation: "auto", "xla", or the name of an implementation for the platform.

    Raises:
      NaloraError: another dtype, or an implementation that is unknown or for another platform.
    """
    if isinstance(platform, str):
        platform = Platform(platform)
    check_implementation(implementation, platform.name)
    if dtype == "float32":
        numerics = Numerics(platform=platform, implementation=implementation)
    elif dtype == "bfloat16":
        result = "float32" if platform.name == "cpu" else "bfloat16"
        numerics = Numerics("bfloat16", result, "bfloat16", "bfloat16", None, platform, implementation)
    else:
        raise NaloraError("compute.dtype", expected="'float32' or 'bfloat16'", found=repr(dtype))
    return numerics.hooks.preferred(numerics)


def check_implementation(name: str, platform: str) -> None:
    """Raises a NaloraError unless ``name`` is "auto", "xla" or an implementation for ``platform``."""
    register_all()
    available = [i.name for i in IMPLEMENTATIONS.values() if i.platform == platform]
    if name not in (AUTO, XLA, *available):
        other = IMPLEMENTATIONS.get(name)
        raise NaloraError(
            "--compute.implementation",
            expected=f"{', '.join((AUTO, XLA, *available))} (on {platform or 'this platform'})",
            found=f"{name!r}, which is for {other.platform}" if other else repr(name),
            remedy="leave it at auto, which takes the fastest on the platform",
        )
