"""The contrastive losses against torch, and what a mesh gathers for them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.config import MeshConfig
from nalora_jax.layout.distributed import make_mesh
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


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_eight_devices_see_all_negatives_and_gather_features_only(kind) -> None:
    """Value and gradients of eight devices are those of one; the compiled program moves no more than features."""
    function = {"softmax": softmax_contrastive, "sigmoid": sigmoid_contrastive}[kind]
    images, texts = features()
    pixels = jax.random.normal(jax.random.key(0), (ROWS, 512))  # what must not be gathered
    weight = jax.random.normal(jax.random.key(1), (512, WIDTH)) / 20

    def loss(weight, pixels, texts, mesh):
        seen = pixels @ weight + images
        seen = seen / jnp.linalg.norm(seen, axis=1, keepdims=True)
        return function(seen, texts, jnp.float32(9.0), jnp.float32(-2.0), mesh)

    alone = jax.value_and_grad(loss)(weight, pixels, texts, None)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rows = NamedSharding(mesh, P(BATCH_AXES))
    split = jax.jit(jax.value_and_grad(loss), static_argnums=3, in_shardings=(None, rows, rows))
    together = split(weight, jax.device_put(pixels, rows), jax.device_put(texts, rows), mesh)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-4, atol=1e-4)
    program = split.lower(weight, pixels, texts, mesh).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\][^=]* all-gather\(", program)
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in gathered]
    assert sizes, "nothing is gathered: no device can know the others' negatives"
    assert max(sizes) <= ROWS * WIDTH
    assert len(sizes) <= 4
