"""Dual encoders: an image tower and a text tower whose features are compared."""

from nalora_jax.models.vision.config import DualConfig, EncoderConfig
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.models.vision.encoder import Encoder

__all__ = ["DualConfig", "DualEncoder", "Encoder", "EncoderConfig"]
