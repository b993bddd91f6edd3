"""Text generation: KV cache, sampling, streaming."""

from nalora_jax.evaluate.generate.generator import (
    Completion,
    GenerationSettings,
    Generator,
)

__all__ = ["Completion", "GenerationSettings", "Generator"]
