"""Dual encoders: an image tower and a text tower whose features are compared."""

# `DualConfig.from_hf` calls the reader that this module registers.
import nalora_jax.models.vision.families  # noqa: F401
from nalora_jax.models.vision.config import DualConfig, EncoderConfig
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.models.vision.encoder import Encoder

__all__ = ["DualConfig", "DualEncoder", "Encoder", "EncoderConfig"]
