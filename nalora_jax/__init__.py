"""Nonlinearity-aware LoRA for gated-FFN Transformers in JAX: see README.md.

The names below are the library's public API. Each is imported on first use, so that ``import
nalora_jax`` is instant.
"""

from __future__ import annotations

from etils import epy

with epy.lazy_api_imports(globals()):
    from nalora_jax.cli.training import run
    from nalora_jax.config import (
        AdaLoRAConfig,
        ComputeConfig,
        DataConfig,
        DebugConfig,
        DistillConfig,
        LoRAConfig,
        LoRARule,
        MeshConfig,
        OptimizerConfig,
        PreferenceConfig,
        RLConfig,
        RunConfig,
        TrainConfig,
        VisionConfig,
    )
    from nalora_jax.errors import NaloraError
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.loading.adapted import AdaptedModel, load
    from nalora_jax.method.adapt import adapt, merge_nnx
    from nalora_jax.method.ffn import GatedFFN
    from nalora_jax.method.low_rank import low_rank
    from nalora_jax.method.rules import (
        CurvatureCap,
        HardMask,
        HomogeneityStep,
        SoftMask,
        SquaredMask,
    )
    from nalora_jax.method.statistics import observe, token_weights
    from nalora_jax.method.transform import (
        gate_leaves,
        make_mechanisms,
        masks,
        nalora,
        scale_by_gates,
    )
    from nalora_jax.study.sweeps.sweep_run import SweepResult, sweep
    from nalora_jax.train.run import RunResult
    from nalora_jax.weights.base import load_model
    from nalora_jax.weights.model_files import LoadedModel
    from nalora_jax.weights.peft_export import export_adapter
    from nalora_jax.weights.peft_import import import_adapter

__all__ = [  # noqa: RUF022
    # The method, in any Flax model (docs/own_models.md).
    "adapt",
    "nalora",
    "merge_nnx",
    "scale_by_gates",
    "make_mechanisms",
    "gate_leaves",
    "masks",
    "low_rank",
    "observe",
    "token_weights",
    "CurvatureCap",
    "HomogeneityStep",
    "HardMask",
    "SoftMask",
    "SquaredMask",
    "GatedFFN",
    # The trainer.
    "AdaLoRAConfig",
    "AdaptedModel",
    "ComputeConfig",
    "DataConfig",
    "DebugConfig",
    "DistillConfig",
    "Generator",
    "LoRAConfig",
    "LoRARule",
    "LoadedModel",
    "MeshConfig",
    "NaloraError",
    "OptimizerConfig",
    "PreferenceConfig",
    "RLConfig",
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
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
