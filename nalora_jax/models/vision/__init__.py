"""Dual encoders: towers that turn images or text into features, and the pair that compares them."""

# Its reader of config.json is what `DualConfig.from_hf` calls.
import nalora_jax.models.vision.families  # noqa: F401
from nalora_jax.models.vision.config import DualConfig, EncoderConfig
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.models.vision.encoder import Encoder

__all__ = ["DualConfig", "DualEncoder", "Encoder", "EncoderConfig"]
