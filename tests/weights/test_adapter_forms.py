"""What kernels give up to adapters that do not start at zero; the way back is tested in test_pissa.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.adapter_forms import lower_kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(), (4,)], ids=["dense", "experts"])
def test_kernels_are_lowered_in_place_and_rounded_once(lead: tuple[int, ...], dtype: str) -> None:
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
