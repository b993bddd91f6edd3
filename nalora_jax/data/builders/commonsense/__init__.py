"""The commonsense suite of the LoRA literature, as a TFDS data set named ``commonsense``."""

from nalora_jax.data.builders.commonsense.commonsense_dataset_builder import Builder

__all__ = ["Builder"]
