"""Files in and out."""

from nalora_jax.weights.model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
