"""Held-out loss of a vision-language model on reference completions of prompts with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.images.chat import opened
from nalora_jax.data.images.files import MAX_PIXELS, ImageProcessor
from nalora_jax.data.items import CompletionItem, Item, SeenItem
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.evaluator import SAMPLE_TOKENS
from nalora_jax.evaluate.generate import Completion, Generator
from nalora_jax.evaluate.generate.programs import bucket, place_batch, prompt_shards
from nalora_jax.evaluate.likelihood import target_log_probs
from nalora_jax.evaluate.text import TextEvaluator, of_completions
from nalora_jax.layout.distributed import fetch
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.storage import prepare

_BATCH = 8  # items


class TextModel(Protocol):
    """A loaded model, as far as evaluation needs it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Returns its tokenizer."""

    @property
    def processor(self) -> ImageProcessor | None:
        """Returns its image processor; None for a language model."""


class SeeingEvaluator(TextEvaluator):
    """`TextEvaluator` of prompts with images; the metric is the loss per completion token."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        items: Sequence[SeenItem],
        processor: ImageProcessor,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(model, tokenizer, items, mesh=mesh)
        self._processor = processor
        self._pixels = {
            id(item): [processor(opened(i, "image", MAX_PIXELS))["pixels"] for i in item.images]
            for item in items
        }

    def _completion_records(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        pixels = [self._pixels[id(item)] for item in self.completions]
        losses, tokens = seen_losses(
            self._model, variables, self.completions, pixels, self._processor, mesh=self._mesh
        )
        return of_completions(self.completions, losses.tolist(), tokens.tolist())

    def _generated(self, variables: Mapping[str, Any], items: Sequence[CompletionItem]) -> list[Completion]:
        generator = Generator(
            self._model, variables, self._tokenizer, mesh=self._mesh, processor=self._processor
        )
        return generator.complete(
            [item.prompt_ids for item in items],
            images=[self._pixels[id(item)] for item in items],
            max_new_tokens=SAMPLE_TOKENS,
        )

    def _shown(self, prompt: str) -> str:
        assert self._tokenizer.images is not None
        return prompt.replace(self._tokenizer.images.expansion, "[image]")


def evaluator_of(
    loaded: TextModel, model: Decoder, items: Sequence[Item], mesh: Mesh | None = None
) -> TextEvaluator:
    """Returns the evaluator of a loaded model: with images if it has an image processor."""
    if loaded.processor is None:
        return TextEvaluator(model, loaded.tokenizer, items, mesh=mesh)
    return SeeingEvaluator(model, loaded.tokenizer, items, loaded.processor, mesh=mesh)  # type: ignore[arg-type]


def seen_losses(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[Any],
    pixels: Sequence[Sequence[np.ndarray]],
    processor: ImageProcessor,
    *,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the summed loss ``[items]`` of each reference completion after its prompt and images, and its tokens.

    Args:
      model: a decoder with the method `see`.
      variables: ``params``, and ``lora`` if there are adapters.
      items: tokenized prompts and completions.
      pixels: processed images of each item: uint8 ``[height, width, 3]``.
      processor: converts pixels to floats.
      mesh: mesh of the weights, if they are sharded.
    """
    rows = bucket(min(_BATCH, len(items)), multiple=prompt_shards(mesh))
    seq = bucket(max(len(item.prompt_ids) + len(item.completion_ids) for item in items) - 1, minimum=16)
    places = max(1, *(len(images) for images in pixels))
    variables = prepare(variables, model.numerics, tables=False)
    sums, counts = [], []
    for start in range(0, len(items), rows):
        chunk = items[start : start + rows]
        batch = _batch(chunk, pixels[start : start + rows], processor, rows, seq, places)
        log_probs = fetch(_log_probs(model, processor, variables, place_batch(batch, mesh)))[: len(chunk)]
        sums.append(-log_probs.astype(np.float64).sum(axis=1))
        counts.append(batch["scored"][: len(chunk)].sum(axis=1))
    return np.concatenate(sums), np.concatenate(counts)


def _batch(
    items: Sequence[Any],
    pixels: Sequence[Sequence[np.ndarray]],
    processor: ImageProcessor,
    rows: int,
    seq: int,
    places: int,
) -> dict[str, np.ndarray]:
    assert processor.output is not None
    tokens, targets, segments = (np.zeros((rows, seq), np.int32) for _ in range(3))
    scored, pixel_rows = (
        np.zeros((rows, seq), bool),
        np.zeros((rows, places, *processor.output, 3), np.uint8),
    )
    for row, (item, images) in enumerate(zip(items, pixels, strict=True)):
        ids = np.array([*item.prompt_ids, *item.completion_ids], np.int32)
        last = len(ids) - 1
        tokens[row, :last], targets[row, :last], segments[row, :last] = ids[:-1], ids[1:], 1
        scored[row, len(item.prompt_ids) - 1 : last] = True
        for place, image in enumerate(images):
            pixel_rows[row, place] = image
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "scored": scored,
        "pixels": pixel_rows,
    }


@partial(jax.jit, static_argnames=("model", "processor"))
def _log_probs(
    model: Decoder, processor: ImageProcessor, variables: Any, batch: Mapping[str, jax.Array]
) -> jax.Array:
    features = model.apply(variables, processor.normalise(batch["pixels"]), method="see")
    hidden = model.apply(variables, batch["tokens"], segment_ids=batch["segments"], features=features)
    return target_log_probs(model, variables, hidden, batch["targets"], batch["scored"])[0]
