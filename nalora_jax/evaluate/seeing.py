"""Held-out loss of a vision-language model on reference completions of prompts with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from nalora_jax.weights.model_files import LoadedModel

_BATCH = 8  # items


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
        items = self.completions
        rows = bucket(min(_BATCH, len(items)), multiple=prompt_shards(self._mesh))
        seq = bucket(max(len(item.prompt_ids) + len(item.completion_ids) for item in items) - 1, minimum=16)
        images = max(1, *map(len, self._pixels.values()))
        variables = prepare(variables, self._model.numerics, tables=False)
        losses: list[float] = []
        tokens: list[int] = []
        for start in range(0, len(items), rows):
            batch = self._batch(items[start : start + rows], rows, seq, images)
            log_probs = _log_probs(self._model, self._processor, variables, place_batch(batch, self._mesh))
            losses += (-fetch(log_probs).astype(np.float64).sum(axis=1)).tolist()
            tokens += batch["scored"].sum(axis=1).tolist()
        return of_completions(items, losses[: len(items)], tokens[: len(items)])

    def _batch(
        self, items: Sequence[CompletionItem], rows: int, seq: int, images: int
    ) -> dict[str, np.ndarray]:
        """Returns arrays ``[rows, seq]``, and ``pixels`` of up to ``images`` images of each row."""
        assert self._processor.output is not None
        batch = {name: np.zeros((rows, seq), np.int32) for name in ("tokens", "targets", "segments")}
        batch["scored"] = np.zeros((rows, seq), bool)
        batch["pixels"] = np.zeros((rows, images, *self._processor.output, 3), np.uint8)
        for row, item in enumerate(items):
            ids = np.array([*item.prompt_ids, *item.completion_ids], np.int32)
            last = len(ids) - 1
            batch["tokens"][row, :last], batch["targets"][row, :last] = ids[:-1], ids[1:]
            batch["segments"][row, :last] = 1
            batch["scored"][row, len(item.prompt_ids) - 1 : last] = True
            for place, image in enumerate(self._pixels[id(item)]):
                batch["pixels"][row, place] = image
        return batch

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
    loaded: LoadedModel, model: Decoder, items: Sequence[Item], mesh: Mesh | None = None
) -> TextEvaluator:
    """Returns the evaluator of a loaded model: with images if it has an image processor."""
    if loaded.processor is None:
        return TextEvaluator(model, loaded.tokenizer, items, mesh=mesh)
    return SeeingEvaluator(model, loaded.tokenizer, items, loaded.processor, mesh=mesh)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("model", "processor"))
def _log_probs(
    model: Decoder, processor: ImageProcessor, variables: Any, batch: Mapping[str, jax.Array]
) -> jax.Array:
    features = model.apply(variables, processor.normalise(batch["pixels"]), method="see")
    hidden = model.apply(variables, batch["tokens"], segment_ids=batch["segments"], features=features)
    return target_log_probs(model, variables, hidden, batch["targets"], batch["scored"])[0]
