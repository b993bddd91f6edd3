"""Two towers and the comparison of their features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.adapters import fresh_adapters
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.encoder import Encoder
from nalora_jax.models.vision.vision_config import DualConfig, EncoderConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import UNSHARDED, Shardings

# CLIP's initial temperature is log(1 / 0.07); SigLIP starts at log 10 and a bias of -10.
_START = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10.0)}
_START_BIAS = -10.0


class DualEncoder(nn.Module):
    """An image tower and a text tower; for the attributes see `Encoder`."""

    config: DualConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    remat: str = "none"
    stats: GateStatsConfig | None = None
    shardings: Shardings = UNSHARDED

    def setup(self) -> None:
        """Creates both towers."""
        shared = (self.numerics, self.remat, self.stats, self.shardings)
        self.image = Encoder(
            self.config.image, tower_adapters(self.adapters, "image"), *shared
        )
        self.text = Encoder(
            self.config.text, tower_adapters(self.adapters, "text"), *shared
        )

    def __call__(
        self,
        images: Mapping[str, jax.Array],
        texts: Mapping[str, jax.Array],
        **options: Any,
    ) -> jax.Array:
        """Returns float32 logits ``[images, texts]``; options are passed to both towers."""
        return self.logits(
            self.encode_image(images, **options), self.encode_text(texts, **options)
        )

    def encode_image(
        self, images: Mapping[str, jax.Array], **options: Any
    ) -> jax.Array:
        """Returns float32 features ``[batch, features]`` of images, not normalised.

        ``images`` has ``pixels``, and ``shapes`` and ``mask`` if the family takes them; see
        `Encoder`.
        """
        patches = {name: images[name] for name in ("shapes", "mask") if name in images}
        return self.image(images["pixels"], **patches, **options)

    def encode_text(self, texts: Mapping[str, jax.Array], **options: Any) -> jax.Array:
        """Returns float32 features ``[batch, features]`` of ``tokens``, not normalised.

        ``token_weights`` are the tokens' weights in the statistics. Tokens of weight 0 are masked
        in attention, too, except in families that were trained to attend to padding (SigLIP).
        """
        weights = texts.get("token_weights")
        if self.config.text.pooling == "last" or weights is None:
            mask = None
        else:
            mask = weights > 0
        return self.text(texts["tokens"], mask=mask, token_weights=weights, **options)

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Returns the scaled cosines of features, float32 ``[images, texts]``.

        The inputs are ``[images, features]`` and ``[texts, features]``.
        """
        scale, bias = self.temperature()
        # [images, features] x [texts, features] -> [images, texts]
        cosines = jnp.einsum(
            "if,tf->it", normalised(images), normalised(texts), precision="highest"
        )
        return cosines * scale + bias

    def temperature(self) -> tuple[jax.Array, jax.Array]:
        """Returns the factor and the bias of the cosines, float32 scalars."""
        return jnp.exp(self._scalar("logit_scale")), self._scalar("logit_bias")

    def _scalar(self, name: str) -> jax.Array:
        """Returns a trained or frozen scalar as float32; 0 if the pair has none."""
        value: jax.Array = self.get_variable(
            "lora", name, self.get_variable("params", name, jnp.zeros(()))
        )
        return value.astype(jnp.float32)


def normalised(x: jax.Array) -> jax.Array:
    """Returns float32 ``x`` with rows scaled to length 1."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def tower_adapters(spec: AdapterSpec, tower: str) -> AdapterSpec:
    """Returns the adapters of one tower, by the tower's own paths."""
    prefix = f"{tower}/"
    return replace(
        spec,
        targets=tuple(
            (p.removeprefix(prefix), t) for p, t in spec.targets if p.startswith(prefix)
        ),
    )


# ---------------------------------------------------------------- fresh trees


def init_params(
    config: DualConfig | EncoderConfig, key: jax.Array, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Returns random base weights of a tower or a pair.

    They serve tests, benchmarks, and projections that are trained from scratch.
    """
    leaves = {}
    for i, (path, shape) in enumerate(config.param_shapes().items()):
        leaf = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        if path == "logit_scale":
            assert isinstance(config, DualConfig)
            leaf = jnp.asarray(_START[config.loss])
        elif path == "logit_bias":
            leaf = jnp.asarray(_START_BIAS)
        elif path.endswith("/kernel"):
            leaf = leaf / math.sqrt(shape[-2])
        elif path.endswith(("norm/scale", "_scale")):
            leaf = 1.0 + 0.1 * leaf
        else:
            leaf = 0.02 * leaf
        leaves[path] = leaf.astype(dtype)
    return unflatten(leaves)


def init_dual_lora(
    config: DualConfig,
    spec: AdapterSpec,
    key: jax.Array,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the initial values of all trained arrays: adapters and ``config.trained``.

    A is random and B is zero.

    Args:
      config: the pair.
      spec: projections and ranks.
      key: random key.
      params: base weights, needed for DoRA's magnitudes; arrays in ``config.trained`` start at
        their values in ``params``.
    """
    shapes = config.projection_shapes()
    depths = config.depths()
    base = flatten(params or {})
    leaves = fresh_adapters(
        spec, {path: (depths[path], *shapes[path]) for path in shapes}, key, base
    )
    for path, shape in config.trained_shapes().items():
        leaves[path] = jnp.zeros(shape)
        if path in base:
            leaves[path] = base[path].astype(jnp.float32)
    return unflatten(leaves)
