"""Attention of every token over all tokens of its row, for encoders of images and sentences.

The sequences are short (50 to 1,024 tokens), so all scores are computed at once. Causal attention
in blocks is `nalora_jax.ops.attention`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from nalora_jax.ops.blockwise_attention import UNSEEN, product
from nalora_jax.ops.dispatch import Numerics, operation


@operation
def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    numerics: Numerics,
    *,
    scale: float,
    mask: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Computes softmax attention; scores, softmax and sums are float32.

    Args:
      q: ``[batch, queries, heads, head_dim]``.
      k, v: ``[batch, keys, heads, head_dim]``.
      numerics: dtype of the matmuls' operands.
      scale: multiplies the scores.
      mask: bool ``[batch, keys]``, False for masked keys. A row without any key averages all of
        them.
      causal: a query sees keys up to its own position only.

    Returns:
      float32 ``[batch, queries, heads, head_dim]``.
    """
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    # [batch, heads, queries, keys]
    scores = product("bhqd,bhkd->bhqk", q, k, numerics) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, UNSEEN)
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible[None, None], scores, UNSEEN)
    out = product("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v, numerics)
    return out.transpose(0, 2, 1, 3)
