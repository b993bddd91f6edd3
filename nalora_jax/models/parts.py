"""The inputs and options of a layer's parts (`nalora_jax.models.config.Part`), and norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.ffn import Adapters
from nalora_jax.method.low_rank import adapted_dense, parallel_dense
from nalora_jax.method.measurement import GateStatsConfig, SampledWeights
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.residual_norm import residual_norm, rms_norm
from nalora_jax.ops.shardings import RowSharding, Shardings
from nalora_jax.ops.split_rows import Row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """Inputs that differ by layer; every leaf is stacked over the layers of a stack and scanned."""

    window: jax.Array | None  # int []; None if every layer attends globally
    # int [], index into the rotary tables; None if there is only one
    rope: jax.Array | None
    # adapters' scales by part ("attn", "ffn") and projection
    scales: dict[str, dict[str, jax.Array]]
    # [batch, seq, width], `ModelConfig.layer_embeddings` of the layer
    embedded: jax.Array | None
    cached: Any  # the layer's state of earlier calls
    # [batch, seq, d_model], added to the layer's output at image tokens, 0 elsewhere
    deepstack: jax.Array | None = None
    # int [batch, seq, top_k], experts in place of the router's choice
    replayed: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageFeatures:
    """Features of images of different shapes; `nalora_jax.models.vision.patch_decoder` makes them.

    The places are the tokens of all images of a row, in order.
    """

    embeddings: jax.Array  # [batch, places, d_model]
    grids: jax.Array  # int [batch, images, 2], rows and columns of tokens of each image
    deepstack: jax.Array | None = None  # [layers, batch, places, d_model]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HandedKeys:
    """Keys and values of a layer that later layers read."""

    k: jax.Array  # [batch, seq, kv_heads, head_dim], rotated
    v: jax.Array
    cached: Any  # `LayerInputs.cached` of the layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedInputs:
    """Inputs that are the same for all layers, or for all layers of a stack."""

    tables: dict[str, jax.Array]  # by stack: float32 [tables, 2, batch, seq, dim / 2]
    positions: jax.Array  # int [batch or 1, seq]
    segments: jax.Array  # int [batch or 1, seq]
    token_weights: jax.Array | SampledWeights | None  # [batch, seq], for statistics
    cached_positions: jax.Array | None = None  # int [batch, slots]
    cached_segments: jax.Array | None = None  # int [batch, slots]
    # int [batch or 1, seq], position from which a token is seen, if not its own
    starts: jax.Array | None = None
    # by name (`Mixer.hands`)
    handed: dict[str, HandedKeys] = field(default_factory=dict)
    row: Row | None = (
        None  # of whole rows, if the mesh splits them; all arrays above are of their parts
    )
    deterministic: bool = field(default=True, metadata={"static": True})


def part_adapters(spec: AdapterSpec, path: str) -> Adapters:
    """Returns the adapters of the part at a stacked path (``layers/attn``) by projection name."""
    ranks = (
        (p.removeprefix(f"{path}/"), t.rank)
        for p, t in spec.targets
        if p.startswith(f"{path}/")
    )
    return Adapters(tuple(ranks), dora=spec.dora, dropout=spec.dropout)


def layer_scales(spec: AdapterSpec, prefix: str) -> dict[str, dict[str, jax.Array]]:
    """Returns the adapters' scales below a prefix (``layers``) by part and projection, to be
    scanned over layers."""
    scales: dict[str, dict[str, jax.Array]] = {}
    for path, _ in spec.targets:
        if path.startswith(f"{prefix}/"):
            part_name, _, name = path.removeprefix(f"{prefix}/").partition("/")
            scales.setdefault(part_name, {})[name] = jnp.asarray(spec.scales(path))
    return scales


def adapters_below(adapters: Adapters, prefix: str) -> Adapters:
    """Returns the adapters of a part's projections below ``prefix``."""
    ranks = (
        (name.removeprefix(prefix), rank)
        for name, rank in adapters.ranks
        if name.startswith(prefix)
    )
    return replace(adapters, ranks=tuple(ranks))


def scales_below(scales: Mapping[str, Any] | None, prefix: str) -> dict[str, Any]:
    """Returns the scales of a part's projections below ``prefix``."""
    return {
        name.removeprefix(prefix): s
        for name, s in (scales or {}).items()
        if name.startswith(prefix)
    }


def constrain(x: jax.Array, sharding: RowSharding) -> jax.Array:
    """Returns ``x`` with its sharding pinned.

    Without the constraint the compiler may shard activations like the weights instead of by batch.
    """
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


@dataclass(frozen=True)
class PartOptions:
    """Options of a part's module that are not sizes of the model."""

    prefix: str  # of the stack: "layers", or "layers/group0/block1"
    part: str  # name of the part
    adapters: Adapters
    numerics: Numerics
    stats: GateStatsConfig
    shardings: Shardings
    experts: str = "auto"  # see `nalora_jax.config.ComputeConfig`

    def of_block(self, bias: bool) -> dict[str, Any]:
        """Returns the attributes of a part that is an `AdaptedBlock`, besides its sizes."""
        given = {
            "adapters": self.adapters,
            "numerics": self.numerics,
            "stats": self.stats,
        }
        return given | {"use_bias": bias, "name": self.part}

    def projected(
        self,
        x: jax.Array,
        widths: Mapping[str, int],
        layer: LayerInputs,
        shared: SharedInputs,
        *,
        bias: bool = False,
    ) -> list[jax.Array]:
        """Returns the outputs ``[..., width]`` of adapted projections, in the module of the part
        that calls it.

        Args:
          x: ``[..., d_in]``.
          widths: width of the output by name.
          layer, shared: inputs of the part.
          bias: True if the projections have one.
        """
        scales = layer.scales.get(self.part)
        options = {"deterministic": shared.deterministic}
        layers = [
            self.adapters.dense(name, x.shape[-1], width, scales, bias=bias, **options)
            for name, width in widths.items()
        ]
        if len(layers) == 1:
            return [adapted_dense(x, layers[0], self.numerics).y]
        return [output.y for output in parallel_dense(x, layers, self.numerics)]


# ---------------------------------------------------------------- norms


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis.

    Attributes:
      eps: added to the mean square.
      offset: added to the stored scale; 1 for Gemma, whose files store w of ``1 + w``.
      dtype: dtype of the result.
    """

    eps: float
    offset: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the norm of ``x``, ``[..., d]``."""
        scale = self.param(
            "scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],)
        )
        return rms_norm(x, scale.astype(jnp.float32) + self.offset, self.eps).astype(
            self.dtype
        )


class ResidualNorm(nn.Module):
    """Residual addition followed by a frozen root-mean-square norm (`residual_norm`).

    Attributes:
      eps: added to the mean square.
      offset: added to the stored scale, as for `RMSNorm`.
      numerics: dtypes.
      recomputed: the summands follow from saved arrays without a matmul.
    """

    eps: float
    offset: float
    numerics: Numerics
    recomputed: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, y: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``x + y`` (``x`` if y is None) and its norm, both ``[..., d]``."""
        scale = self.param(
            "scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],)
        )
        return residual_norm(
            x,
            y,
            scale.astype(jnp.float32) + self.offset,
            self.eps,
            self.numerics,
            self.recomputed,
        )
