"""Evaluates a vision-language model by the loss of reference completions of prompts with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.images.image_chat import AnyProcessor, rgb_image
from nalora_jax.data.images.image_files import MAX_PIXELS
from nalora_jax.data.items import CompletionItem, VisionItem
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.generate.generator import make_completer
from nalora_jax.evaluate.generate.programs import bucket
from nalora_jax.evaluate.likelihood import Score, target_log_probs
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.mesh.distributed import place_batch, prompt_shards
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.storage import prepare

if TYPE_CHECKING:
    pass

_BATCH = 8  # items


class VisionEvaluator(TextEvaluator):
    """`TextEvaluator` of prompts with images; the metric is the loss per completion token.

    Args:
      model: the vision-language model, with the adapters' spec.
      tokenizer: its tokenizer, which has image tokens.
      items: prompts with images and their reference completions.
      processor: converts images to pixels.
      mesh: mesh of the weights, if they are sharded.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        items: Sequence[VisionItem],
        processor: AnyProcessor,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Opens and processes the images of all items, which stay in memory.

        Raises:
          NaloraError: an image cannot be opened, or there are no items.
        """
        answers = make_completer(model, tokenizer, mesh, processor)
        super().__init__(model, answers, items, mesh=mesh)
        assert tokenizer.images is not None
        self._processor: Any = processor
        self._image = tokenizer.images.expansion
        for item in items:
            pixels: list[Any] = []  # each image, as the processor prepares it
            for image in item.images:
                upright = rgb_image(image, "image", MAX_PIXELS)
                pixels.append(processor.prepare(upright))
            self._pixels[id(item)] = processor.together(pixels)

    def _scores(self, variables: Mapping[str, Any]) -> list[list[Score]]:
        """Returns one list for every item, with the score of its completion.

        Every batch has the same shapes: ``rows`` items (the last batch is padded), ``seq`` tokens
        of each and ``images`` images of each, rounded up for few distinct programs.
        """
        items = self.completions
        rows = bucket(min(_BATCH, len(items)), multiple=prompt_shards(self._mesh))
        lengths = [len(item.prompt_ids) + len(item.completion_ids) for item in items]
        seq = bucket(max(lengths) - 1, minimum=16)
        places = self._processor.places(list(self._pixels.values()))
        variables = prepare(variables, self._model.numerics, tables=False)
        scores: list[list[Score]] = []
        for start in range(0, len(items), rows):
            batch = self._batch(items[start : start + rows], rows, seq, places)
            placed = place_batch(batch, self._mesh)
            log_probs, greedy = _log_probs(
                self._model, self._processor, variables, placed
            )
            # [rows, seq] -> [rows]
            sums = fetch(log_probs).astype(np.float64).sum(axis=1)
            counts = batch["scored"].sum(axis=1)
            all_greedy = fetch(greedy).sum(axis=1) == counts
            columns = zip(
                sums.tolist(), counts.tolist(), all_greedy.tolist(), strict=True
            )
            for score in columns:
                scores.append([Score(*score)])
        return scores[: len(items)]  # without padding rows

    def _batch(
        self,
        items: Sequence[CompletionItem],
        rows: int,
        seq: int,
        places: tuple[int, ...],
    ) -> dict[str, np.ndarray]:
        """Returns one batch for `_log_probs`.

        Args:
          items: of the batch.
          rows: number of rows, of which the last ones may be padding.
          seq: length of a row.
          places: sizes of the processor's arrays.

        Returns:
          ``tokens`` (the model's input), ``targets`` (the next tokens) and ``segments`` (1, or 0
          for padding), int32 ``[rows, seq]``; ``scored``, bool ``[rows, seq]``, True for targets
          of the completion; and the processor's arrays of images.
        """
        shape = (rows, seq)
        tokens = np.zeros(shape, np.int32)
        targets = np.zeros(shape, np.int32)
        segments = np.zeros(shape, np.int32)
        scored = np.zeros(shape, bool)
        images: list[Sequence[Any]] = [()] * rows
        for row, item in enumerate(items):
            ids = [*item.prompt_ids, *item.completion_ids]
            last = len(ids) - 1
            tokens[row, :last] = ids[:-1]
            targets[row, :last] = ids[1:]
            segments[row, :last] = 1
            # The last token of the prompt predicts the first of the completion.
            scored[row, len(item.prompt_ids) - 1 : last] = True
            images[row] = self._pixels[id(item)]
        return {
            "tokens": tokens,
            "targets": targets,
            "segments": segments,
            "scored": scored,
            **self._processor.arrays(images, places),
        }


@partial(jax.jit, static_argnames=("model", "processor"))
def _log_probs(
    model: Decoder,
    processor: AnyProcessor,
    variables: Any,
    batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `target_log_probs`, ``[rows, seq]``, for prompts with images."""
    features = model.apply(variables, *processor.inputs(batch), method="encode_images")
    hidden = model.apply(
        variables, batch["tokens"], segment_ids=batch["segments"], features=features
    )
    return target_log_probs(model, variables, hidden, batch["targets"], batch["scored"])
