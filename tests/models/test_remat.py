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
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_params
from nalora_jax.models.remat import OFFLOAD, REMAT, check_remat, chosen_experts
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops import cudnn_attention
from nalora_jax.ops.dispatch import Platform
from nalora_jax.ops.numerics import numerics_for

ROWS, SEQ, D, F, HEADS, KV_HEADS = 2, 8, 64, 48, 4, 2


@pytest.fixture(scope="module")
def traced():
    """The gradient of a decoder's loss, traced for a platform that is not there."""
    base = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": D,
            "intermediate_size": F,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
        }
    )
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn/", 2),)), projection_shapes(base), base.n_layers)
    params = jax.eval_shape(lambda: init_params(base, jax.random.key(0)))
    lora = jax.eval_shape(lambda: init_lora(base, spec, jax.random.key(0)))

    def make(remat: str, platform: Platform, implementation: str) -> Any:
        numerics = numerics_for("bfloat16", platform, implementation)
        model = Decoder(base, spec, numerics, remat=remat)

        def loss(lora, params, tokens):
            return jnp.sum(model.apply({"params": params, "lora": lora}, tokens).astype(jnp.float32))

        tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
        return jax.jit(jax.grad(loss)).trace(lora, params, tokens)

    return make


@pytest.fixture(scope="module")
def lowered(traced):
    """The same as a TPU's compiler is given it."""
    return lambda remat: traced(remat, Platform("tpu"), "xla").lower(lowering_platforms=("tpu",)).as_text()


def moved(text: str, memory: str) -> list[str]:
    """Types of the arrays that a program puts into a memory."""
    lines = [
        line for line in text.splitlines() if "annotate_device_placement" in line and f'"{memory}"' in line
    ]
    return [re.findall(r"tensor<([^>]*)>", line)[-1] for line in lines]


@pytest.mark.parametrize("remat", [name for name in REMAT if name.endswith(OFFLOAD)])
def test_what_a_policy_saves_goes_to_the_host_and_comes_back(lowered, remat):
    text = lowered(remat)
    out, back = moved(text, "pinned_host"), moved(text, "device")
    of_input, wide = f"{ROWS}x{SEQ}x{D}xbf16", f"{ROWS}x{SEQ}x{F}xbf16"
    assert of_input in out
    assert (wide in out) == remat.startswith("dots")
    assert sorted(out) == sorted(back)
    if remat == f"full{OFFLOAD}":
        assert out == [of_input]


def test_other_policies_save_on_the_device(lowered):
    assert "annotate_device_placement" not in lowered("dots")


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


def traced_cudnn(q, k, v, visible, *_):
    return cudnn(q, k, v, visible).astype(jnp.float32)


@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("attention", 1), ("full", 2)])
def test_attention_of_cudnn_and_its_projections_are_made_again_by_full_alone(
    traced, monkeypatch, remat, times
):
    """Keys and values are the matmuls of this width: two in a layer."""
    monkeypatch.setattr(cudnn_attention, "dot_product", traced_cudnn)
    monkeypatch.setattr(cudnn_attention, "compiles", lambda *_: True)
    text = str(traced(remat, Platform("gpu", "NVIDIA H100 80GB HBM3", 1), "auto").jaxpr)
    assert text.count(f"= {FORWARD.name} ") == times
    assert text.count(f"= {BACKWARD.name} ") == 1
    width = KV_HEADS * D // HEADS
    assert len(re.findall(rf"\[{ROWS * SEQ},{width}\] = dot_general\[", text)) == 2 * times


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
