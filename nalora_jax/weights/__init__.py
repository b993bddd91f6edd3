"""Reading and writing of model and adapter files."""

from nalora_jax.weights.model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
