"""Evaluation on held-out images: classification by prompts, and retrieval by captions both ways."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.data.images.image_files import (
    ImageProcessor,
    TextTokenizer,
    resize_square,
)
from nalora_jax.data.images.opened import ImageSource
from nalora_jax.evaluate.evaluator import Evaluator, ItemRecord, variables_of
from nalora_jax.evaluate.intervals import loss_and_accuracy, recall_of
from nalora_jax.mesh import processes
from nalora_jax.models.vision.dual_encoder import DualEncoder, normalised

_BATCH = 64  # images or texts at a time
_THREADS = 4
_SAMPLES = 8  # images that are shown with their answers
_MOST_CLASSES = 60  # size limit of a confusion matrix
_WAYS = ("image_to_text", "text_to_image")
_THUMBNAIL = 64  # pixels of a thumbnail's side


@dataclass(frozen=True, eq=False)
class RecordImages:
    """Records of a source for repeated evaluation; a slice opens their RGB images."""

    source: ImageSource
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """Returns a digest that changes if the records may have changed."""
        return digest_of(f"{self.source.fingerprint} {self.indices.tolist()}")

    def places(self) -> list[str]:
        """Returns the name of every record, for messages and reports."""
        return [self.source.where(int(index)) for index in self.indices]

    def __getitem__(self, places: slice | Sequence[int]) -> list[Any]:
        """Returns the RGB images at some positions of the indices."""
        indices = self.indices[places].tolist()
        records = self.source.read(indices)
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.source.opened, indices, records))


@partial(jax.jit, static_argnames=("model", "processor"))
def _image_features(
    model: DualEncoder,
    processor: ImageProcessor,
    variables: Any,
    batch: Any,
) -> jax.Array:
    """Returns features ``[images, features]`` of length 1 of a batch of processed images."""
    batch = batch | {"pixels": processor.normalise(batch["pixels"])}
    return normalised(model.apply(variables, batch, method="encode_image"))


@partial(jax.jit, static_argnames=("model",))
def _text_features(
    model: DualEncoder,
    variables: Any,
    batch: Any,
) -> jax.Array:
    """Returns features ``[texts, features]`` of length 1 of a batch of tokenized texts."""
    return normalised(model.apply(variables, batch, method="encode_text"))


@dataclass(frozen=True)
class Encoders:
    """Both towers, compiled once for batches of one size.

    Args:
      model: the dual encoder, with the adapters' spec.
      processor: converts images to pixels.
      tokenizer: converts texts to tokens.
    """

    model: DualEncoder
    processor: ImageProcessor
    tokenizer: TextTokenizer

    def images(
        self, variables: Mapping[str, Any], pictures: RecordImages | Sequence[Any]
    ) -> np.ndarray:
        """Returns normalised features ``[pictures, features]`` of RGB images.

        The images of `RecordImages` are opened batch by batch.
        """
        encode = partial(_image_features, self.model, self.processor, variables)

        def batch_of(places: slice) -> Mapping[str, np.ndarray]:
            return self.processor.batch(pictures[places])

        return _encode_in_batches(encode, len(pictures), batch_of)

    def texts(self, variables: Mapping[str, Any], texts: Sequence[str]) -> np.ndarray:
        """Returns normalised features ``[texts, features]``."""
        encode = partial(_text_features, self.model, variables)
        tokens = self.tokenizer(texts)

        def batch_of(places: slice) -> Mapping[str, np.ndarray]:
            return {name: values[places] for name, values in tokens.items()}

        return _encode_in_batches(encode, len(texts), batch_of)

    def classes(
        self,
        variables: Mapping[str, Any],
        names: Sequence[str],
        templates: Sequence[str],
    ) -> np.ndarray:
        """Returns normalised features ``[names, features]`` of class prompts.

        The features of several templates are averaged and normalised again.
        """
        prompts: list[str] = []
        for name in names:
            prompts += [template.format(name) for template in templates]
        # [names * templates, features] -> [names, templates, features]
        features = self.texts(variables, prompts)
        by_name = features.reshape(len(names), len(templates), -1)
        mean = jnp.asarray(by_name.mean(axis=1))
        return np.asarray(normalised(mean))

    def logits(
        self,
        variables: Mapping[str, Any],
        images: np.ndarray,
        texts: np.ndarray,
    ) -> np.ndarray:
        """Returns scaled cosine similarities ``[images, texts]``.

        Args:
          variables: of the model, with its scale and bias.
          images: normalised features ``[images, features]``.
          texts: normalised features ``[texts, features]``.
        """
        on_devices = self.model.apply(variables, method="temperature")
        scale, bias = map(processes.fetch, on_devices)
        return images @ texts.T * float(scale) + float(bias)


def _encode_in_batches(
    encode: Any,
    count: int,
    batch_of: Callable[[slice], Mapping[str, np.ndarray]],
) -> np.ndarray:
    """Returns the features ``[count, features]`` of all items.

    The last batch is padded with copies of its first item, so that all batches share one program.

    Args:
      encode: returns features ``[_BATCH, features]`` of a batch of arrays.
      count: number of items.
      batch_of: returns the arrays of some of the items.
    """
    features = []
    for start in range(0, count, _BATCH):
        size = min(_BATCH, count - start)
        batch = {}
        for name, values in batch_of(slice(start, start + size)).items():
            padding = np.repeat(values[:1], _BATCH - size, axis=0)
            batch[name] = np.concatenate([values, padding])
        encoded = processes.fetch(encode(batch))
        features.append(encoded[:size])
    return np.concatenate(features)


class ClassEvaluator(Evaluator):
    """Classification accuracy by class prompts.

    Args:
      encoders: the towers.
      images: held-out records.
      labels: int ``[images]``.
      classes: class names by label.
      templates: prompt templates of a class.
    """

    metric = "accuracy"
    mode = "max"

    def __init__(
        self,
        encoders: Encoders,
        images: RecordImages,
        labels: np.ndarray,
        classes: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        """Stores the arguments, which the class describes, and the digest of the images."""
        self._encoders = encoders
        self._images = images
        self._labels = labels
        self._classes = tuple(classes)
        self._templates = tuple(templates)
        self.digest = images.digest

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns a record of each image.

        Its fields are ``prompt`` (the image's place), ``label``, ``answer`` (the predicted label),
        ``correct`` and ``loss`` (cross-entropy).
        """
        variables = variables_of(params, lora)
        features = self._encoders.images(variables, self._images)
        classes = self._encoders.classes(variables, self._classes, self._templates)
        logits = self._encoders.logits(variables, features, classes)
        columns = zip(
            self._images.places(),
            self._labels.tolist(),
            logits.argmax(axis=1).tolist(),
            _losses(logits, self._labels),
            strict=True,
        )
        records = []
        for place, label, answer, loss in columns:
            records.append(
                {
                    "prompt": place,
                    "label": label,
                    "answer": answer,
                    "correct": label == answer,
                    "loss": loss,
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the metrics of all images.

        They are ``accuracy`` with its 95% interval ``low`` and ``high``, the mean ``loss``, ``n``,
        and ``chance``, the accuracy of guessing.
        """
        return loss_and_accuracy(records) | {"chance": 1 / len(self._classes)}

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns a few images with their predictions, and ``right`` of every image.

        For up to 60 classes also ``classes`` with the ``confusion`` matrix ``[true, predicted]``.
        """
        named = []
        for record in records:
            answer = self._classes[record["answer"]]
            expected = self._classes[record["label"]]
            named.append(
                {
                    **record,
                    "answer": answer,
                    "expected": expected,
                }
            )
        values = {
            "samples": _select_samples(self._images, named),
            "right": [record["correct"] for record in records],
        }
        count = len(self._classes)
        if count <= _MOST_CLASSES:
            confusion = np.zeros((count, count), int)
            for record in records:
                confusion[record["label"], record["answer"]] += 1
            values["classes"] = list(self._classes)
            values["confusion"] = confusion.tolist()
        return values


class RetrievalEvaluator(Evaluator):
    """Recall of an image's caption and of a caption's image.

    Args:
      encoders: the towers.
      images: held-out records.
      captions: the caption of each image.
    """

    metric = "recall"
    mode = "max"

    def __init__(
        self,
        encoders: Encoders,
        images: RecordImages,
        captions: Sequence[str],
    ) -> None:
        """Stores the arguments, which the class describes, and the digest of the images."""
        self._encoders = encoders
        self._images = images
        self._captions = list(captions)
        self.digest = images.digest

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns a record of each image with its caption.

        Its fields are ``prompt`` (the image's place), ``expected`` (its caption), ``answer`` (the
        caption with the largest logit), ``image_to_text`` and ``text_to_image`` (the number of
        captions or images that are ranked before the matching one), ``correct`` (``image_to_text``
        is 0), and ``loss`` (the mean cross-entropy of both ways).
        """
        variables = variables_of(params, lora)
        images = self._encoders.images(variables, self._images)
        texts = self._encoders.texts(variables, self._captions)
        logits = self._encoders.logits(variables, images, texts)
        matching = np.arange(len(logits))  # image i belongs to caption i
        losses = [_losses(logits, matching), _losses(logits.T, matching)]
        columns = zip(
            self._images.places(),
            self._captions,
            logits.argmax(axis=1).tolist(),
            own_ranks(logits).tolist(),
            own_ranks(logits.T).tolist(),
            np.mean(losses, axis=0).tolist(),
            strict=True,
        )
        records = []
        for place, caption, best, of_image, of_text, loss in columns:
            records.append(
                {
                    "prompt": place,
                    "expected": caption,
                    "answer": self._captions[best],
                    "correct": of_image == 0,
                    "image_to_text": of_image,
                    "text_to_image": of_text,
                    "loss": loss,
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the retrieval metrics.

        Returns:
          ``recall`` at 1 (mean of both ways) with its 95% interval ``low`` and ``high``,
          ``<way>_recall_1`` and ``<way>_recall_5`` of each way, ``n``, and the mean ``loss``.
        """
        recalls = {}
        first = []  # of each way, True for the items whose match is ranked first
        for way in _WAYS:
            ranks = np.array([record[way] for record in records])
            for most in (1, 5):  # recall at 1: the match is ranked first
                recalls[f"{way}_recall_{most}"] = float((ranks < most).mean())
            first.append(ranks < 1)
        hits = np.mean(first, axis=0)  # [ways, items] -> [items]
        losses = [record["loss"] for record in records]
        return recall_of(hits) | recalls | {"loss": float(np.mean(losses))}

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns a few images with their best captions."""
        return {"samples": _select_samples(self._images, records)}


def _losses(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """Returns the cross-entropy of every row of logits ``[rows, columns]`` with its target.

    ``targets``, int ``[rows]``, are the right columns.
    """
    chosen = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    total = jax.nn.logsumexp(jnp.asarray(logits), axis=1)
    losses: list[float] = (np.asarray(total) - chosen).tolist()
    return losses


def _select_samples(
    images: RecordImages, records: Sequence[ItemRecord]
) -> list[dict[str, Any]]:
    """Returns samples for the report: a few images, evenly spaced, with their records' answers."""
    count = min(_SAMPLES, len(records))
    spaced = np.linspace(0, len(records) - 1, count)
    places = spaced.astype(int).tolist()
    samples = []
    for place, image in zip(places, images[places], strict=True):
        record = records[place]
        sample = {"prompt": record["prompt"], "image": thumbnail(image)}
        for name in ("answer", "expected", "correct"):
            sample[name] = record[name]
        samples.append(sample)
    return samples


def own_ranks(logits: np.ndarray) -> np.ndarray:
    """Returns the rank of every row's own column: the number of columns with a larger logit.

    ``logits`` is ``[rows, rows]`` with the matching pairs on the diagonal, the result int
    ``[rows]``.
    """
    return np.sum(logits > np.diagonal(logits)[:, None], axis=1)


def thumbnail(image: Any) -> str:
    """Returns a small PNG as a data URL, for pages without external files."""
    buffer = io.BytesIO()
    resize_square(image, _THUMBNAIL).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue())
    return "data:image/png;base64," + encoded.decode()
