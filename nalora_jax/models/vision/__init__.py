"""Dual encoders: towers that turn images or text into features, and the pair that compares them."""

from nalora_jax.models.vision.config import DualConfig, EncoderConfig
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.models.vision.encoder import Encoder

__all__ = ["DualConfig", "DualEncoder", "Encoder", "EncoderConfig"]
