"""Attention of whole rows, and its gradient, against numpy in float64; in every implementation that the machine has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops.attention import full_attention

SCALE = 0.3


def in_float64(q, k, v, g, mask, causal):
    """The result, and the gradients of q, k and v for its cotangent g; all ``[batch, seq, heads, head_dim]``."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bqhd,bkhd->bhqk", g, v)
    slopes = weights * (of_weights - np.sum(weights * of_weights, axis=-1, keepdims=True)) * SCALE
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, v),
        np.einsum("bhqk,bkhd->bqhd", slopes, k),
        np.einsum("bhqk,bqhd->bkhd", slopes, q),
        np.einsum("bhqk,bqhd->bkhd", weights, g),
    )


# 300 tokens are more than the kernels' gradient takes at a time.
@pytest.mark.parametrize("seq", [37, 300])
@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_result_and_gradients(seq, kind, numerics):
    rng = np.random.default_rng(seq)
    arrays = [
        jnp.asarray(rng.normal(size=(2, seq, 2, 8)), jnp.bfloat16).astype(jnp.float32) for _ in range(4)
    ]
    mask = rng.random((2, seq)) < 0.7 if kind == "masked" else None
    causal = kind == "causal"
    want = in_float64(*arrays, mask, causal)

    def run(numerics, q, k, v, g):
        def of(*x):
            return full_attention(*x, numerics, scale=SCALE, mask=mask, causal=causal)

        y, pull = jax.vjp(of, q, k, v)
        return y, *pull(g)

    made = jax.jit(run, static_argnums=0)
    for found, right in zip(made(numerics(), *arrays), want, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-6 * np.abs(right).max(), rtol=0)
    for found, right in zip(made(numerics("bfloat16"), *arrays), want, strict=True):
        np.testing.assert_allclose(found, right, atol=0.02 * np.abs(right).max(), rtol=0)
