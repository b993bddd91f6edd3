"""Decoder families by configuration."""

# Its reader of config.json is what `ModelConfig.from_hf` calls.
import nalora_jax.models.families  # noqa: F401
