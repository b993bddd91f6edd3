"""A vision-language model: the unchanged decoder, an image tower and a projector between them.

The parameters are the decoder's tree with two more branches, so that code for decoders accepts it::

    params: {"embed", "layers", "final_norm", "lm_head", "image": {...}, "projector": {...}}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.ffn import Adapters, SelfGatedFFN
from nalora_jax.method.low_rank import adapted_dense
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.parts import RMSNorm, layer_scales, part_adapters
from nalora_jax.models.remat import stack_layers
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.dual_encoder import tower_adapters
from nalora_jax.models.vision.encoder import Encoder, PlainDense
from nalora_jax.models.vision.vision_config import VisionSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_rows import whole_row_sharding


class VisionDecoder(Decoder):
    """A `Decoder` whose config has a `VisionSpec`.

    `encode_images` computes the call's ``features``.
    """

    def setup(self) -> None:
        """Creates the decoder, the image tower and the projector."""
        super().setup()
        vision = self.config.vision
        assert isinstance(vision, VisionSpec)
        shared = (
            self.numerics,
            self.remat,
            self.stats,
            replace(self.shardings, rows=whole_row_sharding(self.shardings.rows)),
        )
        self.image = Encoder(
            vision.running, tower_adapters(self.adapters, "image"), *shared
        )
        self.projector = Projector(
            vision, self.adapters, self.numerics, self.stats or GateStatsConfig()
        )
        if vision.line_breaks:
            self.line_break = LineBreak(vision.d_model)

    def encode_images(
        self,
        pixels: jax.Array,
        counts: jax.Array | None = None,
        features: jax.Array | None = None,
        shares: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns the features that replace the image tokens.

        Args:
          pixels: float32 ``[batch, images, height, width, channels]``, normalised. Tiles count as
            images.
          counts: int ``[batch]``, number of real images in each row; default: all. Statistics count
            only real images.
          features: int ``[batch, places, corners]``, the features of the images of a row of which
            each token is a sum; the one after the last is that of a line break. By default the
            features in order.
          shares: float32, the same shape: factors of these features.
          deterministic: no adapter dropout.

        Returns:
          ``[batch, images * tokens, d_model]``, or ``[batch, places, d_model]``.
        """
        vision = self.config.vision
        assert isinstance(vision, VisionSpec)
        batch, images = pixels.shape[:2]
        real = None  # bool [batch * images]: images that are not padding
        if counts is not None:
            real = (jnp.arange(images)[None] < counts[:, None]).reshape(-1)

        def weights(seq: int) -> jax.Array | None:
            """Returns the weights ``[batch * images, seq]`` of tokens in the statistics."""
            if real is None:
                return None
            return jnp.broadcast_to(real[:, None], (batch * images, seq))

        tower = vision.tower
        # The tower reads [batch * images, height, width, channels] and returns
        # [batch * images, patches, d]; the projector returns [batch * images, tokens, d_model].
        x = self.image(
            pixels.reshape(-1, *pixels.shape[2:]),
            token_weights=weights(tower.grid**2 + tower.class_token),
            deterministic=deterministic,
            pooled=False,
        )
        x = x[:, int(vision.drop_first) :]
        y = self.projector(x, weights(vision.tokens), deterministic=deterministic)
        y = y.reshape(batch, images * vision.tokens, vision.d_model)
        if not vision.line_breaks:
            return y
        ends = jnp.broadcast_to(self.line_break(), (batch, 1, vision.d_model))
        y = jnp.concatenate([y, ends.astype(y.dtype)], axis=1)
        if features is None:
            return y
        assert shares is not None
        return _weighted(y, features, shares)

    def __call__(self, tokens: jax.Array, **options: Any) -> Any:
        """Calls `Decoder` with the same arguments."""
        if self.is_initializing():
            vision = self.config.vision
            assert isinstance(vision, VisionSpec)
            tower = vision.tower
            self.encode_images(
                jnp.zeros((1, 1, tower.image_size, tower.image_size, tower.channels))
            )
        return super().__call__(tokens, **options)


class LineBreak(nn.Module):
    """The frozen feature at the end of each row of an image in tiles."""

    d_model: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns ``[d_model]``."""
        feature = self.param("feature", nn.initializers.normal(0.02), (self.d_model,))
        return jax.lax.stop_gradient(feature)


def _weighted(y: jax.Array, features: jax.Array, shares: jax.Array) -> jax.Array:
    """Returns weighted sums ``[batch, places, d]`` of features ``[batch, features, d]``.

    ``features`` and ``shares`` are ``[batch, places, corners]``.
    """
    total = jnp.zeros((*features.shape[:2], y.shape[-1]), jnp.float32)
    for corner in range(features.shape[-1]):
        rows = jnp.take_along_axis(y, features[..., corner, None], axis=1)
        total = total + rows * shares[..., corner, None].astype(jnp.float32)
    return total.astype(y.dtype)


class Projector(nn.Module):
    """The map from the tower's features to the decoder's embeddings."""

    vision: VisionSpec
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    @nn.compact
    def __call__(
        self, x: jax.Array, weights: jax.Array | None, *, deterministic: bool
    ) -> jax.Array:
        """Returns ``[images, tokens, d_model]`` of ``[images, patches, d]``.

        ``weights`` are the tokens' weights in the statistics.
        """
        s = self.vision
        if s.projector == "pooled":
            x = pooled_patches(x.astype(jnp.float32), s.tokens)
            x = RMSNorm(s.tower.norm_eps, 1.0, name="norm")(x)
            return PlainDense(s.d_model, False, self.numerics, name="projection")(x)
        if s.projector == "merged":
            x = merged_patches(x, s.merge).astype(self.numerics.result)
            adapters = part_adapters(self.adapters, "projector/merged")
            scales = layer_scales(self.adapters, "projector").get("merged", {})
            merged = stack_layers(MergedLayer, "none", 1)(
                s.d_model, adapters, s.bias, self.numerics, deterministic, name="merged"
            )
            _, y = merged(None, scales, x)
            return y[0]
        adapters = part_adapters(self.adapters, "projector/ffn")
        scales = layer_scales(self.adapters, "projector").get("ffn", {})
        shape = (s.d_model, s.d_model, s.activation, adapters, s.bias)
        layers = stack_layers(_ProjectorLayer, "none", 1)(
            *shape, self.numerics, self.stats, deterministic, name="ffn"
        )
        _, y = layers(None, scales, (x.astype(self.numerics.result), weights))
        return y[0]


class _ProjectorLayer(SelfGatedFFN):
    """The two matmuls of an MLP projector as a stack of one layer.

    Adapters and statistics then have the same shapes as in other stacks.
    """

    deterministic: bool = True

    def __call__(  # the signature that `nn.scan` calls
        self, carry: None, scales: dict[str, jax.Array], inputs: Any
    ) -> tuple[None, jax.Array]:
        """Returns the carry, unchanged, and the block's output; ``inputs`` are x and its token
        weights."""
        x, weights = inputs
        return carry, super().__call__(
            x, scales, token_weights=weights, deterministic=self.deterministic
        )


class MergedLayer(nn.Module):
    """One matmul as a stack of one layer, so that its adapter has the shapes of other stacks."""

    features: int
    adapters: Adapters
    use_bias: bool
    numerics: Numerics = Numerics()
    deterministic: bool = True

    @nn.compact
    def __call__(  # the signature that `nn.scan` calls
        self, carry: None, scales: dict[str, jax.Array], x: jax.Array
    ) -> tuple[None, jax.Array]:
        """Returns the carry, unchanged, and ``[images, tokens, features]``."""
        dense = self.adapters.dense(
            "out_proj",
            x.shape[-1],
            self.features,
            scales,
            bias=self.use_bias,
            deterministic=self.deterministic,
        )
        return carry, adapted_dense(x, dense, self.numerics).y


def merged_patches(x: jax.Array, merge: int) -> jax.Array:
    """Returns the features of squares of patches, ``[images, patches / merge^2, merge^2 d]``.

    ``x`` is ``[images, side * side, d]``. Those of a square are row by row.
    """
    images, patches, d = x.shape
    side = round(patches**0.5)
    few = side // merge
    # [images, rows of squares, rows in a square, columns of squares, columns in a square, d]
    x = x.reshape(images, few, merge, few, merge, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, few * few, merge * merge * d)


def pooled_patches(x: jax.Array, tokens: int) -> jax.Array:
    """Returns means over squares of patches: ``[images, tokens, d]``.

    ``x`` is ``[images, side * side, d]``.
    """
    images, patches, d = x.shape
    side = round(patches**0.5)
    few = round(tokens**0.5)
    each = side // few
    # [images, rows of squares, rows in a square, columns of squares, columns in a square, d]
    return (
        x.reshape(images, few, each, few, each, d)
        .mean(axis=(2, 4))
        .reshape(images, tokens, d)
    )
