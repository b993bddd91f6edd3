"""Decoder families, described by configuration."""

# `ModelConfig.from_hf` calls the reader that this module registers.
import nalora_jax.models.families  # noqa: F401
