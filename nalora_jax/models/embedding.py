"""Tables of token vectors at both ends of a decoder, and vectors that every layer receives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.devices import (
    BATCH_AXES,
    CONTEXT,
    DATA,
    FSDP,
    RUN_AXIS,
    WEIGHT_AXES,
)
from nalora_jax.method.ffn import frozen_kernel
from nalora_jax.models.parts import RMSNorm, constrain
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import RowSharding, mesh_sharding
from nalora_jax.ops.split_rows import shards_of
from nalora_jax.ops.storage import Kernel, dot, stop_frozen_gradient, take_rows


class Embedding(nn.Module):
    """An embedding table: frozen, or trained entirely or by rows if the collection ``lora`` has it.

    Attributes:
      vocab_size: rows of the table.
      d_model: columns of the table.
      sharding: sharding of the result ``[batch, seq, d_model]`` on a mesh; None leaves it to the
        compiler.
      trained: token ids of the rows that ``lora`` may have, in their order.
    """

    vocab_size: int
    d_model: int
    sharding: RowSharding = None
    trained: tuple[int, ...] = ()

    def setup(self) -> None:
        """Creates the frozen table."""
        shape = (self.vocab_size, self.d_model)
        self.embedding = frozen_kernel(
            self, shape, nn.initializers.normal(0.02), "embedding"
        )

    def __call__(self, tokens: jax.Array, numerics: Numerics) -> jax.Array:
        """Returns ``[..., d_model]`` in the table's dtype for int tokens ``[...]``."""
        if self.has_variable("lora", "embedding"):
            return jnp.take(self.get_variable("lora", "embedding"), tokens, axis=0)
        if shards_of(self.sharding) > 1:
            look_up = self._of_parts
        else:
            look_up = self._of_rows
        rows = look_up(tokens, numerics)
        if self.has_variable("lora", "rows"):
            return _with_rows(
                rows, tokens, self.get_variable("lora", "rows"), self.trained
            )
        return rows

    def _of_rows(self, tokens: jax.Array, numerics: Numerics) -> jax.Array:
        """Returns the embeddings of whole rows, looked up as in `column_layouts`."""
        of_tokens, by_columns = column_layouts(self.sharding)
        if of_tokens is not None:
            tokens = constrain(constrain(tokens, self.sharding), of_tokens)
        rows: jax.Array = take_rows(self.table(), tokens, numerics)
        return constrain(constrain(rows, by_columns), self.sharding)

    def _of_parts(self, tokens: jax.Array, numerics: Numerics) -> jax.Array:
        """Returns the embeddings of parts of rows, looked up by columns as in `column_layouts`."""
        assert self.sharding is not None
        # [shards * batch, seq] -> [shards, batch, seq]
        shape = (shards_of(self.sharding), -1, tokens.shape[1])

        at = partial(mesh_sharding, self.sharding)
        sharded = constrain(tokens.reshape(shape), at(None, DATA))
        rows: jax.Array = take_rows(self.table(), sharded, numerics)
        rows = constrain(rows, at(None, DATA, None, WEIGHT_AXES))
        # One axis at a time: the compiler would exchange two axes by gathering the array.
        rows = constrain(rows, at(CONTEXT, DATA, None, FSDP))
        rows = constrain(rows, at(CONTEXT, BATCH_AXES))
        return constrain(rows.reshape(*tokens.shape, -1), self.sharding)

    def table(self) -> Kernel:
        """Returns the ``[vocab, d_model]`` as it is stored, without a gradient if it is frozen."""
        return stop_frozen_gradient(self.embedding)


def _with_rows(
    x: jax.Array, tokens: jax.Array, rows: jax.Array, ids: tuple[int, ...]
) -> jax.Array:
    """Replaces the embeddings of the tokens ``ids`` by trained rows.

    Args:
      x: ``[..., d_model]``, embeddings of ``tokens``.
      tokens: int ``[...]``.
      rows: ``[ids, d_model]``.
      ids: token ids of the rows.
    """
    order = np.argsort(ids).astype(np.int32)
    ascending = np.array(ids, np.int32)[order]
    # len(ids) beyond the last
    place = jnp.searchsorted(ascending, tokens, method="scan_unrolled")
    is_trained = jnp.take(ascending, place, mode="clip") == tokens
    trained = jnp.take(rows, jnp.take(order, place, mode="clip"), axis=0)
    return jnp.where(is_trained[..., None], trained, x.astype(trained.dtype))


def column_layouts(
    sharding: RowSharding,
) -> tuple[RowSharding, RowSharding]:
    """Returns the shardings of tokens ``[batch, seq]`` and of their embeddings before ``sharding``.

    If the mesh splits the batch further by "fsdp", a device holds some columns of the table. It
    looks up those columns for the tokens of all devices that hold the other columns, and then the
    devices exchange the results. Without these constraints the compiler computes the full result on
    every device of a mesh that also splits the table's rows (by "tensor"). The axis "run" of a
    sweep splits the tokens like "data".
    """
    if sharding is None:
        return None, None
    sizes = dict(sharding.mesh.shape)
    batch = sizes.pop(DATA, 1) * sizes.pop(RUN_AXIS, 1)
    if min(batch, *sizes.values()) == 1:
        return None, None
    data, *fsdp = sharding.spec[0]
    return mesh_sharding(sharding, data), mesh_sharding(
        sharding, data, None, tuple(fsdp)
    )


class LMHead(nn.Module):
    """The untied output projection."""

    vocab_size: int

    @nn.compact
    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        """``[tokens, d_model]`` -> float32 ``[tokens, vocab]``."""
        return dot(
            x,
            stop_frozen_gradient(frozen_kernel(self, (x.shape[-1], self.vocab_size))),
            numerics,
        )


@dataclass(frozen=True)
class LayerEmbeddings:
    """A token's vector for every layer: the mean of a table's row and a projected embedding.

    Attributes:
      vocab_size: rows of the table.
      width: of the vectors.
    """

    vocab_size: int
    width: int

    def param_shapes(self, layers: int, d_model: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parameters by path."""
        columns = layers * self.width
        return {
            "layer_embeddings/embedding": (self.vocab_size, columns),
            "layer_embeddings/projection/kernel": (d_model, columns),
            "layer_embeddings/norm/scale": (self.width,),
        }

    def module(
        self, layers: int, sharding: RowSharding, eps: float, offset: float
    ) -> nn.Module:
        """Returns the module.

        Args:
          layers: number of layers.
          sharding: of ``[batch, seq, d_model]``.
          eps, offset: of the norm of projected embeddings (`RMSNorm`).
        """
        table = {"vocab_size": self.vocab_size, "d_model": layers * self.width}
        norm = {"eps": eps, "offset": offset}
        return _LayerEmbeddings(**table, **norm, sharding=sharding, width=self.width)


class _LayerEmbeddings(Embedding):
    """The module of `LayerEmbeddings`; ``eps`` and ``offset`` are the norm's."""

    width: int = 0
    eps: float = 0.0
    offset: float = 0.0

    def setup(self) -> None:
        super().setup()
        self.projection = LMHead(self.d_model)
        self.norm = RMSNorm(self.eps, self.offset)

    def __call__(  # type: ignore[override]
        self, tokens: jax.Array, x: jax.Array, numerics: Numerics
    ) -> jax.Array:
        """Returns ``[layers, batch, seq, width]`` of the scaled embeddings ``x [batch, seq,
        d_model]``."""
        # Tables and projections have [batch, seq, layers * width].
        table = super().__call__(tokens, numerics).astype(jnp.float32) * self.width**0.5
        # [batch, seq, d_model] -> [batch * seq, d_model]
        flat = x.reshape(-1, x.shape[-1]).astype(numerics.result)
        projected = (
            self.projection(flat, numerics).reshape(table.shape) * x.shape[-1] ** -0.5
        )
        # [batch, seq, layers, width]; the factor keeps the variance of a sum of two.
        by_layer = (*table.shape[:-1], -1, self.width)
        both = (
            self.norm(projected.reshape(by_layer)) + table.reshape(by_layer)
        ) * 0.5**0.5
        return jnp.moveaxis(both, -2, 0).astype(numerics.result)
