"""The tables of `keymaps`: tensor names of every family in transformers' and in llama.cpp's files.

A row is (name, leaves, change). ``{layer}`` and ``{expert}`` in a name run over the stack. Rows
whose leaves a config does not have (biases, an untied head) are dropped, so one table serves every
variant of its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.errors import NaloraError
from nalora_jax.models import registered
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import BUILT_IN
from nalora_jax.models.families.tensors import (
    GATED,
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GGUF_FFN,
    GGUF_LLAMA,
    GGUF_PAIRED,
    GGUF_POST,
    GGUF_PRE,
    GGUF_QK,
    GGUF_QWEN2,
    HF_ATTENTION,
    HF_DENSE_LAYERS,
    HF_ENDS,
    HF_FFN,
    HF_FOUR_NORMS,
    HF_LLAMA,
    HF_OLMO2,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    HF_SINKS,
    TensorRow,
    gguf_ends,
    gguf_kernel,
    gguf_norms,
    hf_dense,
    hf_experts,
    hf_kernel,
    hf_norms,
)
from nalora_jax.models.stacks import stacks

Source = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Table:
    """All tensors of one family in one format, and further tensors that a file may contain."""

    rows: tuple[TensorRow, ...]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


def table(config: ModelConfig, source: Source) -> Table:
    """Returns the table of ``config``'s family.

    Raises:
      NaloraError: ``source`` is "gguf" and the family's names there are not known.
    """
    if source == "hf":
        aliases: tuple[tuple[str, str], ...] = ()
        if config.tie_embeddings:
            aliases = (("lm_head.weight", "model.embed_tokens.weight"),)
        ignored = (*_ROTARY, *SIGHT, *UNUSED, *_unread_keys(config))
        if config.model_type == "glm4_moe":  # the layer that predicts further tokens
            ignored += (rf"^model\.layers\.{config.n_layers}\.",)
        return Table(_rows(HF, config.model_type) or (), ignored, aliases, HF_RENAMES)
    rows = _rows(GGUF, config.model_type)
    if rows is None:
        raise NaloraError("GGUF", expected=f"one of {', '.join(GGUF)}", found=config.model_type)
    aliases = ()
    if config.tie_embeddings:
        aliases = (("output.weight", "token_embd.weight"),)
    return Table(rows, GGUF_IGNORED, aliases)


def _rows(tables: dict[str, tuple[TensorRow, ...]], model_type: str) -> tuple[TensorRow, ...] | None:
    """Returns the rows of a family, built-in or added by `models.families.register_family`."""
    if model_type in tables:
        return tables[model_type]
    if tables is HF and model_type in BUILT_IN:
        return BUILT_IN[model_type].tensors
    registered_rows = registered.tensors_of(model_type)
    if isinstance(registered_rows, str):
        return tables.get(registered_rows)
    if tables is HF:
        return registered_rows
    return None


def _unread_keys(config: ModelConfig) -> tuple[str, ...]:
    """Returns the pattern of keys and values of layers that read an earlier layer's."""
    layers = [str(layer) for stack in stacks(config) if stack.config.reads for layer in stack.layers]
    if not layers:
        return ()
    return (rf"^model\.layers\.({'|'.join(layers)})\.self_attn\.[kv]_(proj|norm)\.",)


# ---------------------------------------------------------------- transformers

_ROTARY = (r"rotary_emb\.inv_freq$", r"rotary_emb\.(cos|sin)_cached$")
# Vision tensors that a multimodal model has next to the text model.
SIGHT = (r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\.")
# Tensors of parts that the text model does not use: towers of Qwen3.5 and Gemma 4, and heads for several tokens.
UNUSED = (
    r"^(model\.)?visual\.",
    r"^mtp\.",
    r"^model\.(audio_tower|embed_(vision|audio)|vision_embedder)\.",
)
HF_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?(?=(embed_tokens|layers|norm)\.)", "model."),
)

_HF_PHI3 = (
    *HF_ENDS,
    *HF_PRE_NORMS,
    hf_kernel("self_attn.qkv_proj", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
    hf_kernel("self_attn.o_proj", "attn/o_proj"),
    hf_kernel("mlp.gate_up_proj", "ffn/gate_proj", "ffn/up_proj"),
    hf_kernel("mlp.down_proj", "ffn/down_proj"),
)


def _hf_delta_net(*inputs: str) -> tuple[TensorRow, ...]:
    """Returns the tensors of Gated DeltaNet, with the names of the projections of its input."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias"}
    names |= {"conv1d.weight": "conv/weight", "norm.weight": "norm/scale"}
    rows = (
        TensorRow(f"model.layers.{{layer}}.linear_attn.{theirs}", (f"layers/linear_attn/{ours}",))
        for theirs, ours in names.items()
    )
    return (*hf_dense("linear_attn", "linear_attn", (*inputs, "out_proj")), *rows)


_HF_MIXTRAL = hf_experts("block_sparse_moe", ("w1", "w3", "w2"))
_HF_QWEN_EXPERTS = (*hf_experts("mlp", GATED), *HF_DENSE_LAYERS)
_HF_QWEN2_EXPERTS = (
    *hf_experts("mlp", GATED, "ffn/experts_ffn"),
    *hf_dense("mlp.shared_expert", "ffn/shared_ffn", GATED),
    hf_kernel("mlp.shared_expert_gate", "ffn/shared_gate"),
    *HF_DENSE_LAYERS,
)
_HF_GLM_EXPERTS = (
    *hf_experts("mlp", GATED, "ffn/experts_ffn"),
    TensorRow(
        "model.layers.{layer}.mlp.gate.e_score_correction_bias",
        ("layers/ffn/experts_ffn/router/correction",),
    ),
    *hf_dense("mlp.shared_experts", "ffn/shared_ffn", GATED),
    *HF_DENSE_LAYERS,
)
_HF_HYBRID = (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS)
_HF_QWEN3_5 = (*_HF_HYBRID, *_hf_delta_net("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
_HF_QWEN3_NEXT = (*_HF_HYBRID, *_hf_delta_net("in_proj_qkvz", "in_proj_ba"))

_HF_GEMMA4 = (
    *HF_ENDS,
    *HF_FOUR_NORMS,
    *HF_ATTENTION,
    *HF_QK_NORMS,
    *HF_FFN,
    *hf_dense("mlp", "ffn/dense_ffn", GATED),
    TensorRow(
        "model.layers.{layer}.experts.gate_up_proj",
        ("layers/ffn/experts_ffn/gate_proj/kernel", "layers/ffn/experts_ffn/up_proj/kernel"),
        "transpose",
    ),
    TensorRow(
        "model.layers.{layer}.experts.down_proj", ("layers/ffn/experts_ffn/down_proj/kernel",), "transpose"
    ),
    hf_kernel("router.proj", "ffn/experts_ffn/router"),
    TensorRow("model.layers.{layer}.router.scale", ("layers/ffn/router_norm/scale",)),
    TensorRow("model.layers.{layer}.router.per_expert_scale", ("layers/ffn/experts_ffn/router/scale",)),
    *hf_norms(
        {
            "ffn/dense_norm": "post_feedforward_layernorm_1",
            "ffn/experts_norm": "pre_feedforward_layernorm_2",
            "ffn/experts_post_norm": "post_feedforward_layernorm_2",
            "tail/norm": "post_per_layer_input_norm",
        }
    ),
    hf_kernel("per_layer_input_gate", "tail/gate_proj"),
    hf_kernel("per_layer_projection", "tail/down_proj"),
    TensorRow("model.layers.{layer}.layer_scalar", ("layers/tail/scale",)),
    TensorRow("model.embed_tokens_per_layer.weight", ("layer_embeddings/embedding",)),
    TensorRow(
        "model.per_layer_model_projection.weight", ("layer_embeddings/projection/kernel",), "transpose"
    ),
    TensorRow("model.per_layer_projection_norm.weight", ("layer_embeddings/norm/scale",)),
)

_HF_GPT_OSS = (
    HF_SINKS,
    hf_kernel("mlp.router", "ffn/router"),
    TensorRow("model.layers.{layer}.mlp.router.bias", ("layers/ffn/router/bias",)),
    *(
        TensorRow(
            f"model.layers.{{layer}}.mlp.experts.gate_up_proj{theirs}",
            (f"layers/ffn/gate_proj/{ours}", f"layers/ffn/up_proj/{ours}"),
            "columns",
        )
        for ours, theirs in {"kernel": "", "bias": "_bias"}.items()
    ),
    TensorRow("model.layers.{layer}.mlp.experts.down_proj", ("layers/ffn/down_proj/kernel",)),
    TensorRow("model.layers.{layer}.mlp.experts.down_proj_bias", ("layers/ffn/down_proj/bias",)),
)

HF: dict[str, tuple[TensorRow, ...]] = {
    "llama": HF_LLAMA,
    "mistral": HF_LLAMA,
    "qwen2": HF_LLAMA,
    "qwen3": (*HF_LLAMA, *HF_QK_NORMS),
    "gemma": HF_LLAMA,
    "gemma2": (*HF_ENDS, *HF_FOUR_NORMS, *HF_ATTENTION, *HF_FFN),
    "gemma3_text": (*HF_ENDS, *HF_FOUR_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *HF_FFN),
    "gemma4_text": _HF_GEMMA4,
    "gemma4_unified_text": _HF_GEMMA4,
    "phi3": _HF_PHI3,
    "olmo2": HF_OLMO2,
    "olmo3": HF_OLMO2,
    "ministral3": HF_LLAMA,
    "qwen3_5_text": (*_HF_QWEN3_5, *HF_FFN),
    "qwen3_5_moe_text": (*_HF_QWEN3_5, *_HF_QWEN2_EXPERTS),
    "qwen3_next": (*_HF_QWEN3_NEXT, *_HF_QWEN2_EXPERTS),
    "smollm3": HF_LLAMA,
    "granite": HF_LLAMA,
    "granite_swa": (*HF_LLAMA, HF_SINKS),
    "mixtral": (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *_HF_MIXTRAL),
    "qwen3_moe": (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *_HF_QWEN_EXPERTS),
    "qwen2_moe": (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *_HF_QWEN2_EXPERTS),
    "glm4_moe": (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *_HF_GLM_EXPERTS),
    "gpt_oss": (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *_HF_GPT_OSS),
}

# ---------------------------------------------------------------- llama.cpp

# Frequency factors (llama3, LongRoPE) are tensors there: the loader reads them into the config,
# not into parameters.
GGUF_IGNORED = (r"^rope_freqs\.weight$", r"^(blk\.\d+\.)?rope_factors_(long|short)\.weight$")


def _gguf_gemma(norms: dict[str, str]) -> tuple[TensorRow, ...]:
    """Returns Gemma's norms; llama.cpp's Gemma files store 1 + w."""
    return (*gguf_ends("minus_one"), *gguf_norms(norms, "minus_one"), *GGUF_ATTENTION, *GGUF_FFN)


_GGUF_OLMO2 = (*gguf_ends(), *gguf_norms(GGUF_POST | GGUF_QK), *GGUF_ATTENTION, *GGUF_FFN)
_GGUF_PHI3 = (
    *gguf_ends(),
    *gguf_norms(GGUF_PRE),
    gguf_kernel("attn_qkv", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
    gguf_kernel("attn_output", "attn/o_proj"),
    gguf_kernel("ffn_up", "ffn/gate_proj", "ffn/up_proj"),
    gguf_kernel("ffn_down", "ffn/down_proj"),
)

GGUF: dict[str, tuple[TensorRow, ...]] = {
    "llama": GGUF_LLAMA,
    "mistral": GGUF_LLAMA,
    "qwen2": GGUF_QWEN2,
    "qwen3": (*GGUF_QWEN2, *gguf_norms(GGUF_QK)),
    "gemma": _gguf_gemma(GGUF_PRE),
    "gemma2": _gguf_gemma(GGUF_PRE | GGUF_POST),
    "gemma3_text": _gguf_gemma(GGUF_PRE | GGUF_POST | GGUF_QK),
    "phi3": _GGUF_PHI3,
    "olmo2": _GGUF_OLMO2,
    "olmo3": _GGUF_OLMO2,
    "ministral3": GGUF_LLAMA,
    "smollm3": GGUF_LLAMA,
    "granite": GGUF_LLAMA,
    "mixtral": (*gguf_ends(), *gguf_norms(GGUF_PRE), *GGUF_PAIRED, *GGUF_EXPERTS),
    "qwen3_moe": (*gguf_ends(), *gguf_norms(GGUF_PRE | GGUF_QK), *GGUF_ATTENTION, *GGUF_EXPERTS),
}
