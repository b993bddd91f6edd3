"""Policies that save in the host's memory: what goes there, and where they are refused."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig, projection_shapes
from nalora_jax.models.decoder import Decoder, init_params
from nalora_jax.models.remat import OFFLOAD, REMAT, check_remat
from nalora_jax.nn.low_rank import resolve
from nalora_jax.ops.numerics import Platform, numerics_for

ROWS, SEQ, D, F = 2, 8, 16, 24


@pytest.fixture(scope="module")
def lowered():
    """The gradient of a decoder's loss as a TPU's compiler is given it, which needs no TPU."""
    base = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": D,
            "intermediate_size": F,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn/", 2),)), projection_shapes(base), base.n_layers)
    params = jax.eval_shape(lambda: init_params(base, jax.random.key(0)))
    lora = jax.eval_shape(lambda: init_lora(base, spec, jax.random.key(0)))

    def make(remat: str) -> str:
        numerics = numerics_for("bfloat16", Platform("tpu"), "xla")
        model = Decoder(base, spec, numerics, remat=remat)

        def loss(lora, params, tokens):
            return jnp.sum(model.apply({"params": params, "lora": lora}, tokens).astype(jnp.float32))

        tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
        return jax.jit(jax.grad(loss)).trace(lora, params, tokens).lower(lowering_platforms=("tpu",)).as_text()

    return make


def moved(text: str, memory: str) -> list[str]:
    """Types of the arrays that a program puts into a memory."""
    lines = [line for line in text.splitlines() if "annotate_device_placement" in line and f'"{memory}"' in line]
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


def test_a_cpu_has_no_other_memory():
    with pytest.raises(NaloraError, match=r"--compute.remat: expected .* on cpu, .* found dots_offload; use dots, or"):
        check_remat("dots_offload", "cpu")
    check_remat("dots_offload", "tpu")
    check_remat("dots_offload", "gpu")
    check_remat("dots", "cpu")
