"""Evaluation on held-out images: classification by prompts, and retrieval by captions both ways."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.data.images.files import Limits, open_image
from nalora_jax.data.images.processor import ImageProcessor, resized_to
from nalora_jax.data.images.sources import ImageSource
from nalora_jax.data.images.text import TextTokenizer
from nalora_jax.evaluate.heldout import variables_of
from nalora_jax.evaluate.statistics import bootstrap, wilson
from nalora_jax.layout import distributed
from nalora_jax.models.vision.dual import DualEncoder, normalised

_BATCH = 64  # images or texts at a time
_THREADS = 4
_SAMPLES = 8  # images that are shown with their answers
_MOST_CLASSES = 60  # size limit of a confusion matrix
_THUMBNAIL = 64  # pixels of a thumbnail's side


@dataclass(frozen=True, eq=False)
class Images:
    """Records of a source for repeated evaluation."""

    source: ImageSource
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """Returns a digest that changes if the records may have changed."""
        return digest_of(f"{self.source.fingerprint} {self.indices.tolist()}")

    def opened(self, places: Sequence[int]) -> list[Any]:
        """Returns the RGB images at positions ``places`` of the indices."""
        indices = [int(self.indices[i]) for i in places]
        limits = Limits(max_pixels=self.source.fields.max_pixels)

        def one(pair: tuple[int, dict[str, Any]]) -> Any:
            where = self.source.where(pair[0])
            return open_image(self.source.image(pair[1], where), where, limits)

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(one, zip(indices, self.source.read(indices), strict=True)))


class Encoders:
    """Both towers, compiled once for batches of one size.

    Args:
      model: the dual encoder, with the adapters' spec.
      processor: converts images to pixels.
      tokenizer: converts texts to tokens.
    """

    def __init__(self, model: DualEncoder, processor: ImageProcessor, tokenizer: TextTokenizer) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer

        @jax.jit
        def images(variables: Any, batch: Any) -> jax.Array:
            batch = batch | {"pixels": processor.normalise(batch["pixels"])}
            return normalised(model.apply(variables, batch, method="encode_image"))

        @jax.jit
        def texts(variables: Any, batch: Any) -> jax.Array:
            return normalised(model.apply(variables, batch, method="encode_text"))

        self._images, self._texts = images, texts

    def images(self, variables: Mapping[str, Any], pictures: Sequence[Any]) -> np.ndarray:
        """Returns normalised features ``[pictures, features]`` of RGB images."""
        batches = (self.processor.batch(pictures_of_batch) for pictures_of_batch in _parts(pictures))
        return self._all(partial(self._images, variables), batches)

    def records(self, variables: Mapping[str, Any], images: Images) -> np.ndarray:
        """Returns normalised features ``[images, features]`` of records, opened batch by batch."""
        batches = (self.processor.batch(images.opened(places)) for places in _parts(range(len(images))))
        return self._all(partial(self._images, variables), batches)

    def texts(self, variables: Mapping[str, Any], texts: Sequence[str]) -> np.ndarray:
        """Returns normalised features ``[texts, features]``."""
        tokens = self.tokenizer(texts)
        parts = map(list, _parts(range(len(texts))))
        batches = ({name: value[places] for name, value in tokens.items()} for places in parts)
        return self._all(partial(self._texts, variables), batches)

    def classes(
        self, variables: Mapping[str, Any], names: Sequence[str], templates: Sequence[str]
    ) -> np.ndarray:
        """Returns normalised features ``[names, features]`` of class prompts.

        The features of several templates are averaged and normalised again.
        """
        prompts = [template.format(name) for name in names for template in templates]
        features = self.texts(variables, prompts).reshape(len(names), len(templates), -1)
        return np.asarray(normalised(jnp.asarray(features.mean(axis=1))))

    def logits(self, variables: Mapping[str, Any], images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Returns scaled cosine similarities ``[images, texts]`` of normalised features."""
        scale, bias = self.model.apply(variables, method="temperature")
        return images @ texts.T * float(distributed.fetch(scale)) + float(distributed.fetch(bias))

    def _all(self, encode: Any, batches: Iterator[Mapping[str, np.ndarray]]) -> np.ndarray:
        """Returns the features of all batches; the last one is padded to the same shape."""
        features = []
        for batch in batches:
            count = len(next(iter(batch.values())))
            wide = {
                n: np.concatenate([v, np.repeat(v[:1], _BATCH - count, axis=0)]) for n, v in batch.items()
            }
            features.append(distributed.fetch(encode(wide))[:count])
        return np.concatenate(features)


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))


class ClassEvaluator:
    """Classification accuracy by class prompts; the counterpart of `evaluate.heldout.Evaluator`.

    Args:
      encoders: the towers.
      images: held-out records.
      labels: int ``[images]``.
      classes: class names by label.
      templates: prompt templates of a class.
    """

    metric: Literal["accuracy"] = "accuracy"
    mode: Literal["max"] = "max"

    def __init__(
        self,
        encoders: Encoders,
        images: Images,
        labels: np.ndarray,
        classes: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        self._encoders, self._images, self._labels = encoders, images, labels
        self._classes, self._templates = tuple(classes), tuple(templates)
        self.digest = images.digest

    def measure(self, params: Any, lora: Any | None, *, samples: bool = False) -> dict[str, Any]:
        """Returns the metrics of ``params`` with adapter ``lora`` (None: the base alone).

        Returns:
          ``accuracy`` with ``low`` and ``high`` (95%), ``loss`` (cross-entropy), ``n``; with
          ``samples`` a few images with their predictions, ``right`` of every image, and, for up to
          60 classes, ``classes`` with the ``confusion`` matrix ``[true, predicted]``.
        """
        variables = variables_of(params, lora)
        features = self._encoders.records(variables, self._images)
        classes = self._encoders.classes(variables, self._classes, self._templates)
        logits = self._encoders.logits(variables, features, classes)
        predicted = logits.argmax(axis=1)
        right = predicted == self._labels
        chosen = np.take_along_axis(logits, self._labels[:, None], axis=1)[:, 0]
        losses = np.asarray(jax.nn.logsumexp(jnp.asarray(logits), axis=1)) - chosen
        low, high = wilson(int(right.sum()), len(right))
        values: dict[str, Any] = {"accuracy": float(right.mean()), "low": low, "high": high}
        values |= {"loss": float(losses.mean()), "n": len(right), "chance": 1 / len(self._classes)}
        if samples:
            names, true = (
                [self._classes[label] for label in labels] for labels in (predicted, self._labels)
            )
            values |= {"samples": _shown(self._images, names, true, right), "right": right.tolist()}
            if len(self._classes) <= _MOST_CLASSES:
                count = len(self._classes)
                matrix = np.bincount(self._labels * count + predicted, minlength=count * count).reshape(
                    count, count
                )
                values |= {"classes": list(self._classes), "confusion": matrix.tolist()}
        return values


class RetrievalEvaluator:
    """Recall of an image's caption and of a caption's image; counterpart of `ClassEvaluator`."""

    metric: Literal["recall"] = "recall"
    mode: Literal["max"] = "max"

    def __init__(self, encoders: Encoders, images: Images, captions: Sequence[str]) -> None:
        self._encoders, self._images, self._captions = encoders, images, list(captions)
        self.digest = images.digest

    def measure(self, params: Any, lora: Any | None, *, samples: bool = False) -> dict[str, Any]:
        """Returns the retrieval metrics of ``params`` with adapter ``lora``.

        Returns:
          ``recall`` at 1 (mean of both directions), ``low``, ``high`` (95%), ``<way>_recall_1`` and
          ``_5``, ``n``, ``loss``; with ``samples`` a few images with their best captions.
        """
        variables = variables_of(params, lora)
        images = self._encoders.records(variables, self._images)
        texts = self._encoders.texts(variables, self._captions)
        logits = self._encoders.logits(variables, images, texts)
        ranks = {"image_to_text": own_ranks(logits), "text_to_image": own_ranks(logits.T)}
        values: dict[str, Any] = {}
        for way, ranks_of_way in ranks.items():
            values |= {f"{way}_recall_{k}": float((ranks_of_way < k).mean()) for k in (1, 5)}
        hits = np.mean([ranks_of_way < 1 for ranks_of_way in ranks.values()], axis=0)
        low, high = bootstrap(hits)
        values = {"recall": float(hits.mean()), "low": low, "high": high, **values, "n": len(hits)}
        matching = np.diagonal(logits)
        sums = [np.asarray(jax.nn.logsumexp(jnp.asarray(x), axis=1)) for x in (logits, logits.T)]
        values["loss"] = float(np.mean([x - matching for x in sums]))
        if samples:
            best = [self._captions[index] for index in logits.argmax(axis=1)]
            values["samples"] = _shown(self._images, best, self._captions, ranks["image_to_text"] < 1)
        return values


def _shown(
    images: Images, answers: Sequence[str], expected: Sequence[str], correct: np.ndarray
) -> list[dict[str, Any]]:
    """Returns a few images, evenly spaced, with their answers as an evaluation reports them."""
    places = np.linspace(0, len(answers) - 1, min(_SAMPLES, len(answers))).astype(int).tolist()
    return [
        {
            "prompt": images.source.where(int(images.indices[place])),
            "image": thumbnail(image),
            "answer": answers[place],
            "expected": expected[place],
            "correct": bool(correct[place]),
        }
        for place, image in zip(places, images.opened(places), strict=True)
    ]


def own_ranks(logits: np.ndarray) -> np.ndarray:
    """Returns the number of columns with a larger value than the diagonal, by row.

    ``logits`` is ``[rows, rows]``, the result int ``[rows]``.
    """
    return np.sum(logits > np.diagonal(logits)[:, None], axis=1)


def thumbnail(image: Any) -> str:
    """Returns a small PNG as a data URL, for pages without external files."""
    buffer = io.BytesIO()
    resized_to(image, _THUMBNAIL).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
