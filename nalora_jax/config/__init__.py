"""A run's settings: frozen dataclasses with the default and a comment of every field.

The command line (``train.py``, ``nalora train``) is generated from these classes, including the
comments. An experiment in ``configs/`` is a Python file whose ``config()`` returns a `RunConfig`
that sets only the values that differ from the defaults. The defaults are the main job:
SmolLM2-135M-Instruct on SocialIQA, on two CPU cores.
"""

from __future__ import annotations

from nalora_jax.config.checks import check
from nalora_jax.config.settings import (
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
    Remat,
    RLConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
    config_from_dict,
)
from nalora_jax.config.structured import ranges

__all__ = [
    "RANGES", "AdaLoRAConfig", "ComputeConfig", "DataConfig", "DebugConfig", "DistillConfig",
    "LoRAConfig", "LoRARule", "MeshConfig", "OptimizerConfig", "PreferenceConfig", "RLConfig",
    "Remat", "RunConfig", "TrainConfig", "VisionConfig", "check", "config_from_dict",
]  # fmt: skip

RANGES = ranges(RunConfig)  # of every number of a run, by dotted name
