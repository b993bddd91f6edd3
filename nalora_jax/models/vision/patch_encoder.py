"""An image tower that reads the packed patches of images of any shape.

Integers decide everything about the places of patches, like those of packed texts: which image a
patch belongs to, its row and column, and the attention window that it is in. They follow from the
grids of the images, so that a batch needs no other arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.method.ffn import GatedFFN, SelfGatedFFN, frozen_kernel
from nalora_jax.method.low_rank import adapted_dense, parallel_dense
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.config import GLOBAL_WINDOW
from nalora_jax.models.embedding import Embedding
from nalora_jax.models.parts import RMSNorm, constrain, layer_scales, part_adapters
from nalora_jax.models.remat import stack_layers
from nalora_jax.models.ropes import apply_rope
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.encoder import LayerNorm
from nalora_jax.models.vision.patch_config import PatchTower
from nalora_jax.ops.attention import AttentionConfig, Keys, attention
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import UNSHARDED, Shardings
from nalora_jax.ops.storage import LAYER_INPUT, expand, matmul, round_and_save


class PatchPlaces(NamedTuple):
    """The places of packed patches, int ``[batch, patches]`` each."""

    image: jax.Array  # number of the image in its row, starting at 1; 0: padding
    row: jax.Array
    column: jax.Array
    height: jax.Array  # rows of patches of its image
    width: jax.Array


def patch_places(grids: jax.Array, patches: int, merge: int) -> PatchPlaces:
    """Returns the places of the patches of rows of images.

    Args:
      grids: int ``[batch, images, 2]``, rows and columns of patches of each image, multiples of
        ``merge``; 0 after a row's last image.
      patches: places of a row.
      merge: patches along a side of the squares whose patches follow each other.
    """
    counts = grids[..., 0] * grids[..., 1]
    ends = jnp.cumsum(counts, axis=1)  # [batch, images]
    index = jnp.arange(patches, dtype=jnp.int32)[None, :]
    before = jnp.sum(index[:, :, None] >= ends[:, None, :], axis=-1)  # [batch, patches]
    last = grids.shape[1] - 1
    image = jnp.minimum(before, last)

    def of_image(values: jax.Array) -> jax.Array:
        """Returns the value ``[batch, images]`` of each patch's image, ``[batch, patches]``."""
        return jnp.take_along_axis(values, image, axis=1)

    real = before <= last
    height = jnp.where(real, of_image(grids[..., 0]), merge)
    width = jnp.where(real, of_image(grids[..., 1]), merge)
    within = jnp.where(real, index - of_image(ends - counts), 0)
    # A patch's number consists of the row and column of its square, and those in the square.
    square, in_square = jnp.divmod(within, merge**2)
    square_row, square_column = jnp.divmod(square, width // merge)
    row_in, column_in = jnp.divmod(in_square, merge)
    return PatchPlaces(
        jnp.where(real, image + 1, 0),
        square_row * merge + row_in,
        square_column * merge + column_in,
        height,
        width,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedPatches:
    """Inputs that are the same for all layers."""

    images: jax.Array  # int [batch, patches], image of each patch, 0: padding
    windows: jax.Array | None  # int [batch, patches], attention window of each patch
    table: jax.Array | None  # float32 [2, batch, patches, head_dim / 2]: cosines, sines
    token_weights: jax.Array  # bool [batch, patches], for statistics
    deterministic: bool = field(default=True, metadata={"static": True})


class PatchEncoder(nn.Module):
    """A tower with collections ``params``, ``lora``, ``gate_mask`` and ``gate_taps``.

    Attributes:
      config: the architecture.
      merge: patches along a side of the squares whose patches follow each other.
      taps: layers whose outputs are returned, too.
      adapters: ranks and alphas, by the tower's own paths ("layers/ffn/in_proj").
      numerics: dtypes.
      remat: one of `nalora_jax.models.remat.REMAT`.
      stats: strides of the gate statistics.
      shardings: of activations on a mesh.
    """

    config: PatchTower
    merge: int
    taps: tuple[int, ...] = ()
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    remat: str = "none"
    stats: GateStatsConfig | None = None
    shardings: Shardings = UNSHARDED

    @nn.compact
    def __call__(
        self, patches: jax.Array, grids: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the features of patches.

        Args:
          patches: float32 ``[batch, patches, patch * patch * channels]``, normalised.
          grids: int ``[batch, images, 2]``, rows and columns of patches of each image.
          deterministic: no adapter dropout.

        Returns:
          ``[batch, patches, d_model]``, and the outputs ``[taps, batch, patches, d_model]`` of
          tapped layers, or None.
        """
        c = self.config
        n = self.numerics
        places = patch_places(grids, patches.shape[1], self.merge)
        x = self._embedded(patches)
        if c.table != "none":
            positions = Embedding(c.side**2, c.d_model, name="positions").table()
            add = resized_positions if c.table == "resized" else corner_positions
            x = x + add(expand(positions), c.side, places)
        if c.embed_norm:
            x = patch_norm(c, "embed_norm", c.norm_eps)(x)
        x = constrain(x.astype(n.result), self.shardings.rows)
        windows = None
        if c.window:
            windows = window_numbers(places, c.window * self.merge)
        table = None
        if c.rope_theta:
            table = rope_of_grid(places, c.head_dim, c.rope_theta, c.alternates)
        shared = SharedPatches(
            places.image, windows, table, places.image > 0, deterministic
        )
        whole = None  # bool [layers]: attention to the whole image
        if c.window:
            whole = jnp.asarray(np.isin(np.arange(c.n_layers), c.whole_layers))
        block = stack_layers(PatchBlock, self.remat, c.n_layers)
        stats = self.stats or GateStatsConfig()
        layers = block(
            c, self.adapters, n, stats, self.shardings, bool(self.taps), name="layers"
        )
        x, outputs = layers(x, (layer_scales(self.adapters, "layers"), whole), shared)
        if c.final_norm:
            x = patch_norm(c, "final_norm", c.norm_eps)(x)
        if not self.taps:
            return x, None
        return x, outputs[np.array(self.taps)]

    def _embedded(self, patches: jax.Array) -> jax.Array:
        """Returns float32 ``[batch, patches, d_model]`` of normalised patches."""
        c = self.config
        return PatchEmbedding(
            c.d_model, c.frames, c.patch_bias, self.numerics, name="patches"
        )(patches).astype(jnp.float32)


class PatchEmbedding(nn.Module):
    """The frozen matmul of patches; an image is repeated for all frames of a patch."""

    features: int
    frames: int
    use_bias: bool
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[..., features]`` of ``[..., patch * patch * channels]``."""
        width = x.shape[-1]
        kernel = frozen_kernel(self, (self.frames * width, self.features))
        if self.frames > 1:
            # [frames * width, features] -> [width, features]: all frames are the same
            by_frame = expand(kernel).astype(jnp.float32)
            by_frame = by_frame.reshape(self.frames, width, self.features)
            y = jnp.dot(x, by_frame.sum(axis=0), precision=_precision(self.numerics))
        else:
            y = matmul(x, kernel, self.numerics)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y + jnp.broadcast_to(lax.stop_gradient(bias).astype(y.dtype), y.shape)


def _precision(numerics: Numerics) -> str | None:
    """Returns the precision of a float32 matmul: full, unless the run computes in bfloat16."""
    if numerics.operand == "float32":
        return "highest"
    return None


class PatchAttention(nn.Module):
    """Adapted projections, RoPE of rows and columns, and attention within images or windows."""

    config: PatchTower
    adapters: AdapterSpec
    numerics: Numerics

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: dict[str, jax.Array],
        segments: jax.Array,
        shared: SharedPatches,
    ) -> jax.Array:
        """Returns ``[batch, patches, d_model]``; patches attend to those with their segment."""
        c = self.config
        n = self.numerics
        d = c.d_model
        adapters = part_adapters(self.adapters, "layers/attn")
        q, k, v, o = (
            adapters.dense(
                f"{name}_proj",
                d,
                d,
                scales,
                bias=c.bias,
                deterministic=shared.deterministic,
            )
            for name in "qkvo"
        )
        # [batch, patches, d_model] -> [batch, patches, heads, head_dim]
        heads = []
        for output in parallel_dense(x, [q, k, v], n):
            y = round_and_save(output.y, n)
            heads.append(y.reshape(*y.shape[:-1], c.n_heads, c.head_dim))
        queries, keys, values = heads
        if shared.table is not None:
            queries = apply_rope(queries, shared.table)
            keys = apply_rope(keys, shared.table)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        # A key that is seen from the first position on is seen by its whole segment.
        seen = Keys(keys, values, positions, segments, jnp.zeros_like(positions))
        config = AttentionConfig(c.head_dim**-0.5)
        out = attention(queries, seen, GLOBAL_WINDOW, config, n).astype(n.result)
        return adapted_dense(out.reshape(*x.shape[:-1], -1), o, n).y


class PatchBlock(nn.Module):
    """Attention and FFN with their residuals, after norms of their inputs."""

    config: PatchTower
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    shardings: Shardings = UNSHARDED
    returns_output: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: tuple[Any, jax.Array | None], shared: SharedPatches
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns ``[batch, patches, d_model]``, and the same again if outputs are stacked."""
        c = self.config
        n = self.numerics
        scales, whole = layer
        x = checkpoint_name(x, LAYER_INPUT)
        segments = shared.images
        if shared.windows is not None:
            assert whole is not None
            segments = jnp.where(whole, shared.images, shared.windows)
        y = PatchAttention(c, self.adapters, n, name="attn")(
            self._norm("attn_norm", x), scales.get("attn", {}), segments, shared
        )
        x = x + y.astype(x.dtype)
        y = self._ffn()(
            self._norm("ffn_norm", x),
            scales.get("ffn", {}),
            token_weights=shared.token_weights,
            deterministic=shared.deterministic,
        )
        x = constrain(x + y.astype(x.dtype), self.shardings.rows)
        return x, x if self.returns_output else None

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        """Returns the norm ``name`` of ``x``, ``[batch, patches, d_model]``."""
        c = self.config
        return patch_norm(c, name, c.norm_eps)(x).astype(self.numerics.result)

    def _ffn(self) -> GatedFFN | SelfGatedFFN:
        """Returns the feed-forward block."""
        c = self.config
        kind = GatedFFN if c.gated else SelfGatedFFN
        return kind(
            c.d_model,
            c.d_ff,
            c.activation,
            part_adapters(self.adapters, "layers/ffn"),
            use_bias=c.bias,
            numerics=self.numerics,
            stats=self.stats,
            name="ffn",
        )


def patch_norm(config: PatchTower, name: str, eps: float) -> RMSNorm | LayerNorm:
    """Returns a norm of the tower's kind."""
    if config.rms_norm:
        return RMSNorm(eps, name=name)
    return LayerNorm(eps, name=name)


# ---------------------------------------------------------------- positions of patches


def window_numbers(places: PatchPlaces, side: int) -> jax.Array:
    """Returns a number of each patch's attention window, int ``[batch, patches]``; 0 for padding.

    Windows are squares of ``side`` by ``side`` patches, smaller at the right and at the bottom.
    """
    row = places.row // side
    column = places.column // side
    # Distinct for all windows of a row: an image has fewer windows than patches.
    patches = places.image.shape[1]
    windows_across = (places.width + side - 1) // side
    number = places.image * patches + row * windows_across + column
    return jnp.where(places.image > 0, number, 0)


def rope_of_grid(
    places: PatchPlaces, head_dim: int, theta: float, alternates: bool = False
) -> jax.Array:
    """Returns cosines and sines ``[2, batch, patches, head_dim / 2]``.

    The first half of the pairs rotates by the row and the second by the column. Both have the same
    frequencies, unless those of columns are between those of rows (``alternates``, Pixtral).
    """
    quarter = np.arange(0, head_dim // 2, 2) / (head_dim // 2)
    later = quarter
    if alternates:
        later = quarter + 2 / head_dim
    of_rows = jnp.asarray(theta**-quarter, jnp.float32)[None, None, :]
    of_columns = jnp.asarray(theta**-later, jnp.float32)[None, None, :]
    rows = places.row[..., None].astype(jnp.float32) * of_rows
    columns = places.column[..., None].astype(jnp.float32) * of_columns
    angle = jnp.concatenate([rows, columns], axis=-1)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def resized_positions(table: jax.Array, side: int, places: PatchPlaces) -> jax.Array:
    """Returns positions of a square table that is resized to each image's grid.

    The interpolation is bilinear with antialiasing, as that of padded images in
    `nalora_jax.models.vision.encoder`. Arguments and result are those of `corner_positions`.
    """
    weights = []
    for index, size in ((places.row, places.height), (places.column, places.width)):
        scale = side / size.astype(jnp.float32)  # [batch, patches]
        centre = (index.astype(jnp.float32) + 0.5) * scale - 0.5
        source = jnp.arange(side, dtype=jnp.float32)[None, None, :]
        # Where the table shrinks, the triangle filter becomes wider.
        reach = jnp.maximum(scale, 1.0)[..., None]
        axis = jnp.maximum(1.0 - jnp.abs(source - centre[..., None]) / reach, 0.0)
        weights.append(axis / jnp.sum(axis, axis=-1, keepdims=True))
    square = table.astype(jnp.float32).reshape(side, side, -1)
    return jnp.einsum("bns,bnt,std->bnd", *weights, square, precision="highest")


def corner_positions(table: jax.Array, side: int, places: PatchPlaces) -> jax.Array:
    """Returns positions interpolated from a square table whose corners are the image's corners.

    Args:
      table: ``[side * side, d_model]``.
      side: rows and columns of the table.
      places: of the patches.

    Returns:
      float32 ``[batch, patches, d_model]``.
    """
    table = table.astype(jnp.float32)

    def axis(index: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the lower of the two rows that a patch is between, and its distance to it."""
        place = index.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)
        lower = jnp.floor(place)
        return lower.astype(jnp.int32), place - lower

    row, below = axis(places.row, places.height)
    column, right = axis(places.column, places.width)
    x = jnp.zeros((*row.shape, table.shape[-1]), jnp.float32)
    for down in (0, 1):
        for across in (0, 1):
            r = jnp.minimum(row + down, side - 1)
            s = jnp.minimum(column + across, side - 1)
            weight = (below if down else 1 - below) * (right if across else 1 - right)
            x = x + table[r * side + s] * weight[..., None]
    return x
