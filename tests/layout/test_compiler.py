"""Which options a step is compiled with; that TPU compilers know them is shown where they are compiled for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nalora_jax.layout.distributed import compiler_options

FUSED, OFFLOADED = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
)


def mesh(platform: str, kind: str, fsdp: int) -> SimpleNamespace:
    return SimpleNamespace(
        shape={"fsdp": fsdp}, devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)])
    )


def test_options_are_the_platform_s_and_for_gathers_where_there_are_any():
    assert compiler_options(mesh("tpu", "TPU v6 lite", 1)) == {}
    assert compiler_options(mesh("cpu", "cpu", 8)) == {}
    whole, split = (compiler_options(mesh("gpu", "NVIDIA H100", fsdp)) for fsdp in (1, 8))
    assert all(name.startswith("xla_gpu") for name in split)
    assert whole.items() < split.items()
    # Options come and go with JAX's versions, and one that XLA does not know is an error when a run compiles its step.
    jax.jit(lambda: 0.0, compiler_options=split).lower().compile()
    assert sum("pipeline" in name for name in split) == 1


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"])
def test_collectives_are_fused_into_products_on_v5e_alone(kind):
    """Elsewhere libtpu refuses that, for wrong results and hangs; those have SparseCores."""
    assert FUSED in compiler_options(mesh("tpu", "TPU v5 lite", 8))
    options = compiler_options(mesh("tpu", kind, 8))
    assert OFFLOADED in options
    assert FUSED not in options


def test_an_unknown_tpu_is_compiled_for_as_it_comes():
    assert compiler_options(mesh("tpu", "TPU v9", 8)) == {}
