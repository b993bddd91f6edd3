"""One encoder for images and for text: embeddings, a scanned stack of blocks, pooling, projection.

Families differ by their `EncoderConfig` only. Attention and FFN can have adapters. The FFN is
`nalora_jax.method.ffn` with its mask and statistics, as in the decoder. The dropout in a family's
config is not applied, because its weights are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.method import activations
from nalora_jax.method.ffn import GatedFFN, SelfGatedFFN, frozen_kernel
from nalora_jax.method.low_rank import adapted_dense, parallel_dense
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.embedding import Embedding
from nalora_jax.models.parts import constrain, layer_scales, part_adapters
from nalora_jax.models.remat import stack_layers
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.vision_config import EncoderConfig
from nalora_jax.ops.attention import full_attention
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import UNSHARDED, Shardings
from nalora_jax.ops.storage import LAYER_INPUT, expand, matmul, round_and_save


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """Inputs that are the same for all layers."""

    mask: jax.Array | None  # bool [batch, seq], True for tokens that are attended to
    token_weights: jax.Array | None  # [batch, seq], for statistics
    deterministic: bool = field(default=True, metadata={"static": True})


class Encoder(nn.Module):
    """A tower with collections ``params``, ``lora``, ``gate_mask`` and ``gate_taps``.

    Attributes:
      config: the architecture.
      adapters: ranks and alphas, by the tower's own paths ("layers/ffn/in_proj").
      numerics: dtypes.
      remat: one of `nalora_jax.models.remat.REMAT`.
      stats: strides of the gate statistics.
      shardings: of activations on a mesh.
    """

    config: EncoderConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    remat: str = "none"
    stats: GateStatsConfig | None = None
    shardings: Shardings = UNSHARDED

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        shapes: jax.Array | None = None,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
        pooled: bool = True,
    ) -> jax.Array:
        """Returns the features of texts or images.

        Args:
          inputs: token ids int ``[batch, seq]``; or normalised pixels
            ``[batch, height, width, channels]``; or patches
            ``[batch, patches, patch * patch * channels]`` for a family that takes any shape.
          mask: bool ``[batch, seq]``, True for tokens (or patches) that are not padding; default:
            all.
          shapes: int ``[batch, 2]``, rows and columns of every image's patches; with patches only.
          token_weights: ``[batch, seq]`` for the gate statistics; default: ``mask``.
          deterministic: no adapter dropout; if False and a rate is set, the rng ``dropout`` is
            needed.
          pooled: False returns the sequence after the final norm, ``[batch, seq, d_model]``.

        Returns:
          float32 ``[batch, features]``, not normalised.
        """
        c = self.config
        if c.kind == "text":
            x = self._embedded_text(inputs)
        else:
            x = self._embedded_image(inputs, shapes)
        if c.embed_norm:
            x = LayerNorm(c.norm_eps, name="embed_norm")(x)
        x = constrain(x.astype(self.numerics.result), self.shardings.rows)
        if token_weights is None:
            token_weights = mask
        shared = Shared(mask, token_weights, deterministic)
        options = (
            self.numerics,
            self.stats or GateStatsConfig(),
            self.shardings,
        )
        block = stack_layers(EncoderBlock, self.remat, c.n_layers)
        layers = block(c, self.adapters, *options, name="layers")
        x, _ = layers(x, layer_scales(self.adapters, "layers"), shared)
        if c.final_norm:
            x = LayerNorm(c.norm_eps, name="final_norm")(x)
        if not pooled:
            return x
        return self._features(x, inputs, mask)

    def _embedded_text(self, tokens: jax.Array) -> jax.Array:
        """Returns float32 ``[batch, seq, d_model]``: token, position and any type embeddings,
        summed."""
        c = self.config
        seq = tokens.shape[1]
        if seq > c.max_positions:
            raise ValueError(
                f"text: expected at most {c.max_positions} tokens, found {seq}"
            )
        table = Embedding(c.vocab_size, c.d_model, self.shardings.rows, name="tokens")
        x = table(tokens, self.numerics).astype(jnp.float32)
        rows = Embedding(c.max_positions, c.d_model, name="positions")(
            jnp.arange(seq)[None], self.numerics
        )
        if c.token_types:
            # A text has one segment, so that all tokens have type 0.
            types = Embedding(c.token_types, c.d_model, name="types")
            rows = rows + types(jnp.zeros((1, 1), jnp.int32), self.numerics)
        return x + jnp.broadcast_to(rows.astype(jnp.float32), x.shape)

    def _embedded_image(self, pixels: jax.Array, shapes: jax.Array | None) -> jax.Array:
        """Returns float32 ``[batch, patches, d_model]``; a class token is added in front.

        ``pixels`` are images ``[batch, height, width, channels]`` or, with ``any_shape``, patches
        ``[batch, patches, n]`` whose grids are in ``shapes``.
        """
        c = self.config
        table = expand(
            Embedding(c.grid**2 + c.class_token, c.d_model, name="positions").table()
        )
        if c.any_shape:
            assert shapes is not None, (
                "a family that takes images of any shape needs their shapes"
            )
            positions = resized_each(table, shapes, pixels.shape[1])
            patches = pixels
        else:
            batch, height, width, _ = pixels.shape
            grid = height // c.patch_size, width // c.patch_size
            patches = patchify(pixels, c.patch_size)
            positions = resized(table[c.class_token :], *grid)[None]
        x = PlainDense(c.d_model, c.patch_bias, self.numerics, name="patches")(
            patches
        ).astype(jnp.float32)
        x = x + jnp.broadcast_to(positions.astype(jnp.float32), x.shape)
        if not c.class_token:
            return x
        # The first row of the position table is the class token's.
        first = (
            self.param("class_token", nn.initializers.normal(0.02), (c.d_model,))
            + table[0]
        )
        first = jnp.broadcast_to(
            lax.stop_gradient(first).astype(jnp.float32), (batch, 1, c.d_model)
        )
        return jnp.concatenate([first, x], axis=1)

    def _features(
        self, x: jax.Array, inputs: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """Returns the pooled and projected features, float32 ``[batch, d_out]``.

        Without a projection they have ``d_model`` numbers.
        """
        c = self.config
        y = self._pooled(x, inputs, mask).astype(jnp.float32)
        if c.pooler:
            y = PlainDense(c.d_model, True, self.numerics, name="pooler")(y)
            y = {"tanh": jnp.tanh}[c.pooler](y.astype(jnp.float32))
        if c.d_out:
            y = PlainDense(
                c.d_out, c.projection_bias, self.numerics, name="projection"
            )(y)
        return y.astype(jnp.float32)

    def _pooled(
        self, x: jax.Array, inputs: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """Returns one vector per example, ``[batch, d_model]``.

        ``mask``, bool ``[batch, seq]``, is True for tokens; ``inputs`` are the token ids of a text.
        """
        c = self.config
        if c.pooling == "first":
            return x[:, 0]
        if c.pooling == "last":
            return x[:, -1]
        if c.pooling == "eos":
            # CLIP's end token is the largest id; early config files have the value 2.
            ends = inputs if c.eos_id == 2 else inputs == c.eos_id
            return jnp.take_along_axis(
                x, jnp.argmax(ends, axis=1)[:, None, None], axis=1
            )[:, 0]
        if c.pooling == "mean":
            if mask is None:
                weights = jnp.ones(x.shape[:2])
            else:
                weights = mask.astype(jnp.float32)
            total = jnp.sum(x.astype(jnp.float32) * weights[..., None], axis=1)
            return total / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)[:, None]
        return AttentionPooling(c, self.numerics, name="pool")(x, mask)


def patchify(pixels: jax.Array, patch: int) -> jax.Array:
    """Returns the patches of images row by row: ``[batch, patches, patch * patch * channels]``.

    ``pixels`` is ``[batch, height, width, channels]``. Incomplete patches at the right and the
    bottom are cut off, as by a strided convolution.
    """
    batch, height, width, channels = pixels.shape
    rows = height // patch
    columns = width // patch
    x = pixels[:, : rows * patch, : columns * patch]
    # [batch, rows, columns, patch, patch, channels]
    x = x.reshape(batch, rows, patch, columns, patch, channels).transpose(
        0, 1, 3, 2, 4, 5
    )
    return x.reshape(batch, rows * columns, patch * patch * channels)


class LayerNorm(nn.Module):
    """A frozen layer norm over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the float32 norm of ``x``, ``[..., d]``."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        scale, bias = (lax.stop_gradient(p).astype(jnp.float32) for p in (scale, bias))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class PlainDense(nn.Module):
    """A dense layer without an adapter: frozen, or trained entirely if ``lora`` has its kernel."""

    features: int
    use_bias: bool
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[..., features]`` of ``[..., d_in]``."""
        kernel = frozen_kernel(self, (x.shape[-1], self.features))
        trained = self.get_variable("lora", "kernel")
        if trained is None:
            y = matmul(x, kernel, self.numerics)
        else:
            y = jnp.dot(x.astype(jnp.float32), trained)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y + jnp.broadcast_to(lax.stop_gradient(bias).astype(y.dtype), y.shape)


class AttentionPooling(nn.Module):
    """One learnt query that attends over the sequence, followed by an FFN (SigLIP); frozen."""

    config: EncoderConfig
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns ``[batch, d_model]`` of ``[batch, seq, d_model]``."""
        c = self.config
        probe = lax.stop_gradient(
            self.param("probe", nn.initializers.normal(0.02), (c.d_model,))
        )
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, c.d_model))
        y = EncoderAttention(c, numerics=self.numerics, name="attn")(
            probe, x, {}, Shared(mask, None)
        )
        y = y.astype(jnp.float32)
        hidden = LayerNorm(c.norm_eps, name="norm")(y)
        hidden = FrozenFFN(c.d_ff, c.activation, self.numerics, name="ffn")(hidden)
        return (y + hidden.astype(jnp.float32))[:, 0]


class FrozenFFN(nn.Module):
    """``phi(x W_in) W_out`` without adapters or statistics."""

    d_ff: int
    activation: str
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[..., d]`` of ``[..., d]``."""
        z = PlainDense(self.d_ff, True, self.numerics, name="in_proj")(x)
        hidden = activations.get_activation(self.activation).phi(z.astype(jnp.float32))
        return PlainDense(x.shape[-1], True, self.numerics, name="out_proj")(hidden)


class EncoderAttention(nn.Module):
    """Adapted projections and attention over the whole row."""

    config: EncoderConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        scales: dict[str, jax.Array],
        shared: Shared,
    ) -> jax.Array:
        """Returns ``[batch, queries, d_model]``; keys and values are computed from ``source``.

        ``source`` is ``[batch, keys, d_model]``.
        """
        c = self.config
        n = self.numerics
        d = self.config.d_model
        adapters = part_adapters(self.adapters, "layers/attn")
        options = {"deterministic": shared.deterministic}
        q, k, v, o = (
            adapters.dense(
                f"{name}_proj", d, d, scales, bias=name == "o" or c.qkv_bias, **options
            )
            for name in "qkvo"
        )
        if x is source:
            projected = parallel_dense(x, [q, k, v], n)
        else:
            projected = [adapted_dense(x, q, n), *parallel_dense(source, [k, v], n)]
        # [batch, seq, d_model] -> [batch, seq, heads, head_dim]
        saved = (round_and_save(y, n) for y, _ in projected)
        queries, keys, values = (
            y.reshape(*y.shape[:-1], c.n_heads, c.head_dim) for y in saved
        )
        out = full_attention(
            queries,
            keys,
            values,
            n,
            scale=c.head_dim**-0.5,
            mask=shared.mask,
            causal=c.causal,
        ).astype(n.result)
        return adapted_dense(out.reshape(*x.shape[:-1], -1), o, n).y


class EncoderBlock(nn.Module):
    """Attention and FFN with their residuals; norms precede them or follow the residual sums."""

    config: EncoderConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    shardings: Shardings = UNSHARDED

    @nn.compact
    def __call__(
        self, x: jax.Array, scales: dict[str, dict[str, jax.Array]], shared: Shared
    ) -> tuple[jax.Array, None]:
        """Returns ``[batch, seq, d_model]``, and None because no output is stacked over layers."""
        c = self.config
        n = self.numerics
        x = checkpoint_name(x, LAYER_INPUT)

        def attend(y: jax.Array) -> jax.Array:
            """Returns the attention's output ``[batch, seq, d_model]``."""
            return EncoderAttention(c, self.adapters, n, name="attn")(
                y, y, scales.get("attn", {}), shared
            )

        def feed(y: jax.Array) -> jax.Array:
            """Returns the FFN's output ``[batch, seq, d_model]``."""
            options = {
                "token_weights": shared.token_weights,
                "deterministic": shared.deterministic,
            }
            return self._ffn()(y, scales.get("ffn", {}), **options)

        for name, block in (("attn", attend), ("ffn", feed)):
            norm = LayerNorm(c.norm_eps, name=f"{name}_norm")
            y = x  # a post-norm layer reads the residual stream without a norm
            if c.pre_norm:
                y = norm(x).astype(n.result)
            y = block(y)
            if c.layer_scale:
                scale = self.param(
                    f"{name}_scale", nn.initializers.ones_init(), (c.d_model,)
                )
                y = y * jnp.broadcast_to(
                    lax.stop_gradient(scale).astype(y.dtype), y.shape
                )
            x = x + y.astype(x.dtype)
            if not c.pre_norm:
                x = norm(x).astype(n.result)
        return constrain(x, self.shardings.rows), None

    def _ffn(self) -> GatedFFN | SelfGatedFFN:
        """Returns the feed-forward block; without a gate, its input projection is activated."""
        c = self.config
        kind = GatedFFN if c.gated else SelfGatedFFN
        sizes = (c.d_model, c.d_ff, c.activation)
        adapters = part_adapters(self.adapters, "layers/ffn")
        return kind(
            *sizes,
            adapters,
            use_bias=True,
            numerics=self.numerics,
            stats=self.stats,
            name="ffn",
        )


# ---------------------------------------------------------------- position embeddings
#
# Tables of a square of patches are resized to an image's grid as in the family's training.

# The cubic kernel of Torch and OpenCV; `jax.image` uses -0.5, as in Keys' paper.
_CUBIC = -0.75


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the matrix that resizes one axis: float32 ``[new, old]``.

    The interpolation is cubic without antialiasing, with borders repeated.
    """
    # centres of the new cells, in old cells; each reads the four cells around it
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        # Keys' two polynomials: for distances up to 1, and between 1 and 2.
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = (
            (_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC
        ) * distance - 4 * _CUBIC
        places = np.arange(new), np.clip(first + tap, 0, old - 1)
        np.add.at(weights, places, np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def resized(table: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes a square table of patch positions to another grid by cubic interpolation.

    Args:
      table: ``[side * side, d_model]``, row by row.
      height, width: patches of the images.

    Returns:
      ``[height * width, d_model]``; the table itself if the grid is the same.
    """
    side = round(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    # [side, side, d_model] -> [height, side, d_model] -> [height, width, d_model]
    square = table.astype(jnp.float32).reshape(side, side, -1)
    rows, columns = (jnp.asarray(cubic_weights(side, n)) for n in (height, width))
    square = jnp.einsum("hs,std->htd", rows, square, precision="highest")
    return jnp.einsum("wt,htd->hwd", columns, square, precision="highest").reshape(
        height * width, -1
    )


def resized_each(table: jax.Array, shapes: jax.Array, length: int) -> jax.Array:
    """Resizes a table of patch positions for a batch of images of different shapes.

    The interpolation is bilinear with antialiasing, as in the training of SigLIP 2.

    Args:
      table: ``[side * side, d_model]``.
      shapes: int ``[batch, 2]``, patches along height and width of every image.
      length: patches that every image is padded to.

    Returns:
      float32 ``[batch, length, d_model]``; padding has the first patch's position.
    """
    side = round(table.shape[0] ** 0.5)
    sizes = shapes.astype(jnp.float32)[:, None, :]  # [batch, 1, 2]
    # [batch, length]: each patch's number, row by row
    place = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.float32)[None, :], (shapes.shape[0], length)
    )
    row = jnp.floor(place / sizes[..., 1])
    index = jnp.stack([row, place - row * sizes[..., 1]], axis=-1)
    # [batch, length, 1]: patches that are not padding
    real = (place < sizes[..., 0] * sizes[..., 1])[..., None]
    index = jnp.where(real, index, 0.0)
    scale = side / sizes  # [batch, 1, 2]
    # The centre of a patch, in rows and columns of the table.
    centre = (index + 0.5) * scale - 0.5
    source = jnp.arange(side, dtype=jnp.float32)[None, None, None, :]
    # Antialiasing: where the table shrinks, the triangle filter becomes wider.
    reach = jnp.maximum(scale, 1.0)[..., None]
    # [batch, length, 2, side]
    weights = jnp.maximum(1.0 - jnp.abs(source - centre[..., None]) / reach, 0.0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # Weights of the table's rows and columns, [batch, length, side] each.
    square = table.astype(jnp.float32).reshape(side, side, -1)
    return jnp.einsum(
        "bns,bnt,std->bnd",
        weights[:, :, 0],
        weights[:, :, 1],
        square,
        precision="highest",
    )
