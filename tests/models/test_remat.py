"""Policies that save in the host's memory: what goes there, and where they are refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.layout.estimates import saved_values, values_for_backward
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.remat import OFFLOAD, REMAT, check_remat, chosen_experts
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.attention_gpu import CUDNN
from nalora_jax.ops.dispatch import Platform, numerics_for
from tests.models.family_fields import tiny_config
from tests.param_trees import init_params

ROWS, SEQ, D, F, HEADS, KV_HEADS, LAYERS = 2, 8, 64, 48, 4, 2, 3


def small(model_type: str, **fields: Any) -> ModelConfig:
    sizes = {"hidden_size": D, "intermediate_size": F, "head_dim": D // HEADS}
    return tiny_config(model_type, **(sizes | fields))


def traced(
    remat: str, platform: Platform, implementation: str, base: ModelConfig, adapted: str
) -> jax.stages.Traced:
    """The gradient of a decoder's loss, traced for a platform that is not there."""
    spec = resolve(LoRAConfig(rules=(LoRARule(adapted, 2),)), projection_shapes(base), layer_numbers(base))
    params = jax.eval_shape(lambda: init_params(base, jax.random.key(0)))
    lora = jax.eval_shape(lambda: init_lora(base, spec, jax.random.key(0)))
    model = Decoder(base, spec, numerics_for("bfloat16", platform, implementation), remat=remat)

    def loss(lora, params, tokens):
        return jnp.sum(model.apply({"params": params, "lora": lora}, tokens).astype(jnp.float32))

    tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
    return jax.jit(jax.grad(loss)).trace(lora, params, tokens)


def moved(text: str, memory: str) -> list[str]:
    """Types of the arrays that a program puts into a memory."""
    lines = [
        line for line in text.splitlines() if "annotate_device_placement" in line and f'"{memory}"' in line
    ]
    return [re.findall(r"tensor<([^>]*)>", line)[-1] for line in lines]


@pytest.mark.parametrize("remat", [name for name in REMAT if name.endswith(OFFLOAD)])
def test_what_a_policy_saves_goes_to_the_host_and_comes_back(remat):
    program = traced(remat, Platform("tpu"), "xla", small("llama"), "ffn/")
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    out, back = moved(text, "pinned_host"), moved(text, "device")
    of_input, wide = f"{ROWS}x{SEQ}x{D}xbf16", f"{ROWS}x{SEQ}x{F}xbf16"
    assert of_input in out
    assert (wide in out) == remat.startswith("dots")
    assert sorted(out) == sorted(back)
    if remat == f"full{OFFLOAD}":
        assert out == [of_input]


FORWARD, BACKWARD = (
    jax.extend.core.Primitive(fused._dot_product_attention_fwd_p_wrapper.name),
    jax.extend.core.Primitive(fused._dot_product_attention_bwd_p_wrapper.name),
)


@FORWARD.def_abstract_eval
def _(q, k, v, visible):
    return q


@BACKWARD.def_abstract_eval
def _(q, k, v, visible, result, cotangent):
    return q, k, v


BACKWARD.multiple_results = True


@jax.custom_vjp
def cudnn(q, k, v, visible):
    """cuDNN's attention, as a trace without a GPU shows it: `jax.nn.dot_product_attention` needs one to be traced."""
    return FORWARD.bind(q, k, v, visible)


def cudnn_forward(q, k, v, visible):
    result = FORWARD.bind(q, k, v, visible)
    return result, (q, k, v, visible, result)


cudnn.defvjp(cudnn_forward, lambda saved, cotangent: (*BACKWARD.bind(*saved, cotangent), None))


def traced_cudnn(q, k, v, visible, scale):
    return cudnn(*(x.astype(jnp.bfloat16) for x in (q, k, v)), visible).astype(jnp.float32)


def saved_by_layer(jaxpr: Any) -> float:
    """Returns the bf16 values per token and layer that forward scans save, without ranks and norms' factors."""
    widths = 0.0
    for equation in jaxpr.eqns:
        inner = [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        if equation.primitive.name != "scan" or equation.params["reverse"]:
            widths += sum(map(saved_by_layer, inner))
            continue
        body = equation.params["jaxpr"].jaxpr.outvars
        stacked = [
            o.aval for o, i in zip(equation.outvars, body, strict=True) if o.aval.shape != i.aval.shape
        ]
        floats = [aval for aval in stacked if jnp.issubdtype(aval.dtype, jnp.floating)]
        of_tokens = [aval for aval in floats if aval.shape[1:3] == (ROWS, SEQ) and aval.ndim > 3]
        wide = [aval for aval in of_tokens if aval.shape[-1] > 4]
        widths += sum(aval.size * aval.dtype.itemsize / 2 for aval in wide) / (LAYERS * ROWS * SEQ)
    return widths


@pytest.fixture
def saved_on_a_gpu(monkeypatch):
    """The values that a layer of a model saves there, with adapters on all projections."""
    monkeypatch.setattr(attention_gpu, "dot_product", traced_cudnn)
    monkeypatch.setattr(attention_gpu, "compiles", lambda *_: True)
    gpu = Platform("gpu", "NVIDIA H100 80GB HBM3", 1)
    return lambda base, remat: saved_by_layer(traced(remat, gpu, "auto", base, "_proj").jaxpr)


FULL_LAYERS = {"layer_types": ["full_attention"] * LAYERS}


@pytest.mark.parametrize(
    ("base", "remat"),
    [
        (small("llama"), "full"),
        (small("llama"), "attention"),
        (small("llama"), "dots"),
        # Norms of queries and keys as well as of the parts' results, not of their inputs.
        (small("olmo2"), "attention"),
        (small("olmo2"), "dots"),
        # Norms of all of these.
        (small("gemma3_text", **FULL_LAYERS), "full"),
        (small("gemma3_text", **FULL_LAYERS), "dots"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_estimated_values_are_those_that_a_layer_saves(saved_on_a_gpu, base, remat):
    assert saved_on_a_gpu(base, remat) == saved_values(base, remat, 1, CUDNN)


def test_the_last_layer_of_a_period_may_save_more_than_the_others(saved_on_a_gpu):
    period = ["sliding_attention", "full_attention"]
    layers = {"num_hidden_layers": 2 * LAYERS, "layer_types": period * LAYERS, "sliding_window": 4}
    base = small("gemma4_text", hidden_size_per_layer_input=0, **layers)
    attention, last, dots = (saved_on_a_gpu(base, remat) for remat in ("attention", "dots_last", "dots"))
    assert last - attention == dots - last == 2 * F
    estimated = [values_for_backward(base, remat, 1, CUDNN)[0] for remat in ("dots_last", "attention")]
    assert estimated[0] - estimated[1] == 2 * F * LAYERS


@pytest.mark.parametrize(
    ("asked", "remat", "way"),
    [("auto", "full_offload", "gather"), ("auto", "full", "auto"), ("send", "full_offload", "send")],
)
def test_experts_are_gathered_if_inputs_are_offloaded(asked, remat, way):
    assert chosen_experts(asked, remat) == way


def test_a_cpu_has_no_other_memory():
    with pytest.raises(
        NaloraError, match=r"--compute.remat: expected .* on cpu, .* found dots_offload; use dots, or"
    ):
        check_remat("dots_offload", "cpu")
    check_remat("dots_offload", "tpu")
    check_remat("dots_offload", "gpu")
    check_remat("dots", "cpu")
