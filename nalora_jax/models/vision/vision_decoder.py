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

from nalora_jax.method.ffn import SelfGatedFFN
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.parts import RMSNorm, layer_scales, part_adapters
from nalora_jax.models.remat import stacked
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.dual_encoder import tower_adapters
from nalora_jax.models.vision.encoder import Encoder, PlainDense
from nalora_jax.models.vision.vision_config import VisionSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_rows import of_whole_rows


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
            replace(self.shardings, rows=of_whole_rows(self.shardings.rows)),
        )
        self.image = Encoder(
            vision.running, tower_adapters(self.adapters, "image"), *shared
        )
        self.projector = Projector(
            vision, self.adapters, self.numerics, self.stats or GateStatsConfig()
        )

    def encode_images(
        self,
        pixels: jax.Array,
        counts: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns the features that replace the image tokens.

        Args:
          pixels: float32 ``[batch, images, height, width, channels]``, normalised.
          counts: int ``[batch]``, number of real images in each row; default: all. Statistics count
            only real images.
          deterministic: no adapter dropout.

        Returns:
          ``[batch, images * tokens, d_model]``.
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
        return y.reshape(batch, images * vision.tokens, vision.d_model)

    def __call__(self, tokens: jax.Array, **options: Any) -> Any:
        """Calls `Decoder` with the same arguments."""
        if self.is_initializing():
            vision: Any = self.config.vision
            tower = vision.tower
            self.encode_images(
                jnp.zeros((1, 1, tower.image_size, tower.image_size, tower.channels))
            )
        return super().__call__(tokens, **options)


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
        adapters = part_adapters(self.adapters, "projector/ffn")
        scales = layer_scales(self.adapters, "projector").get("ffn", {})
        shape = (s.d_model, s.d_model, s.activation, adapters, s.bias)
        layers = stacked(_ProjectorLayer, "none", 1)(
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
