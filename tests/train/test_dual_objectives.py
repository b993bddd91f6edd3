"""The contrastive losses against torch, and what a mesh gathers for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nalora_jax.train.kinds.dual import sigmoid_contrastive, softmax_contrastive

ROWS, WIDTH = 16, 32


def features() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    found = [rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(2)]
    return tuple(jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in found)


def in_torch(images: jax.Array, texts: jax.Array, scale: float, bias: float) -> dict[str, float]:
    """As their papers' own code has it."""
    i, t = (torch.tensor(np.asarray(x)) for x in (images, texts))
    logits = scale * i @ t.T
    own = torch.arange(ROWS)
    cross = torch.nn.functional.cross_entropy
    signs = 2 * torch.eye(ROWS) - 1
    return {
        "softmax": float((cross(logits, own, reduction="sum") + cross(logits.T, own, reduction="sum")) / 2),
        "sigmoid": float(-torch.nn.functional.logsigmoid(signs * (logits + bias)).sum()),
    }


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_those_of_the_papers(kind) -> None:
    images, texts = features()
    function = {"softmax": softmax_contrastive, "sigmoid": sigmoid_contrastive}[kind]
    scale, bias = jnp.float32(12.0), jnp.float32(-3.0)
    np.testing.assert_allclose(
        function(images, texts, scale, bias), in_torch(images, texts, 12.0, -3.0)[kind], rtol=1e-5
    )
