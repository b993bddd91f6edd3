"""Needle retrieval in real text, as a TFDS data set named ``needle``."""

from nalora_jax.data.builders.needle.needle_dataset_builder import Builder

__all__ = ["Builder"]
