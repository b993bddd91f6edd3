"""The tables of `keymaps`: tensor names of every family in transformers' and in llama.cpp's files.

A row is (name, leaves, change). ``{layer}`` and ``{expert}`` in a name run over the stack. Rows
whose leaves a config does not have (biases, an untied head) are dropped, so one table serves every
variant of its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from nalora_jax.errors import NaloraError
from nalora_jax.models import registered
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import stacks

Source = Literal["hf", "gguf"]
Change = Literal["", "transpose", "minus_one", "pairs", "pairs_transpose", "columns", "patches", "lead"]


@dataclass(frozen=True)
class TensorRow:
    """One kind of tensor."""

    name: str
    paths: tuple[str, ...]  # several if the file fuses them along its first axis
    # "transpose": kernels; "minus_one": norms stored as 1 + w; "pairs...": llama.cpp's order of rotated rows;
    # "columns": the last axis of the paths' arrays alternates: first, second, first, ...; of encoders also
    # "patches": kernel of a convolution, and "lead": axes of length 1.
    change: Change = ""
    experts: bool | None = None  # True: only in layers with a mixture of experts; False: only in the others


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
    registered_rows = registered.tensors_of(model_type)
    if isinstance(registered_rows, str):
        return tables.get(registered_rows)
    if tables is HF:
        return registered_rows
    return None


def _kernel(stem: str, module: str, *paths: str) -> TensorRow:
    """Returns the kernel of a layer's module, which may fuse several projections."""
    leaves = tuple(f"layers/{path}/kernel" for path in paths)
    return TensorRow(f"{stem}.{module}.weight", leaves, "transpose")


def _norms(stem: str, names: dict[str, str], change: Change = "") -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(f"{stem}.{theirs}.weight", (f"layers/{ours}/scale",), change)
        for ours, theirs in names.items()
    )


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

_HF_ENDS = (
    TensorRow("model.embed_tokens.weight", ("embed/embedding",)),
    TensorRow("model.norm.weight", ("final_norm/scale",)),
    TensorRow("lm_head.weight", ("lm_head/kernel",), "transpose"),
)


def _hf_dense(
    module: str, folder: str, names: tuple[str, ...], experts: bool | None = None
) -> tuple[TensorRow, ...]:
    """Returns kernels and biases of projections whose names equal transformers' names."""
    stem, leaf = f"model.layers.{{layer}}.{module}", f"layers/{folder}"
    return (
        *(TensorRow(f"{stem}.{n}.weight", (f"{leaf}/{n}/kernel",), "transpose", experts) for n in names),
        *(TensorRow(f"{stem}.{n}.bias", (f"{leaf}/{n}/bias",), "", experts) for n in names),
    )


_hf_kernel = partial(_kernel, "model.layers.{layer}")
_hf_norms = partial(_norms, "model.layers.{layer}")
_HF_ATTENTION = _hf_dense("self_attn", "attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
_GATED = ("gate_proj", "up_proj", "down_proj")
_HF_FFN = _hf_dense("mlp", "ffn", _GATED)
_HF_QK_NORMS = _hf_norms({"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"})
_HF_PRE_NORMS = _hf_norms({"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
_HF_POST_NORMS = _hf_norms(
    {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
)
_HF_FOUR_NORMS = _HF_POST_NORMS + _hf_norms(
    {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
)
_HF_LLAMA = (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_FFN)
_HF_OLMO2 = (*_HF_ENDS, *_HF_POST_NORMS, *_HF_ATTENTION, *_HF_QK_NORMS, *_HF_FFN)
_HF_PHI3 = (
    *_HF_ENDS,
    *_HF_PRE_NORMS,
    _hf_kernel("self_attn.qkv_proj", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
    _hf_kernel("self_attn.o_proj", "attn/o_proj"),
    _hf_kernel("mlp.gate_up_proj", "ffn/gate_proj", "ffn/up_proj"),
    _hf_kernel("mlp.down_proj", "ffn/down_proj"),
)


def _hf_experts(module: str, names: tuple[str, ...], folder: str = "ffn") -> tuple[TensorRow, ...]:
    """Returns router and experts; ``names`` are transformers' names of gate, up and down."""
    stem = f"model.layers.{{layer}}.{module}.experts.{{expert}}"
    experts = (
        TensorRow(f"{stem}.{theirs}.weight", (f"layers/{folder}/{ours}/kernel",), "transpose", True)
        for ours, theirs in zip(_GATED, names, strict=True)
    )
    return (_hf_kernel(f"{module}.gate", f"{folder}/router"), *experts)


def _hf_delta_net(*inputs: str) -> tuple[TensorRow, ...]:
    """Returns the tensors of Gated DeltaNet, with the names of the projections of its input."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias"}
    names |= {"conv1d.weight": "conv/weight", "norm.weight": "norm/scale"}
    rows = (
        TensorRow(f"model.layers.{{layer}}.linear_attn.{theirs}", (f"layers/linear_attn/{ours}",))
        for theirs, ours in names.items()
    )
    return (*_hf_dense("linear_attn", "linear_attn", (*inputs, "out_proj")), *rows)


_HF_MIXTRAL = _hf_experts("block_sparse_moe", ("w1", "w3", "w2"))
_HF_DENSE_LAYERS = _hf_dense("mlp", "ffn", _GATED, experts=False)
_HF_QWEN_EXPERTS = (*_hf_experts("mlp", _GATED), *_HF_DENSE_LAYERS)
_HF_QWEN2_EXPERTS = (
    *_hf_experts("mlp", _GATED, "ffn/experts_ffn"),
    *_hf_dense("mlp.shared_expert", "ffn/shared_ffn", _GATED),
    _hf_kernel("mlp.shared_expert_gate", "ffn/shared_gate"),
    *_HF_DENSE_LAYERS,
)
_HF_GLM_EXPERTS = (
    *_hf_experts("mlp", _GATED, "ffn/experts_ffn"),
    TensorRow(
        "model.layers.{layer}.mlp.gate.e_score_correction_bias",
        ("layers/ffn/experts_ffn/router/correction",),
    ),
    *_hf_dense("mlp.shared_experts", "ffn/shared_ffn", _GATED),
    *_HF_DENSE_LAYERS,
)
_HF_HYBRID = (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_QK_NORMS)
_HF_QWEN3_5 = (*_HF_HYBRID, *_hf_delta_net("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
_HF_QWEN3_NEXT = (*_HF_HYBRID, *_hf_delta_net("in_proj_qkvz", "in_proj_ba"))

_HF_GEMMA4 = (
    *_HF_ENDS,
    *_HF_FOUR_NORMS,
    *_HF_ATTENTION,
    *_HF_QK_NORMS,
    *_HF_FFN,
    *_hf_dense("mlp", "ffn/dense_ffn", _GATED),
    TensorRow(
        "model.layers.{layer}.experts.gate_up_proj",
        ("layers/ffn/experts_ffn/gate_proj/kernel", "layers/ffn/experts_ffn/up_proj/kernel"),
        "transpose",
    ),
    TensorRow(
        "model.layers.{layer}.experts.down_proj", ("layers/ffn/experts_ffn/down_proj/kernel",), "transpose"
    ),
    _hf_kernel("router.proj", "ffn/experts_ffn/router"),
    TensorRow("model.layers.{layer}.router.scale", ("layers/ffn/router_norm/scale",)),
    TensorRow("model.layers.{layer}.router.per_expert_scale", ("layers/ffn/experts_ffn/router/scale",)),
    *_hf_norms(
        {
            "ffn/dense_norm": "post_feedforward_layernorm_1",
            "ffn/experts_norm": "pre_feedforward_layernorm_2",
            "ffn/experts_post_norm": "post_feedforward_layernorm_2",
            "tail/norm": "post_per_layer_input_norm",
        }
    ),
    _hf_kernel("per_layer_input_gate", "tail/gate_proj"),
    _hf_kernel("per_layer_projection", "tail/down_proj"),
    TensorRow("model.layers.{layer}.layer_scalar", ("layers/tail/scale",)),
    TensorRow("model.embed_tokens_per_layer.weight", ("layer_embeddings/embedding",)),
    TensorRow(
        "model.per_layer_model_projection.weight", ("layer_embeddings/projection/kernel",), "transpose"
    ),
    TensorRow("model.per_layer_projection_norm.weight", ("layer_embeddings/norm/scale",)),
)

_HF_SINKS = TensorRow("model.layers.{layer}.self_attn.sinks", ("layers/attn/sinks",))
_HF_GPT_OSS = (
    _HF_SINKS,
    _hf_kernel("mlp.router", "ffn/router"),
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

_HF_LFM2_NAMES = {
    "attn/q_proj": "self_attn.q_proj",
    "attn/k_proj": "self_attn.k_proj",
    "attn/v_proj": "self_attn.v_proj",
    "attn/o_proj": "self_attn.out_proj",
    "conv/bcx_proj": "conv.in_proj",
    "conv/o_proj": "conv.out_proj",
    "ffn/gate_proj": "feed_forward.w1",
    "ffn/up_proj": "feed_forward.w3",
    "ffn/down_proj": "feed_forward.w2",
}
_HF_LFM2 = (
    _HF_ENDS[0],
    TensorRow("model.embedding_norm.weight", ("final_norm/scale",)),
    _HF_ENDS[2],
    *_hf_norms({"attn_norm": "operator_norm", "ffn_norm": "ffn_norm"}),
    *_hf_norms({"attn/q_norm": "self_attn.q_layernorm", "attn/k_norm": "self_attn.k_layernorm"}),
    *(_hf_kernel(theirs, ours) for ours, theirs in _HF_LFM2_NAMES.items()),
    *(
        TensorRow(f"model.layers.{{layer}}.{theirs}.bias", (f"layers/{ours}/bias",))
        for ours, theirs in _HF_LFM2_NAMES.items()
    ),
    TensorRow("model.layers.{layer}.conv.conv.weight", ("layers/conv/taps",)),
    TensorRow("model.layers.{layer}.conv.conv.bias", ("layers/conv/taps_bias",)),
)

HF: dict[str, tuple[TensorRow, ...]] = {
    "llama": _HF_LLAMA,
    "mistral": _HF_LLAMA,
    "qwen2": _HF_LLAMA,
    "qwen3": (*_HF_LLAMA, *_HF_QK_NORMS),
    "gemma": _HF_LLAMA,
    "gemma2": (*_HF_ENDS, *_HF_FOUR_NORMS, *_HF_ATTENTION, *_HF_FFN),
    "gemma3_text": (*_HF_ENDS, *_HF_FOUR_NORMS, *_HF_ATTENTION, *_HF_QK_NORMS, *_HF_FFN),
    "gemma4_text": _HF_GEMMA4,
    "gemma4_unified_text": _HF_GEMMA4,
    "phi3": _HF_PHI3,
    "olmo2": _HF_OLMO2,
    "olmo3": _HF_OLMO2,
    "ministral3": _HF_LLAMA,
    "qwen3_5_text": (*_HF_QWEN3_5, *_HF_FFN),
    "qwen3_5_moe_text": (*_HF_QWEN3_5, *_HF_QWEN2_EXPERTS),
    "qwen3_next": (*_HF_QWEN3_NEXT, *_HF_QWEN2_EXPERTS),
    "smollm3": _HF_LLAMA,
    "granite": _HF_LLAMA,
    "granite_swa": (*_HF_LLAMA, _HF_SINKS),
    "lfm2": _HF_LFM2,
    "mixtral": (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_MIXTRAL),
    "qwen3_moe": (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_QK_NORMS, *_HF_QWEN_EXPERTS),
    "qwen2_moe": (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_QWEN2_EXPERTS),
    "glm4_moe": (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_QK_NORMS, *_HF_GLM_EXPERTS),
    "gpt_oss": (*_HF_ENDS, *_HF_PRE_NORMS, *_HF_ATTENTION, *_HF_GPT_OSS),
}

# ---------------------------------------------------------------- llama.cpp

# Frequency factors (llama3, LongRoPE) are tensors there: the loader reads them into the config,
# not into parameters.
GGUF_IGNORED = (r"^rope_freqs\.weight$", r"^(blk\.\d+\.)?rope_factors_(long|short)\.weight$")

_GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_GGUF_FFN_NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
# Changes of a kernel and a bias, without and with llama.cpp's order of rotated rows.
_TRANSPOSED: tuple[Change, Change] = ("transpose", "")
_PAIRED: tuple[Change, Change] = ("pairs_transpose", "pairs")


def _gguf_dense(folder: str, names: dict[str, str], pairs: tuple[str, ...] = ()) -> tuple[TensorRow, ...]:
    rows = []
    for ours, theirs in names.items():
        stem, leaf = f"blk.{{layer}}.{theirs}", f"layers/{folder}/{ours}"
        kernel, bias = _TRANSPOSED
        if ours in pairs:
            kernel, bias = _PAIRED
        rows.append(TensorRow(f"{stem}.weight", (f"{leaf}/kernel",), kernel))
        rows.append(TensorRow(f"{stem}.bias", (f"{leaf}/bias",), bias))
    return tuple(rows)


_gguf_kernel = partial(_kernel, "blk.{layer}")
_gguf_norms = partial(_norms, "blk.{layer}")


def _gguf_ends(change: Change = "") -> tuple[TensorRow, ...]:
    return (
        TensorRow("token_embd.weight", ("embed/embedding",)),
        TensorRow("output_norm.weight", ("final_norm/scale",), change),
        TensorRow("output.weight", ("lm_head/kernel",), "transpose"),
    )


_GGUF_PRE = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
_GGUF_POST = {"attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
_GGUF_QK = {"attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm"}
_GGUF_FFN = _gguf_dense("ffn", _GGUF_FFN_NAMES)
_GGUF_ATTENTION = _gguf_dense("attn", _GGUF_NAMES)
# Families for which llama.cpp rotates adjacent pairs; in others it pairs channels half a head
# apart, like transformers.
_GGUF_PAIRED = _gguf_dense("attn", _GGUF_NAMES, pairs=("q_proj", "k_proj"))
_GGUF_LLAMA = (*_gguf_ends(), *_gguf_norms(_GGUF_PRE), *_GGUF_PAIRED, *_GGUF_FFN)
_GGUF_QWEN2 = (*_gguf_ends(), *_gguf_norms(_GGUF_PRE), *_GGUF_ATTENTION, *_GGUF_FFN)
_GGUF_EXPERTS = (
    _gguf_kernel("ffn_gate_inp", "ffn/router"),
    *(_gguf_kernel(f"{theirs}_exps", f"ffn/{ours}") for ours, theirs in _GGUF_FFN_NAMES.items()),
)


def _gguf_gemma(norms: dict[str, str]) -> tuple[TensorRow, ...]:
    """Returns Gemma's norms; llama.cpp's Gemma files store 1 + w."""
    return (*_gguf_ends("minus_one"), *_gguf_norms(norms, "minus_one"), *_GGUF_ATTENTION, *_GGUF_FFN)


_GGUF_OLMO2 = (*_gguf_ends(), *_gguf_norms(_GGUF_POST | _GGUF_QK), *_GGUF_ATTENTION, *_GGUF_FFN)
_GGUF_PHI3 = (
    *_gguf_ends(),
    *_gguf_norms(_GGUF_PRE),
    _gguf_kernel("attn_qkv", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
    _gguf_kernel("attn_output", "attn/o_proj"),
    _gguf_kernel("ffn_up", "ffn/gate_proj", "ffn/up_proj"),
    _gguf_kernel("ffn_down", "ffn/down_proj"),
)

GGUF: dict[str, tuple[TensorRow, ...]] = {
    "llama": _GGUF_LLAMA,
    "mistral": _GGUF_LLAMA,
    "qwen2": _GGUF_QWEN2,
    "qwen3": (*_GGUF_QWEN2, *_gguf_norms(_GGUF_QK)),
    "gemma": _gguf_gemma(_GGUF_PRE),
    "gemma2": _gguf_gemma(_GGUF_PRE | _GGUF_POST),
    "gemma3_text": _gguf_gemma(_GGUF_PRE | _GGUF_POST | _GGUF_QK),
    "phi3": _GGUF_PHI3,
    "olmo2": _GGUF_OLMO2,
    "olmo3": _GGUF_OLMO2,
    "ministral3": _GGUF_LLAMA,
    "smollm3": _GGUF_LLAMA,
    "granite": _GGUF_LLAMA,
    "mixtral": (*_gguf_ends(), *_gguf_norms(_GGUF_PRE), *_GGUF_PAIRED, *_GGUF_EXPERTS),
    "qwen3_moe": (*_gguf_ends(), *_gguf_norms(_GGUF_PRE | _GGUF_QK), *_GGUF_ATTENTION, *_GGUF_EXPERTS),
}
