"""Emoji images with captions and categories."""

from nalora_jax.data.builders.emoji.emoji_dataset_builder import Builder

__all__ = ["Builder"]
