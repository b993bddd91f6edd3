"""Policies that save in the host's memory: what goes there, and where they are refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_params
from nalora_jax.models.remat import OFFLOAD, REMAT, check_remat
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


@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("attention", 1), ("full", 2)])
def test_attention_of_cudnn_and_its_projections_are_made_again_by_full_alone(
    traced, monkeypatch, remat, times
):
    """Traced, which needs no cuDNN but its version. Keys and values are the products of this width: two in a layer."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_attention, "compiles", lambda *_: True)
    text = str(traced(remat, Platform("gpu", "NVIDIA H100 80GB HBM3", 1), "auto").jaxpr)
    assert text.count("= dot_product_attention_fwd_wrapper[") == times
    assert text.count("= dot_product_attention_bwd_wrapper[") == 1
    width = KV_HEADS * D // HEADS
    assert len(re.findall(rf"\[{ROWS * SEQ},{width}\] = dot_general\[", text)) == 2 * times


def test_a_cpu_has_no_other_memory():
    with pytest.raises(
        NaloraError, match=r"--compute.remat: expected .* on cpu, .* found dots_offload; use dots, or"
    ):
        check_remat("dots_offload", "cpu")
    check_remat("dots_offload", "tpu")
    check_remat("dots_offload", "gpu")
    check_remat("dots", "cpu")
