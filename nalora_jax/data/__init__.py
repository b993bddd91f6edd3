"""Records to batches: sources, chat templates, packing, and the checkpointable pipeline. Never imports models."""

from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.data.pipeline import BatchIterator, TrainData, train_data
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.sources import Source, open_source

__all__ = [
    "BatchIterator",
    "ChoiceItem",
    "CompletionItem",
    "Item",
    "Source",
    "TrainData",
    "eval_examples",
    "open_source",
    "train_data",
]
