"""Images: safe decoding, preprocessing as defined by models, and augmentation by (seed, step)."""

from nalora_jax.data.images.files import Limits, open_image
from nalora_jax.data.images.processor import ImageProcessor

__all__ = ["ImageProcessor", "Limits", "open_image"]
