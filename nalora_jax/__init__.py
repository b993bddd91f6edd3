"""Nonlinearity-aware LoRA for gated-FFN Transformers in JAX: see README.md.

The names below are the library's public API. Each is imported on first use, so that ``import
nalora_jax`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nalora_jax.config import (
        AdaLoRAConfig,
        ComputeConfig,
        DataConfig,
        DebugConfig,
        LoRAConfig,
        LoRARule,
        MeshConfig,
        OptimizerConfig,
        PreferenceConfig,
        RunConfig,
        TrainConfig,
        VisionConfig,
    )
    from nalora_jax.errors import NaloraError
    from nalora_jax.generate import Generator
    from nalora_jax.job import run
    from nalora_jax.loading.adapted import AdaptedModel, load
    from nalora_jax.loading.base import LoadedModel, load_model
    from nalora_jax.running import RunResult
    from nalora_jax.sweeps.run import SweepResult, sweep
    from nalora_jax.weights.peft import export_adapter, import_adapter

__all__ = [
    "AdaLoRAConfig",
    "AdaptedModel",
    "ComputeConfig",
    "DataConfig",
    "DebugConfig",
    "Generator",
    "LoRAConfig",
    "LoRARule",
    "LoadedModel",
    "MeshConfig",
    "NaloraError",
    "OptimizerConfig",
    "PreferenceConfig",
    "RunConfig",
    "RunResult",
    "SweepResult",
    "TrainConfig",
    "VisionConfig",
    "export_adapter",
    "import_adapter",
    "load",
    "load_model",
    "run",
    "sweep",
]

_HOMES = {
    "AdaLoRAConfig": "config",
    "AdaptedModel": "loading.adapted",
    "ComputeConfig": "config",
    "DataConfig": "config",
    "DebugConfig": "config",
    "Generator": "generate",
    "LoRAConfig": "config",
    "LoRARule": "config",
    "LoadedModel": "loading.base",
    "MeshConfig": "config",
    "NaloraError": "errors",
    "OptimizerConfig": "config",
    "PreferenceConfig": "config",
    "RunConfig": "config",
    "RunResult": "running",
    "SweepResult": "sweeps.run",
    "TrainConfig": "config",
    "VisionConfig": "config",
    "export_adapter": "weights.peft",
    "import_adapter": "weights.peft",
    "load": "loading.adapted",
    "load_model": "loading.base",
    "run": "job",
    "sweep": "sweeps.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nalora_jax")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
