"""Turns records into batches: sources, chat templates, packing and the checkpointable pipeline.

This package never imports models. Names are imported on first use, so that an image processor does
not import Grain and its dependencies.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "BatchIterator": "pipeline",
    "ChoiceItem": "items",
    "CompletionItem": "items",
    "Item": "items",
    "Source": "sources",
    "TrainData": "pipeline",
    "eval_examples": "questions",
    "open_source": "sources",
    "train_data": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
