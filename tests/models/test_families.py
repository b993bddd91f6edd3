"""Every family against transformers: tiny random models with every feature of their config switched
on, in float32.

`docs/make_parity.py` runs the same measurements and writes the table of the documentation.
"""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import nalora_jax
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.models import families
from nalora_jax.models import family as records
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.merge import merged_tensors
from tests.models.compared import TEXT_HALVES, model_class
from tests.models.family_fields import GRANITE, LATENT, LLAMA3, ORIGINAL, WINDOW, YARN
from tests.param_trees import params_from_tensors

# Largest logit difference over the largest logit; at most 1.05e-5, with JAX 0.12.
TOLERANCE = 2e-5
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
SEQ, SHORT = 40, 20  # longer than the sliding windows and the original contexts
FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"


def rope(kind: str, theta: float = 1e4, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **fields}


LONGROPE = rope(
    "longrope", partial_rotary_factor=0.5, short_factor=[1.0, 1.5], long_factor=[2.0, 3.5]
)
HEAD = {"head_dim": 16}
WINDOWS = {"sliding_window": WINDOW}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
BIAS, TIED, UNTIED = (
    {"attention_bias": True},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
)
BIASES = BIAS | {"mlp_bias": True}
GEMMA = {**HEAD, **WINDOWS, **BIAS, "query_pre_attn_scalar": 24, "final_logit_softcapping": 2.0}
PROPORTIONAL = rope("proportional", 1e5, partial_rotary_factor=0.5)
GEMMA4 = {
    "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "layer_types": [SLIDING, SLIDING, FULL] * 2, "num_hidden_layers": 6, "final_logit_softcapping": 2.0,
    "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
    "rope_parameters": {FULL: PROPORTIONAL, SLIDING: rope("default", 1e3)}, **WINDOWS, **BIAS,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 40}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 3}
GLM_EXPERTS = {"n_routed_experts": 8, "moe_intermediate_size": 24}
UNNORMALIZED = {"norm_topk_prob": False}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}
DELTA_NET |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LATENT_YARN = YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}
LFM2 = {"num_hidden_layers": 5, "conv_L_cache": 4, "norm_eps": 1e-3}


@dataclass(frozen=True)
class Case:
    """One model: its family, what is switched on, and what transformers can be compared on."""

    family: str
    features: str
    config: dict = field(hash=False)
    # transformers takes the longest row of a batch for everybody's RoPE length: compare rows of one
    # length there.
    one_length: bool = False
    # Norms of small values amplify the float32 rounding of a recurrence, in both libraries.
    tolerance: float = TOLERANCE
    like: str = ""  # the ``model_type`` of transformers' model, if it does not have the family's


def case(
    family: str,
    features: str,
    *groups: dict,
    one_length: bool = False,
    tolerance: float = TOLERANCE,
    like: str = "",
    **fields: Any,
) -> Case:
    """A case whose config has the fields of the groups and these."""
    config = {name: value for group in (*groups, fields) for name, value in group.items()}
    return Case(family, features, config, one_length, tolerance, like)


# fmt: off
CASES = (
    case("llama", "llama3 RoPE, attention and FFN biases", HEAD, BIASES, rope_parameters=LLAMA3),
    case("llama", "YaRN, mscale, no truncation", HEAD,
         rope_parameters=YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16.0}),
    case("llama", "dynamic RoPE", rope_parameters=rope("dynamic", factor=4.0),
         max_position_embeddings=ORIGINAL, one_length=True),
    case("mistral", "sliding window, head_dim", HEAD, WINDOWS),
    case("qwen2", "qkv biases, sliding window from layer 2", QWEN_WINDOWS, max_window_layers=2),
    case("qwen3", "qk-norm, biases, sliding window from layer 1", HEAD, BIAS, QWEN_WINDOWS,
         max_window_layers=1),
    case("gemma", "1 + w norms, embedding scale, GeGLU, biases", HEAD, BIAS),
    case("gemma2", "soft caps, alternating windows, four norms, query scale, biases", GEMMA,
         attn_logit_softcapping=2.0),
    case("gemma3_text", "local and global RoPE, qk-norm, windows, linear scaling, final soft cap, biases",
         GEMMA, layer_types=[SLIDING, FULL] * 2,
         rope_parameters={FULL: rope("linear", 1e5, factor=4.0), SLIDING: rope("default", 1e3)}),
    case("gemma4_text",
         "sliding and full layers, K = V, proportional RoPE, layer scalars, biases, experts added to "
         "the FFN", GEMMA4, enable_moe_block=True, num_experts=6, top_k_experts=2,
         moe_intermediate_size=12),
    case("gemma4_unified_text", "values of projections, linear RoPE, untied head", GEMMA4, UNTIED,
         attention_k_eq_v=False, attention_bias=False, final_logit_softcapping=None,
         rope_parameters={FULL: PROPORTIONAL | {"partial_rotary_factor": 0.25},
                          SLIDING: rope("linear", 1e3, factor=4.0)}),
    case("gemma4_text", "per-layer embeddings, keys of earlier layers, double-wide FFN", GEMMA4,
         attention_k_eq_v=False, num_global_key_value_heads=None, hidden_size_per_layer_input=12,
         vocab_size_per_layer_input=130, num_kv_shared_layers=3, use_double_wide_mlp=True,
         rms_norm_eps=1e-2),  # smaller: transformers in float32 differs from itself in float64 by 5e-5
    case("phi3", "fused projections, LongRoPE, partial rotation, sliding window", WINDOWS,
         rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL, one_length=True),
    case("olmo2", "post-norms only, qk-norm over projections, biases", BIAS),
    case("olmo3",
         "windows and full layers, YaRN in full layers, post-norms only, qk-norm over projections, "
         "biases, one KV head", WINDOWS, BIAS, num_key_value_heads=1,
         rope_parameters={FULL: YARN, SLIDING: rope("default", 1e3)}),
    case("olmoe", "8 experts, top-3, not normalised, qk-norm over projections, biases", BIAS, UNNORMALIZED,
         num_experts=8, num_experts_per_tok=3, intermediate_size=24),
    case("exaone4", "post-norms only, qk-norm, windows with llama3 RoPE, no RoPE in full layers, tied",
         HEAD, WINDOWS, TIED, sliding_window_pattern=3, rope_parameters=LLAMA3),
    case("exaone4", "no windows, RoPE in all layers", sliding_window=None, layer_types=[FULL] * 4),
    case("hunyuan_v1_dense", "qk-norm after RoPE, dynamic RoPE with a fixed alpha, biases", HEAD, BIAS,
         rope_parameters=rope("dynamic", 1e3, alpha=50.0, factor=1.0)),
    case("seed_oss", "biases of queries, keys and values, of outputs and of the FFN, YaRN", HEAD,
         attention_out_bias=True, mlp_bias=True, rope_parameters=YARN),
    case("ernie4_5", "RoPE of adjacent dimensions, biases, untied", HEAD, UNTIED, use_bias=True,
         rope_parameters=YARN),
    case("ministral3", "YaRN with mscale, query scale by position, sliding window, MHA", HEAD, WINDOWS,
         num_key_value_heads=4,
         rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.6}),
    case("smollm3", "layers without RoPE, sliding there, biases", QWEN_WINDOWS, BIASES,
         no_rope_layer_interval=2),
    case("granite", "embedding, attention, residual and logit multipliers, biases", GRANITE, BIASES),
    case("qwen3_5_text",
         "Gated DeltaNet and gated attention in given order, YaRN of half a head, width 3, biases",
         DELTA_NET, BIAS, layer_types=[LINEAR, FULL, LINEAR, LINEAR], linear_num_value_heads=6,
         linear_value_head_dim=4, linear_conv_kernel_dim=3, hidden_act="gelu_pytorch_tanh",
         rope_parameters=YARN | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}, tolerance=5e-5),
    case("qwen3_5_moe_text", "Gated DeltaNet, top-3 of 8 experts, gated shared expert", DELTA_NET, SHARED,
         BIAS, tolerance=5e-5),
    case("qwen3_next",
         "fused DeltaNet, top-3 of 8 experts, not normalised, gated shared expert, two dense layers",
         DELTA_NET, SHARED, UNNORMALIZED, mlp_only_layers=[1, 3], tolerance=5e-5),
    case("granite_swa",
         "attention sinks, a rotary base per layer and none in one, windows, multipliers, biases, MHA",
         GRANITE, WINDOWS, BIASES, UNTIED, num_key_value_heads=4, layer_rope_theta=[1e4, 0.0, 1e2, 1e4],
         rope_parameters=rope("linear", factor=2.0)),
    case("lfm2", "gated short convolutions of width 4 and attention layers, qk-norm, tied", LFM2,
         layer_types=[CONV, CONV, FULL, CONV, FULL], block_multiple_of=20, block_ffn_dim_multiplier=1.3),
    case("lfm2_moe",
         "gated short convolutions of width 4 and attention, two dense layers, top-3 of 8 experts, "
         "scores corrected, scaled, qk-norm, untied", LFM2, EXPERTS, UNTIED,
         layer_types=[CONV, FULL, CONV, FULL, CONV], num_dense_layers=2, routed_scaling_factor=1.5),
    case("mixtral", "4 experts, top-2, sliding window", HEAD, WINDOWS, num_local_experts=4,
         num_experts_per_tok=2),
    case("qwen3_moe", "8 experts, top-3, normalised, qk-norm, biases, sliding window", HEAD, EXPERTS, BIAS,
         QWEN_WINDOWS, norm_topk_prob=True),
    case("gpt_oss",
         "attention sinks, 8 experts with biases, top-3, clamped gate, alternating windows, YaRN", HEAD,
         WINDOWS, LOCAL_EXPERTS, swiglu_alpha=1.3, swiglu_limit=0.8,  # some gates, many up projections clamped
         rope_parameters=YARN | {"truncate": False, "beta_fast": 16.0}),
    case("qwen3_moe", "8 experts in every second layer, top-2, not normalised", HEAD, EXPERTS, UNNORMALIZED,
         num_experts_per_tok=2, decoder_sparse_step=2),
    case("qwen2_moe",
         "8 experts, top-3, not normalised, gated shared expert, a dense layer, sliding window", SHARED,
         UNNORMALIZED, QWEN_WINDOWS, mlp_only_layers=[1], max_window_layers=2),
    case("deepseek_v2", "latent attention, low-rank queries, top-3 of 8 experts in 2 of 4 groups by their "
         "best, scaled, 2 shared experts, a dense layer, biases, YaRN with mscale", LATENT, BIAS, GLM_EXPERTS,
         num_experts_per_tok=3, n_group=4, topk_group=2, topk_method="group_limited_greedy",
         routed_scaling_factor=3.0, first_k_dense_replace=1, rope_parameters=LATENT_YARN),
    case("deepseek_v2", "latent attention, queries of full rank, greedy top-3 of 8 experts", LATENT, GLM_EXPERTS,
         q_lora_rank=None, num_experts_per_tok=3, first_k_dense_replace=1),
    case("deepseek_v3", "latent attention, low-rank queries, top-3 of 8 experts in 2 of 4 groups, scores "
         "corrected, scaled, shared expert, 2 dense layers, biases, YaRN with mscale", LATENT, BIAS, GLM_EXPERTS,
         num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=2, rope_parameters=LATENT_YARN),
    case("deepseek_v3", "latent attention, queries of full rank, RoPE of halves, no groups, not normalised",
         LATENT, GLM_EXPERTS, UNNORMALIZED, q_lora_rank=None, num_experts_per_tok=3, n_group=1, topk_group=1,
         first_k_dense_replace=1, rope_interleave=False, n_shared_experts=2),
    case("kimi_k2", "DeepSeek-V3's, top-3 of 8 experts without groups", LATENT, GLM_EXPERTS, like="deepseek_v3",
         num_experts_per_tok=3, n_group=1, topk_group=1, first_k_dense_replace=1, rope_parameters=LATENT_YARN),
    case("glm4_moe_lite", "latent attention with values as wide as keys, top-3 of 8 experts, scores corrected, "
         "scaled, shared expert, dense layers in given order", LATENT, GLM_EXPERTS, num_experts_per_tok=3,
         v_head_dim=12, mlp_layer_types=["dense", "sparse", "dense", "sparse"], rms_norm_eps=1e-3),
    case("mistral4", "latent attention, low-rank queries that grow with position, softmax top-3 of 8 experts in 2 "
         "of 4 groups, shared expert, YaRN with mscale", LATENT, GLM_EXPERTS, num_experts_per_tok=3, n_group=4,
         topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.5,
         rope_parameters=LATENT_YARN | {"llama_4_scaling_beta": 0.6, "partial_rotary_factor": 1 / 3}),
    # Without a padding token, whose row transformers sets to zero when it loads a tied embedding.
    case("youtu", "latent attention, dense layers, tied", LATENT, pad_token_id=None,
         rope_parameters=LATENT_YARN),
    case("glm4_moe",
         "top-3 of 8 experts in 2 of 4 groups, scores corrected, scaled, 2 shared experts, a dense "
         "layer, qk-norm, biases, partial YaRN", HEAD, BIAS, GLM_EXPERTS, num_experts_per_tok=3, n_group=4,
         topk_group=2, routed_scaling_factor=1.7, n_shared_experts=2, use_qk_norm=True,
         rope_parameters=YARN | {"partial_rotary_factor": 0.25}),
)
# fmt: on


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here; ours come from the files that transformers
    wrote."""

    theirs: torch.nn.Module
    config: ModelConfig
    params: dict

    @functools.cached_property
    def model(self) -> Decoder:
        return Decoder(self.config)

    @functools.cached_property
    def logits(self):
        @jax.jit
        def run(tokens, segment_ids):
            hidden = self.model.apply({"params": self.params}, tokens, segment_ids=segment_ids)
            return self.model.apply({"params": self.params}, hidden, method="unembed")

        return run


@functools.cache
def build(case: Case) -> Pair:
    """A random model of the case, saved by transformers and read back through the key map."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    name = case.like or case.family
    config = transformers.AutoConfig.for_model(name, **(SIZES | case.config))
    theirs = model_class(case.family)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        scalars = [(name, x) for name, x in theirs.named_buffers() if name.endswith("layer_scalar")]
        for name, parameter in [*theirs.named_parameters(), *scalars]:
            # Spread such that logits depend on the tokens and continuations do not run into one
            # token at once.
            tied = (
                config.tie_word_embeddings
            )  # a large tied embedding makes every token predict itself
            spread = (0.05 if tied else 1.0) if "embed_tokens.weight" in name else 0.2
            of_scale = "norm" in name or "scal" in name
            offset = "gemma" in case.family and "gemma4" not in case.family  # files hold w of 1 + w
            centre = float(of_scale and not offset)
            parameter.copy_(torch.randn_like(parameter) * spread + centre)
        for name, buffer in theirs.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        raw = json.loads((Path(folder) / "config.json").read_text())
        tensors = safetensors.numpy.load_file(Path(folder) / "model.safetensors")
    ours = ModelConfig.from_hf(raw | {"model_type": case.family})
    names = keymap_for(ours, "hf").check(
        {name: x.shape for name, x in tensors.items()}, case.family
    )
    return Pair(theirs, ours, params_from_tensors(ours, lambda name: tensors[names[name]]))


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 128, (rows, length))


def reset_rope(pair: Pair) -> None:
    """Dynamic RoPE in transformers remembers the longest sequence that it has seen: each comparison
    starts afresh."""
    rope = getattr(pair.theirs.model, "rotary_emb", None)
    if getattr(rope, "rope_type", None) == "dynamic":
        rope.inv_freq, rope.max_seq_len_cached = rope.original_inv_freq, rope.original_max_seq_len


def reference(pair: Pair, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    """transformers' logits; ``real`` marks tokens that are not padding."""
    reset_rope(pair)
    with torch.no_grad():
        if real is None:
            return pair.theirs(torch.tensor(tokens)).logits.numpy()
        mask = torch.tensor(real.astype(np.int64))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return pair.theirs(
            torch.tensor(tokens), attention_mask=mask, position_ids=positions
        ).logits.numpy()


def difference(ours: jax.Array, theirs: np.ndarray, where: Any = ...) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(np.asarray(ours) - theirs)[where].max() / np.abs(theirs[where]).max())


def measure_plain(case: Case) -> float:
    pair, tokens = build(case), random_tokens(2, SEQ)
    return difference(pair.logits(tokens, np.ones_like(tokens)), reference(pair, tokens))


def measure_padding(case: Case) -> float:
    """A row with padding on the right and one with padding on the left."""
    pair, tokens, index = build(case), random_tokens(2, SEQ), np.arange(SEQ)
    real = np.stack([index < SEQ - 3, index >= SEQ - (SEQ - 3 if case.one_length else SHORT)])
    tokens = np.where(real, tokens, 0)
    return difference(pair.logits(tokens, real.astype(int)), reference(pair, tokens, real), real)


def measure_packing(case: Case) -> float:
    """One row of three sequences and padding, against three runs of their own."""
    pair, lengths = build(case), (SHORT, 11, 6)
    tokens = random_tokens(2, SEQ)
    segments = np.repeat([1, 2, 3, 0], [*lengths, SEQ - sum(lengths)])[None].repeat(2, axis=0)
    ours, start, differences = np.asarray(pair.logits(tokens, segments)), 0, []
    for length in lengths:
        part = slice(start, start + length)
        differences.append(difference(ours[:, part], reference(pair, tokens[:, part])))
        start += length
    return float(np.max(differences))


def greedy(pair: Pair, tokens: np.ndarray, real: np.ndarray, steps: int) -> np.ndarray:
    """Greedy continuation with the cache: one prefill, then one token at a time."""
    model, variables = pair.model, {"params": pair.params}
    cache = init_cache(pair.config, tokens.shape[0], tokens.shape[1] + steps)

    def next_token(hidden):
        return jnp.argmax(model.apply(variables, hidden[:, -1:], method="unembed"), axis=-1)

    @jax.jit
    def run(tokens, segments, cache):
        hidden, cache = model.apply(variables, tokens, segment_ids=segments, cache=cache)

        def step(carry, _):
            token, cache = carry
            hidden, cache = model.apply(variables, token, cache=cache)
            return (next_token(hidden), cache), token[:, 0]

        return jax.lax.scan(step, (next_token(hidden), cache), length=steps)[1].T

    return np.asarray(run(tokens, real.astype(np.int32), cache))


def measure_greedy(case: Case, steps: int = 64) -> int:
    """Tokens in agreement with ``transformers.generate``, of ``steps`` in each of two rows (left
    padding)."""
    pair, tokens = build(case), random_tokens(2, SHORT)
    real = np.ones_like(tokens, bool)
    if not case.one_length:
        real[1, :7] = False
    tokens = np.where(real, tokens, 0)
    reset_rope(pair)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pair.theirs.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(real.astype(np.int64)),
            max_new_tokens=steps,
            do_sample=False,
        ).numpy()[:, SHORT:]
    assert all(len(set(row)) >= 4 for row in theirs), "a continuation that proves little"
    ours = greedy(pair, tokens, real, steps)
    return int(np.cumprod(ours == theirs, axis=1).sum(axis=1).min())


def random_adapters(config: ModelConfig) -> tuple[dict, AdapterSpec]:
    """Adapters of rank 2 on every projection, B not zero."""
    shapes, layers = projection_shapes(config), depths(config)
    spec = AdapterSpec(
        tuple((path, TargetSpec((2,) * layers[path], (3.0,) * layers[path])) for path in shapes)
    )
    rng, leaves = np.random.default_rng(3), {}
    for path, (*lead, d_in, d_out) in shapes.items():
        for name, shape in {"a": (d_in, 2), "b": (2, d_out)}.items():
            leaves[f"{path}/{name}"] = rng.normal(0, 0.1, (layers[path], *lead, *shape)).astype(
                np.float32
            )
    return unflatten(leaves), spec


def kernel_gradients(
    pair: Pair, merged: dict, tokens: np.ndarray, real: np.ndarray, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """transformers' gradients of the mean loss with the weights ``merged``, by our paths.

    Without a mask of the padding, which follows all real tokens: in float64 transformers returns
    NaN for a padding token whose window has padding only.
    """
    with tempfile.TemporaryDirectory() as folder:
        pair.theirs.config.save_pretrained(folder)
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in merged.items()}
        safetensors.numpy.save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        plain = {
            "attn_implementation": "eager",
            "experts_implementation": "eager",
        }  # others have no float64
        model = type(pair.theirs).from_pretrained(folder, **plain, dtype=dtype).eval()
        longest = int(real.sum(axis=1).max())
        logits = model(torch.tensor(tokens[:, :longest])).logits
        targets = torch.tensor(np.where(real, tokens, -100))[:, 1:longest]
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets.flatten()
        ).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )
        model.save_pretrained(folder)
        gradients = safetensors.numpy.load_file(Path(folder) / "model.safetensors")
    return flatten(params_from_tensors(pair.config, gradients.__getitem__))


def chain_rule(
    spec: AdapterSpec, lora: dict[str, Any], kernels: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gradients of A and B from those of the merged weights W + s A B."""
    leaves, gradients = flatten(lora), {}
    for path, _ in spec.targets:
        kernel, scale = kernels[f"{path}/kernel"], spec.scales(path)[0]
        a, b = leaves[f"{path}/a"], leaves[f"{path}/b"]
        gradients[f"{path}/a"] = scale * kernel @ b.swapaxes(-1, -2)
        gradients[f"{path}/b"] = scale * a.swapaxes(-1, -2) @ kernel
    return gradients


def largest_error(values: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Largest difference over the largest entry of its leaf; NaN if any is."""
    errors = [
        np.abs(values[path] - leaf).max() / np.abs(leaf).max() for path, leaf in reference.items()
    ]
    return float(np.max(errors))


def measure_gradients(case: Case) -> tuple[float, float]:
    """Largest error of the adapters' gradients, rematerialized, against transformers in float64,
    right padding.

    The second number is the error of transformers in float32, if ours is above 1e-4, and else 0:
    for some tokens these random models amplify rounding.
    """
    pair, tokens = build(case), random_tokens(2, SEQ)
    real = (
        np.arange(SEQ)[None] < np.array([SEQ - 3, SEQ - 3 if case.one_length else SHORT])[:, None]
    )
    tokens = np.where(real, tokens, 0)
    lora, spec = random_adapters(pair.config)
    merged = dict(merged_tensors(pair.config, pair.params, lora, spec))

    def theirs(dtype: torch.dtype) -> dict[str, np.ndarray]:
        reset_rope(pair)
        return chain_rule(spec, lora, kernel_gradients(pair, merged, tokens, real, dtype))

    model = Decoder(pair.config, spec, remat="full")

    @jax.jit
    @jax.grad
    def ours(lora):
        variables = {"params": pair.params, "lora": lora}
        hidden = model.apply(variables, tokens, segment_ids=real.astype(np.int32))
        logits = model.apply(variables, hidden, method="unembed")
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[
            ..., 0
        ]
        return jnp.sum(losses * real[:, 1:]) / real[:, 1:].sum()

    expected = theirs(torch.float64)
    error = largest_error(flatten(ours(lora)), expected)
    return error, largest_error(theirs(torch.float32), expected) if error > 1e-4 else 0.0


FIRST = {case.family: case for case in reversed(CASES)}
DYNAMIC, PER_LAYER = (
    case for case in CASES if case.features.startswith(("dynamic RoPE", "per-layer embeddings"))
)
# Each needs a program of its own: one family for each kind of cache, and for each kind of adapted
# layer.
CACHES = (
    "llama",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "ministral3",
    "qwen3_next",
    "lfm2",
    "gpt_oss",
    "deepseek_v3",
)
LAYERS = ("llama", "qwen3_next", "lfm2", "gpt_oss", "glm4_moe", "deepseek_v2")
# One layer of each kind: every further one is compiled again.
FEWER = {
    "gemma4_text": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    "qwen3_next": {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "mlp_only_layers": []},
    "lfm2": {"num_hidden_layers": 2, "layer_types": [CONV, FULL]},
    "glm4_moe": {"first_k_dense_replace": 0},
    "deepseek_v2": {"first_k_dense_replace": 0},
    "deepseek_v3": {"first_k_dense_replace": 0},
}
READING = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1}


def fewer_layers(case: Case, **fields: Any) -> Case:
    return replace(case, config=case.config | FEWER.get(case.family, {}) | fields)


SHORTER = fewer_layers(PER_LAYER, **READING)
GREEDY = [*(fewer_layers(FIRST[family]) for family in CACHES), DYNAMIC, SHORTER]
GRADIENTS = [*(fewer_layers(FIRST[family]) for family in LAYERS), SHORTER]


def by_name(case: Case) -> str:
    return f"{case.family}: {case.features}"


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_logits_agree_beyond_the_window_with_padding_and_in_packed_rows(case):
    assert measure_plain(case) <= case.tolerance
    assert measure_padding(case) <= case.tolerance
    assert measure_packing(case) <= case.tolerance


@pytest.mark.parametrize("case", GREEDY, ids=by_name)
def test_greedy_continuation_with_cache_is_identical(case):
    assert measure_greedy(case, 32) == 32


@pytest.mark.parametrize("case", GRADIENTS, ids=by_name)
def test_adapters_get_the_gradients_of_transformers(case):
    error, rounding = measure_gradients(case)
    assert error <= max(1e-4, 4 * rounding)


def test_a_family_is_named_in_its_record_alone():
    package = Path(nalora_jax.__file__).parent
    texts = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    del texts[package / "weights/gguf.py"]  # llama.cpp's names of pre-tokenizers
    # Defaults of `register_family` and of PEFT's "all-linear", and text models of multimodal
    # models.
    for family in records.BUILT_IN.keys() - {"llama", "gemma3_text", "lfm2", "qwen2", *TEXT_HALVES}:
        (group,) = (g for g in families.GROUPS if records.BUILT_IN[family] in vars(g).values())
        named = [path for path, text in texts.items() if f'"{family}"' in text]
        assert named == [Path(group.__file__)], family


def test_every_family_has_a_case_and_a_row_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text("utf-8")
    whole = records.BUILT_IN.keys() - TEXT_HALVES
    assert {case.family for case in CASES} == whole
    for family in map(records.BUILT_IN.get, whole):
        like = FIRST[family.name].like or family.name
        # which lacks Mistral 4
        named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(like, family.class_name)
        assert named == family.class_name
        assert f"| {family.name} | {family.class_name} |" in page


BIASES_OF_B = {"conv_bias": True, "conv_L_cache": 2, "layer_types": [CONV, FULL] * 2}
BIASED = case("lfm2", "biases of the convolution", UNTIED, BIASES_OF_B)


def test_packed_rows_start_a_biased_convolution_anew():
    """In transformers left padding feeds the bias of B times that of u to a row's first tokens."""
    assert measure_plain(BIASED) <= TOLERANCE
    assert measure_packing(BIASED) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case.one_length], ids=by_name)
def test_a_row_has_its_own_rope_length_whatever_it_is_batched_with(case):
    """transformers takes the longest row's for all: its short row depends on its neighbour, and
    ours does not."""
    pair, tokens, short = build(case), random_tokens(2, SEQ), ORIGINAL - 4
    real = np.arange(SEQ)[None] < np.array([SEQ, short])[:, None]
    tokens = np.where(real, tokens, 0)
    alone = reference(pair, tokens[1:, :short])
    together = reference(pair, tokens, real)[1:, :short]
    ours = np.asarray(pair.logits(tokens, real.astype(int)))[1:, :short]
    assert difference(together, alone) > 1e-3
    assert difference(ours, alone) <= TOLERANCE
