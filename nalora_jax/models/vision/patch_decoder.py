"""A vision-language model whose tower reads packed patches of images of any shape.

The parameters are the decoder's tree with more branches::

    params: {"embed", "layers", "final_norm", "lm_head", "image": {...}, "projector": {...},
             "deepstack": {...}}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.ffn import SelfGatedFFN
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.parts import ImageFeatures, layer_scales, part_adapters
from nalora_jax.models.remat import stack_layers
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.dual_encoder import tower_adapters
from nalora_jax.models.vision.encoder import LayerNorm
from nalora_jax.models.vision.patch_config import PatchSpec
from nalora_jax.models.vision.patch_encoder import PatchEncoder, patch_norm
from nalora_jax.models.vision.vision_decoder import MergedLayer, VisionDecoder
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_rows import whole_row_sharding


class PatchDecoder(Decoder):
    """A `Decoder` whose config has a `PatchSpec`.

    `encode_images` computes the call's ``features``.
    """

    def setup(self) -> None:
        """Creates the decoder, the image tower and the projectors."""
        super().setup()
        vision = self._vision
        self.image = PatchEncoder(
            vision.tower,
            vision.merge,
            vision.taps,
            tower_adapters(self.adapters, "image"),
            self.numerics,
            self.remat,
            self.stats,
            replace(self.shardings, rows=whole_row_sharding(self.shardings.rows)),
        )
        shared = (vision, self.adapters, self.numerics, self.stats or GateStatsConfig())
        self.projector = PatchProjector(*shared)
        if vision.taps:
            self.deepstack = DeepStack(*shared)

    @property
    def _vision(self) -> PatchSpec:
        vision = self.config.vision
        assert isinstance(vision, PatchSpec)
        return vision

    def encode_images(
        self, patches: jax.Array, grids: jax.Array, *, deterministic: bool = True
    ) -> ImageFeatures:
        """Returns the features that replace the image tokens.

        Args:
          patches: float32 ``[batch, patches, patch * patch * channels]``, normalised; the patches
            of a token follow each other.
          grids: int ``[batch, images, 2]``, rows and columns of patches of each image.
          deterministic: no adapter dropout.
        """
        vision = self._vision
        x, tapped = self.image(patches, grids, deterministic=deterministic)
        # [batch, patches / merge^2]: tokens of images
        places = jnp.arange(0, patches.shape[1], vision.patch_tokens)[None, :]
        filled = jnp.sum(grids[..., 0] * grids[..., 1], axis=1, keepdims=True)
        weights = places < filled
        embeddings = self.projector(x, weights, deterministic=deterministic)
        deep = None
        if tapped is not None:
            deep = self.deepstack(tapped, weights, deterministic=deterministic)
        return ImageFeatures(embeddings, grids // vision.merge, deep)

    def __call__(self, tokens: jax.Array, **options: Any) -> Any:
        """Calls `Decoder` with the same arguments."""
        if self.is_initializing():
            vision = self._vision
            merge = vision.merge
            width = vision.tower.patch_size**2 * vision.tower.channels
            patches = jnp.zeros((1, vision.patch_tokens, width))
            self.encode_images(patches, jnp.full((1, 1, 2), merge, jnp.int32))
        return super().__call__(tokens, **options)


class PatchProjector(nn.Module):
    """The map from the tower's features of a token's patches to an embedding of the decoder."""

    vision: PatchSpec
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    @nn.compact
    def __call__(
        self, x: jax.Array, weights: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """Returns ``[batch, tokens, d_model]`` of ``[batch, patches, d]``.

        ``weights`` are the tokens' weights in the statistics.
        """
        s = self.vision
        if s.norm == "patches":
            x = patch_norm(s.tower, "norm", s.norm_eps)(x)
        # [batch, patches, d] -> [batch, tokens, patches of a token * d]
        x = x.reshape(x.shape[0], -1, s.merged)
        if s.norm == "merged":
            x = patch_norm(s.tower, "norm", s.norm_eps)(x)
        if s.narrows:
            # The patches of a token feature by feature, in the order of the kernel's inputs.
            x = x.reshape(*x.shape[:2], s.patch_tokens, -1).swapaxes(-1, -2)
            x = x.reshape(*x.shape[:2], -1)
            merged = stack_layers(MergedLayer, "none", 1)(
                s.tower.d_model,
                part_adapters(self.adapters, "projector/merged"),
                False,
                self.numerics,
                deterministic,
                name="merged",
            )
            scales = layer_scales(self.adapters, "projector").get("merged", {})
            _, narrow = merged(None, scales, x.astype(self.numerics.result))
            x = narrow[0]
        block = stack_layers(_MergedFFN, "none", 1)(
            *_sizes(s, self.adapters, "projector"),
            self.numerics,
            self.stats,
            deterministic,
            name="ffn",
        )
        scales = layer_scales(self.adapters, "projector").get("ffn", {})
        one_layer = x.astype(self.numerics.result)[None]
        _, y = block(None, (scales, one_layer), weights)
        return y[0]


class DeepStack(nn.Module):
    """The projectors of tapped layers, whose results the decoder's first layers add."""

    vision: PatchSpec
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    @nn.compact
    def __call__(
        self, x: jax.Array, weights: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """Returns ``[taps, batch, tokens, d_model]`` of ``[taps, batch, patches, d]``."""
        s = self.vision
        taps = len(s.taps)
        # [taps, batch, patches, d] -> [taps, batch, tokens, patches of a token * d]
        x = x.reshape(*x.shape[:2], -1, s.merged)
        norms = stack_layers(_LayerNorms, "none", taps)(s.tower.norm_eps, name="norm")
        _, x = norms(None, x, None)
        block = stack_layers(_MergedFFN, "none", taps)(
            *_sizes(s, self.adapters, "deepstack"),
            self.numerics,
            self.stats,
            deterministic,
            name="ffn",
        )
        scales = layer_scales(self.adapters, "deepstack").get("ffn", {})
        _, y = block(None, (scales, x.astype(self.numerics.result)), weights)
        return y


def _sizes(vision: PatchSpec, adapters: AdapterSpec, name: str) -> tuple[Any, ...]:
    """Returns the sizes, the activation and the adapters of a projector, and if it has biases."""
    of_part = part_adapters(adapters, f"{name}/ffn")
    width = vision.hidden_width
    return vision.d_model, width, vision.activation, of_part, vision.bias


class _LayerNorms(LayerNorm):
    """Layer norms of several inputs as a stack."""

    def __call__(  # the signature that `nn.scan` calls
        self, carry: None, x: jax.Array, shared: None
    ) -> tuple[None, jax.Array]:
        """Returns the carry, unchanged, and the norm of ``x``."""
        return carry, super().__call__(x)


class _MergedFFN(SelfGatedFFN):
    """The two matmuls of a projector as a layer of a stack, each with an input of its own."""

    deterministic: bool = True

    def __call__(  # the signature that `nn.scan` calls
        self, carry: None, layer: Any, weights: jax.Array
    ) -> tuple[None, jax.Array]:
        """Returns the carry, unchanged, and the block's output; ``layer`` has the adapters' scales
        and the input."""
        scales, x = layer
        return carry, super().__call__(
            x, scales, token_weights=weights, deterministic=self.deterministic
        )


def decoder_for(config: ModelConfig, *arguments: Any, **options: Any) -> Decoder:
    """Returns the module of a model: with the image tower that its config has, or a `Decoder`.

    The other arguments are passed to the module.
    """
    kind: type[Decoder] = Decoder
    if config.vision is not None:
        kind = PatchDecoder if config.vision.packed else VisionDecoder
    return kind(config, *arguments, **options)
