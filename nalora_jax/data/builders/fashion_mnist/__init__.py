"""Fashion-MNIST from Debian's package."""

from nalora_jax.data.builders.fashion_mnist.fashion_mnist_dataset_builder import Builder

__all__ = ["Builder"]
