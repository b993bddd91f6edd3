"""Models with Gated DeltaNet: caches, evaluation, adapters, configurations (logits: `test_families`)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops.delta_rule import CHUNK, DeltaInputs, gated_delta_rule
from nalora_jax.weights.peft_settings import rules_of
from tests.param_trees import init_params

RAW = {
    "model_type": "qwen3_5_text",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONFIG = ModelConfig.from_hf(RAW)
MODEL, LAYER = Decoder(CONFIG), "layers/group0/block0/linear_attn"


@pytest.fixture(scope="module")
def variables():
    return {"params": init_params(CONFIG, jax.random.key(0))}


def test_calls_with_a_cache_continue_after_padding_on_either_side(variables):
    tokens = np.random.default_rng(0).integers(0, 48, (2, 12))
    # Row 0 has no padding, row 1 has it before, between and after its tokens; positions count tokens.
    real = np.ones((2, 12), np.int32)
    real[1, [0, 1, 5, 6, 7, 11]] = 0
    step = jax.jit(
        lambda tokens, segments, cache: MODEL.apply(variables, tokens, segment_ids=segments, cache=cache)
    )
    cache, pieces = init_cache(CONFIG, 2, 12), []
    for piece in (slice(0, 4), slice(4, 8), slice(8, 12)):
        hidden, cache = step(tokens[:, piece], real[:, piece], cache)
        pieces.append(hidden)
    ours, alone = np.concatenate(pieces, axis=1), jax.jit(MODEL.apply)
    for row in range(2):
        place = real[row] > 0
        expected = alone(variables, tokens[row : row + 1, place])
        np.testing.assert_allclose(ours[row, place], expected[0], rtol=1e-4, atol=1e-4)


def test_choices_with_a_common_context_are_scored_like_single_ones(variables):
    rng = np.random.default_rng(1)
    contexts = [rng.integers(1, 48, n).tolist() for n in (9, 6, 4)]
    groups = [[(context, rng.integers(1, 48, n).tolist()) for n in (2, 3)] for context in contexts]
    together = score_groups(MODEL, variables, groups)

    @jax.jit
    def log_probs_of(tokens):
        logits = MODEL.apply(variables, MODEL.apply(variables, tokens), method="unembed")
        return jax.nn.log_softmax(logits)[0]

    for group, scores in zip(groups, together, strict=True):
        for (context, continuation), score in zip(group, scores, strict=True):
            row = context + continuation
            log_probs = log_probs_of(np.array([row + [0] * (12 - len(row))]))[len(context) - 1 :]
            expected = sum(float(log_probs[i, token]) for i, token in enumerate(continuation))
            assert score.log_prob == pytest.approx(expected, abs=1e-4)


def test_rules_and_all_linear_reach_every_projection():
    shapes, numbers = projection_shapes(CONFIG), layer_numbers(CONFIG)
    spec = resolve(
        LoRAConfig(rules=(LoRARule("linear_attn/in_proj_(qkv|z)", 3), LoRARule("", 0))), shapes, numbers
    )
    assert {path for path, _ in spec.targets} == {f"{LAYER}/in_proj_qkv", f"{LAYER}/in_proj_z"}
    parsed = [rule.split(":") for rule in rules_of(rank=2, alpha=4, targets="all-linear")]
    rules = tuple(LoRARule(pattern, int(rank), float(alpha)) for pattern, rank, alpha in parsed)
    spec = resolve(LoRAConfig(rules=rules), shapes, numbers)
    assert {path for path, _ in spec.targets} == shapes.keys()
    with pytest.raises(NaloraError, match="exclude_modules: expected no linear attention"):
        rules_of(rank=2, alpha=4, targets="all-linear", excluded=["in_proj_z"])


def test_flops_are_those_of_the_program():
    sizes = dict(CONFIG.kinds[1])["mixer"]
    shape = jax.ShapeDtypeStruct
    keys = shape((1, CHUNK, sizes.key_heads, sizes.key_dim), "float32")
    heads = (1, CHUNK, sizes.key_heads, sizes.value_heads // sizes.key_heads)
    rates, values = shape(heads, "float32"), shape((*heads, sizes.value_dim), "float32")
    inputs = DeltaInputs(keys, keys, values, rates, rates)
    compiled = jax.jit(gated_delta_rule).lower(inputs, shape((1, CHUNK), "int32")).compile()
    inverse = sizes.value_heads * 10 * 2 * CHUNK**3
    conv = 2 * sizes.conv_width * sizes.channels * CHUNK
    counted = sizes.flops(CONFIG, CHUNK) - conv + inverse
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


def test_a_multimodal_model_is_read_as_its_text_model():
    text = {key: value for key, value in RAW.items() if key != "model_type"}
    wrapper = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 2}}
    assert ModelConfig.from_hf(wrapper) == CONFIG
    with pytest.raises(NaloraError, match="a model that sees images: one of llava, gemma3"):
        ModelConfig.from_hf(wrapper, images=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types: expected 'full_attention' or",
        ),
        ({"attn_output_gate": False}, "attn_output_gate: expected true"),
        (
            {"linear_num_value_heads": 3},
            r"linear_num_value_heads: expected a multiple of linear_num_key_heads \(2\)",
        ),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: expected a whole number"),
        (
            {"full_attention_interval": 0, "layer_types": None},
            "full_attention_interval: expected a whole number",
        ),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor: expected an even share of head_dim"),
        ({"model_type": "qwen3_5_moe_text", "norm_topk_prob": False}, "norm_topk_prob: expected 1"),
    ],
)
def test_what_is_refused_is_named(changes, message):
    raw = {key: value for key, value in (RAW | changes).items() if value is not None}
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw)
