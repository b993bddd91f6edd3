"""Rematerialization policies: what a layer saves, in which memory, and where a policy is
refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.remat import OFFLOAD, REMAT, _policy, check_remat, select_expert_kernel
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops.attention_tpu import SPLASH
from nalora_jax.ops.dispatch import Platform, numerics_for
from nalora_jax.planner.estimates import values_for_backward
from tests.models.family_fields import tiny_config
from tests.param_trees import init_params

ROWS, SEQ, D, F, HEAD_DIM = (
    3,
    256,
    64,
    48,
    128,
)  # splash attention takes whole blocks of tokens and heads


def small(model_type: str, **fields: Any) -> ModelConfig:
    sizes = {"hidden_size": D, "intermediate_size": F, "head_dim": HEAD_DIM}
    return tiny_config(model_type, **(sizes | fields))


def traced(remat: str, implementation: str, base: ModelConfig, adapted: str) -> jax.stages.Traced:
    """The gradient of a decoder's loss, traced for a TPU that is not there."""
    spec = resolve(
        LoRAConfig(rules=(LoRARule(adapted, 2),)), projection_shapes(base), layer_numbers(base)
    )
    params = jax.eval_shape(lambda: init_params(base, jax.random.key(0)))
    lora = jax.eval_shape(lambda: init_lora(base, spec, jax.random.key(0)))
    platform = Platform("tpu", "TPU v6 lite", 1)
    model = Decoder(base, spec, numerics_for("bfloat16", platform, implementation), remat=remat)

    def loss(lora, params, tokens):
        return jnp.sum(model.apply({"params": params, "lora": lora}, tokens).astype(jnp.float32))

    tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
    return jax.jit(jax.grad(loss)).trace(lora, params, tokens)


def moved(text: str, memory: str) -> list[str]:
    """Types of the arrays that a program puts into a memory."""
    lines = [
        line
        for line in text.splitlines()
        if "annotate_device_placement" in line and f'"{memory}"' in line
    ]
    return [re.findall(r"tensor<([^>]*)>", line)[-1] for line in lines]


@pytest.mark.parametrize("remat", [name for name in REMAT if name.endswith(OFFLOAD)])
def test_what_a_policy_saves_goes_to_the_host_and_comes_back(remat):
    text = traced(remat, "xla", small("llama"), "ffn/").lower(lowering_platforms=("tpu",)).as_text()
    out, back = moved(text, "pinned_host"), moved(text, "device")
    of_input, wide = f"{ROWS}x{SEQ}x{D}xbf16", f"{ROWS}x{SEQ}x{F}xbf16"
    assert of_input in out
    assert (wide in out) == remat.startswith("dots")
    assert sorted(out) == sorted(back)
    if remat == f"full{OFFLOAD}":
        assert out == [of_input]


def saved_by_layers(jaxpr: Any) -> float:
    """Returns the bf16 values per token that forward scans save, without ranks and norms'
    factors."""
    widths = 0.0
    for equation in jaxpr.eqns:
        inner = [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        if equation.primitive.name != "scan" or equation.params["reverse"]:
            widths += sum(map(saved_by_layers, inner))
            continue
        body = equation.params["jaxpr"].jaxpr.outvars
        pairs = zip(equation.outvars, body, strict=True)
        stacked = [out.aval for out, of_layer in pairs if out.aval.shape != of_layer.aval.shape]
        of_tokens = [x for x in stacked if ROWS in x.shape[1:] and SEQ in x.shape[1:-1]]
        wide = [x for x in of_tokens if jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-1] > 4]
        widths += sum(x.size * x.dtype.itemsize / 2 for x in wide) / (ROWS * SEQ)
    return widths


FULL_LAYERS = {"layer_types": ["full_attention"] * 3}
PERIODS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PERIODS |= {"sliding_window": 4, "hidden_size_per_layer_input": 0, "global_head_dim": HEAD_DIM}


@pytest.mark.parametrize(
    ("base", "policies"),
    [
        (small("llama"), ("full", "attention", "dots")),
        (
            small("olmo2"),
            ("dots",),
        ),  # norms of queries and keys and of the parts' results, not of their inputs
        (small("gemma3_text", **FULL_LAYERS), ("full", "dots")),  # norms of all of these
        (small("gemma4_text", **PERIODS), ("dots_last", "attention")),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_estimated_values_are_those_that_layers_save(base, policies):
    for remat in policies:
        saved = saved_by_layers(traced(remat, "auto", base, "_proj").jaxpr)
        assert saved == values_for_backward(base, remat, 1, SPLASH)[0], remat


def test_the_result_of_cudnn_is_saved_with_the_projections():
    """JAX gives it no name."""
    forward = fused._dot_product_attention_fwd_p_wrapper
    assert [_policy(remat)(forward) for remat in ("full", "attention", "dots")] == [
        False,
        True,
        True,
    ]
    assert not _policy("dots")(fused._dot_product_attention_bwd_p_wrapper)


def test_experts_are_gathered_if_inputs_are_offloaded():
    assert select_expert_kernel("auto", "full_offload") == "gather"
    assert select_expert_kernel("auto", "full") == "auto"
    assert select_expert_kernel("send", "full_offload") == "send"


def test_a_cpu_has_no_other_memory():
    with pytest.raises(
        NaloraError,
        match=r"--compute.remat: expected .* on cpu, .* found dots_offload; use dots, or",
    ):
        check_remat("dots_offload", "cpu")
    check_remat("dots_offload", "tpu")
    check_remat("dots", "cpu")
