"""Objectives of dual encoders: classification by class prompts, and image-caption contrast.

The contrastive losses are computed over the global batch: every device compares its rows with all
features, and only the features are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.axes import BATCH_AXES
from nalora_jax.data.images.files import ImageProcessor
from nalora_jax.method.step import Batch, Evaluated
from nalora_jax.models.vision.dual import DualEncoder, normalised

# Key of the class prompts in ``params``, next to the weights.
CLASSES = "classes"


@dataclass(frozen=True)
class Towers:
    """Both towers of a dual encoder, as the losses call them."""

    model: DualEncoder
    processor: ImageProcessor
    mesh: Mesh | None = None

    def images(self, variables: Mapping[str, Any], batch: Batch, key: jax.Array) -> jax.Array:
        """Returns normalised features ``[rows, features]`` of uint8 ``pixels``."""
        inputs = {name: batch[name] for name in ("shapes", "mask") if name in batch}
        inputs["pixels"] = self.processor.normalise(batch["pixels"])
        return self._encode("image", variables, inputs, key)

    def texts(self, variables: Mapping[str, Any], batch: Batch, key: jax.Array) -> jax.Array:
        """Returns normalised features ``[rows, features]`` of ``tokens``."""
        return self._encode("text", variables, {n: batch[n] for n in ("tokens", "token_weights")}, key)

    def temperature(self, variables: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns the scale and the offset of the cosine similarities."""
        temperature: tuple[jax.Array, jax.Array] = self.model.apply(variables, method="temperature")
        return temperature

    def _encode(self, tower: str, variables: Mapping[str, Any], inputs: Batch, key: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"method": f"encode_{tower}", "rngs": {"dropout": key}}
        return normalised(self.model.apply(variables, inputs, deterministic=False, **options))


@dataclass(frozen=True)
class Classify:
    """Cross-entropy of an image's class among the prompts of all classes.

    If training does not change the text tower, ``params["classes"]`` holds ``features [classes,
    features]``, computed once. Otherwise it holds ``tokens`` and ``token_weights`` ``[classes,
    prompts, seq]``, which every step encodes.
    """

    towers: Towers

    def loss(self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has ``pixels`` and ``labels [rows]``.
        """
        first, second = jax.random.split(key)
        images = self.towers.images(variables, batch, first)
        classes = class_features(self.towers, variables, params[CLASSES], second)
        scale, _ = self.towers.temperature(variables)
        logits = scale * jnp.einsum("if,cf->ic", images, classes, precision="highest")
        chosen = jnp.take_along_axis(logits, batch["labels"][:, None], axis=1)[:, 0]
        return Evaluated(jnp.sum(jax.nn.logsumexp(logits, axis=1) - chosen))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the number of images, twice."""
        rows = jnp.float32(batch["labels"].shape[0])
        return rows, rows


def class_features(
    towers: Towers, variables: Mapping[str, Any], classes: Mapping[str, jax.Array], key: jax.Array
) -> jax.Array:
    """Returns normalised features ``[classes, features]``.

    The features of several prompts are averaged and normalised again.
    """
    if "features" in classes:
        return classes["features"]
    count, prompts, _ = classes["tokens"].shape
    flat = {name: value.reshape(count * prompts, -1) for name, value in classes.items()}
    features = towers.texts(variables, flat, key)
    return normalised(jnp.mean(features.reshape(count, prompts, -1), axis=1))


@dataclass(frozen=True)
class Contrast:
    """Contrastive loss of images and captions over all rows of the global batch."""

    towers: Towers
    kind: Literal["softmax", "sigmoid"] = "softmax"

    def loss(self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has ``pixels``, ``tokens`` and ``token_weights``.
        """
        del params
        first, second = jax.random.split(key)
        images = self.towers.images(variables, batch, first)
        texts = self.towers.texts(variables, batch, second)
        scale, bias = self.towers.temperature(variables)
        function = sigmoid_contrastive
        if self.kind == "softmax":
            function = softmax_contrastive
        return Evaluated(function(images, texts, scale, bias, self.towers.mesh))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the number of pairs, twice."""
        rows = jnp.float32(batch["tokens"].shape[0])
        return rows, rows


def softmax_contrastive(
    images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Returns CLIP's loss (arXiv 2103.00020), summed over rows: the mean of both cross-entropies.

    Args:
      images, texts: normalised ``[rows, features]``; row i of one belongs to row i of the other.
      scale: scale of the cosine similarities.
      bias: unused; a softmax does not depend on it.
      mesh: devices that the rows are split over; each compares its rows with all rows.
    """
    del bias
    own_images, own_texts = (_rows(x, mesh) for x in (images, texts))
    total = jnp.zeros((), jnp.float32)
    for anchors, candidates, pair in ((own_images, texts, own_texts), (own_texts, images, own_images)):
        logits = scale * jnp.einsum(
            "if,jf->ij", anchors, _everybodys(candidates, mesh), precision="highest"
        )
        total += jnp.sum(jax.nn.logsumexp(logits, axis=1) - scale * jnp.sum(anchors * pair, axis=1))
    return total / 2


def sigmoid_contrastive(
    images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """Returns SigLIP's loss (arXiv 2303.15343), summed over rows: binary cross-entropy by pair."""
    own_images, own_texts = (_rows(x, mesh) for x in (images, texts))
    logits = (
        scale * jnp.einsum("if,jf->ij", own_images, _everybodys(texts, mesh), precision="highest") + bias
    )
    matching = scale * jnp.sum(own_images * own_texts, axis=1) + bias
    # -log sigmoid(-x) = softplus(x) of all pairs; matching ones: softplus(-x) = softplus(x) - x.
    return jnp.sum(jax.nn.softplus(logits)) - jnp.sum(matching)


def _rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains the rows of ``x`` to be split over the batch axes."""
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))


def _everybodys(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains ``x`` to be replicated on every device."""
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
