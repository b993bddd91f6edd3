"""Adapters that do not start at zero: their start, what kernels give up to it, and the way back to
plain LoRA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import MeshConfig
from nalora_jax.mesh import distributed
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.adapter_forms import (
    difference_as_lora,
    lower_kernels,
    pissa_init,
    pissa_split,
)


def kernel(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 24), (2, 4, 12, 8)])
def test_the_split_is_the_best_approximation(shape):
    """Of matrices that are no larger than the random subspace, the decomposition is exact."""
    w = kernel(shape)
    a, b, residual = pissa_init(jnp.asarray(w), 4, 2.0)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
    # How many epsilons of the largest singular value a decomposition in float32 costs differs
    # between processors.
    np.testing.assert_allclose(2.0 * a @ b, best, atol=20 * np.finfo(np.float32).eps * s.max())
    np.testing.assert_allclose(residual + 2.0 * a @ b, w, atol=1e-6)
    # The singular values are shared evenly, as in PEFT: both factors have the same column norms.
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=-2), jnp.linalg.norm(b, axis=-1), rtol=1e-5)
    assert a.dtype == b.dtype == residual.dtype == jnp.float32


def test_the_split_of_a_large_kernel_is_nearly_the_best():
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(size, 48)))[0] for size in (96, 64))
    w = jnp.asarray((u * 0.8 ** np.arange(48)) @ v.T, jnp.float32)
    a, b, residual = pissa_init(w, 8, 1.0)
    best = np.linalg.norm(0.8 ** np.arange(8, 48))
    assert float(jnp.linalg.norm(residual)) < 1.001 * best
    np.testing.assert_allclose(residual + a @ b, w, atol=1e-6)
    *factors, rounded = pissa_init(w.astype(jnp.bfloat16), 8, 1.0)  # once
    exact = w.astype(jnp.bfloat16).astype(jnp.float32) - factors[0] @ factors[1]
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16), strict=True)


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}], ids=str)
def test_trained_adapter_becomes_plain_lora_of_the_original_base(variant):
    """Ranks that differ by layer: residual + s A B = W + s' A' B'."""
    path, ranks, alphas = "layers/ffn/gate_proj", (4, 0, 2), (8.0, 1.0, 3.0)
    spec = AdapterSpec(((path, TargetSpec(ranks, alphas)),), **variant)
    w = kernel((3, 16, 24))
    lowered, start = pissa_split(unflatten({f"{path}/kernel": jnp.asarray(w)}), spec)
    residual, initial = lowered["layers"]["ffn"]["gate_proj"]["kernel"], flatten(start)
    if spec.dora:  # magnitudes of the original kernels, not of what PiSSA leaves
        norms = np.linalg.norm(w, axis=-2)
        np.testing.assert_allclose(initial[f"{path}/magnitude"], norms, rtol=1e-5)
    used = (np.arange(4) < np.array(ranks)[:, None])[:, None, :]
    a = initial[f"{path}/a"] + used * kernel((3, 16, 4), 1)
    b = initial[f"{path}/b"] + used.swapaxes(1, 2) * kernel((3, 4, 24), 2)
    trained = unflatten(initial | {f"{path}/a": a, f"{path}/b": b})

    lora, plain = difference_as_lora(trained, start, spec)

    assert plain.target(path).ranks == (8, 0, 4)
    np.testing.assert_allclose(plain.scales(path), spec.scales(path), rtol=1e-6)
    leaves = flatten(lora)
    assert (f"{path}/magnitude" in leaves) == spec.dora
    for layer in range(3):
        ours = (
            w[layer]
            + plain.scales(path)[layer] * leaves[f"{path}/a"][layer] @ leaves[f"{path}/b"][layer]
        )
        expected = residual[layer] + spec.scales(path)[layer] * a[layer] @ b[layer]
        np.testing.assert_allclose(ours, expected, atol=3e-6)


@pytest.mark.parametrize(
    ("lead", "dtype"), [((), "bfloat16"), ((4,), "float32")], ids=["dense", "experts"]
)
def test_kernels_are_lowered_in_place_and_rounded_once(lead, dtype):
    rng, path = np.random.default_rng(0), "layers/ffn/gate_proj"
    spec = AdapterSpec(((path, TargetSpec((3, 2), (6.0, 1.0))),))
    kernel = jnp.asarray(rng.normal(size=(2, *lead, 8, 16)), dtype)
    mesh = distributed.make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    split = NamedSharding(mesh, P(*(None,) * (kernel.ndim - 1), "fsdp"))
    a, b = (rng.normal(size=(2, *lead, *shape)).astype(np.float32) for shape in ((8, 3), (3, 16)))
    params = unflatten({f"{path}/kernel": jax.device_put(kernel, split), "norm/scale": np.ones(8)})

    lowered = flatten(lower_kernels(params, unflatten({f"{path}/a": a, f"{path}/b": b}), spec))

    scales = np.array([2.0, 0.5]).reshape(2, *(1,) * (a.ndim - 1))
    exact = np.asarray(kernel, np.float64) - scales * (a.astype(np.float64) @ b)
    found = lowered[f"{path}/kernel"]
    assert found.dtype == dtype
    assert found.sharding.is_equivalent_to(split, found.ndim)
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rounding, atol=1e-6)
    np.testing.assert_array_equal(lowered["norm/scale"], np.ones(8))
