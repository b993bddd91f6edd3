"""Which options a step is compiled with; that TPU compilers know them is shown where they are compiled for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nalora_jax.distributed import compiler_options

GATHERS = "xla_enable_async_all_gather"


def mesh(platform: str, kind: str, fsdp: int) -> SimpleNamespace:
    return SimpleNamespace(
        shape={"fsdp": fsdp}, devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)])
    )


@pytest.mark.parametrize("experts", [False, True])
def test_options_are_the_platform_s_and_for_gathers_where_there_are_any(experts):
    assert compiler_options(mesh("tpu", "TPU v6 lite", 1), experts=experts) == {}
    assert compiler_options(mesh("cpu", "cpu", 8), experts=experts) == {}
    assert GATHERS in compiler_options(mesh("tpu", "TPU v6 lite", 8), experts=experts)
    assert GATHERS in compiler_options(mesh("tpu", "TPU v5 lite", 8), experts=experts)
    whole, split = (compiler_options(mesh("gpu", "NVIDIA H100", fsdp), experts=experts) for fsdp in (1, 8))
    assert all(name.startswith("xla_gpu") for name in split)
    assert whole.items() < split.items()
    # Options come and go with JAX's versions, and one that XLA does not know is an error when a run compiles its step.
    jax.jit(lambda: 0.0, compiler_options=split).lower().compile()
    assert sum("pipeline" in name for name in split) == 1


def test_a_v5p_s_compiler_is_not_asked_for_what_it_fails_at_with_experts():
    v5p = mesh("tpu", "TPU v5", 8)
    assert GATHERS in compiler_options(v5p)
    assert GATHERS not in compiler_options(v5p, experts=True)
    assert compiler_options(v5p, experts=True)
