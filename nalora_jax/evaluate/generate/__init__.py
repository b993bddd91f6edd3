"""Text generation: KV cache, sampling, streaming."""

from nalora_jax.evaluate.generate.generator import Completion, Generator, Settings

__all__ = ["Completion", "Generator", "Settings"]
