"""Rows of a family's tables: tensor names in transformers' and in llama.cpp's files.

A row is (name, leaves, change). ``{layer}`` and ``{expert}`` in a name run over the stack. Rows
whose leaves a config does not have (biases, an untied head) are dropped, so one table serves every
variant of its family. `nalora_jax.weights.keymaps` reads and writes files by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

Change = Literal["", "transpose", "minus_one", "pairs", "pairs_transpose", "columns", "patches", "lead"]


Source = Literal["hf", "gguf"]  # names of transformers or of llama.cpp


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


Rows = tuple[TensorRow, ...]


def _kernel(stem: str, module: str, *paths: str) -> TensorRow:
    """Returns the kernel of a layer's module, which may fuse several projections."""
    leaves = tuple(f"layers/{path}/kernel" for path in paths)
    return TensorRow(f"{stem}.{module}.weight", leaves, "transpose")


def _norms(stem: str, names: Mapping[str, str], change: Change = "") -> Rows:
    """Returns the norms of a layer: the file's name by ours."""
    return tuple(
        TensorRow(f"{stem}.{theirs}.weight", (f"layers/{ours}/scale",), change)
        for ours, theirs in names.items()
    )


# ---------------------------------------------------------------- transformers

_HF_LAYER = "model.layers.{layer}"
GATED = ("gate_proj", "up_proj", "down_proj")
hf_kernel = partial(_kernel, _HF_LAYER)
hf_norms = partial(_norms, _HF_LAYER)


def hf_row(name: str, path: str) -> TensorRow:
    """Returns a tensor of a layer that is stored as it is."""
    return TensorRow(f"{_HF_LAYER}.{name}", (f"layers/{path}",))


def hf_dense(
    module: str, folder: str, names: tuple[str, ...] | Mapping[str, str], experts: bool | None = None
) -> Rows:
    """Returns kernels and biases of projections; ``names`` maps our names to transformers' if they differ."""
    if not isinstance(names, Mapping):
        names = {name: name for name in names}
    stem, leaf = f"{_HF_LAYER}.{module}", f"layers/{folder}"
    return (
        *(
            TensorRow(f"{stem}.{theirs}.weight", (f"{leaf}/{ours}/kernel",), "transpose", experts)
            for ours, theirs in names.items()
        ),
        *(
            TensorRow(f"{stem}.{theirs}.bias", (f"{leaf}/{ours}/bias",), "", experts)
            for ours, theirs in names.items()
        ),
    )


def hf_experts(module: str, names: tuple[str, ...] = GATED, folder: str = "ffn") -> Rows:
    """Returns router and experts; ``names`` are transformers' names of gate, up and down."""
    stem = f"{_HF_LAYER}.{module}.experts.{{expert}}"
    experts = (
        TensorRow(f"{stem}.{theirs}.weight", (f"layers/{folder}/{ours}/kernel",), "transpose", True)
        for ours, theirs in zip(GATED, names, strict=True)
    )
    return (hf_kernel(f"{module}.gate", f"{folder}/router"), *experts)


def hf_ends(norm: str = "norm") -> Rows:
    """Returns embedding, final norm and head."""
    return (
        TensorRow("model.embed_tokens.weight", ("embed/embedding",)),
        TensorRow(f"model.{norm}.weight", ("final_norm/scale",)),
        TensorRow("lm_head.weight", ("lm_head/kernel",), "transpose"),
    )


HF_ENDS = hf_ends()
HF_ATTENTION = hf_dense("self_attn", "attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
HF_FFN = hf_dense("mlp", "ffn", GATED)
HF_DENSE_LAYERS = hf_dense("mlp", "ffn", GATED, experts=False)
HF_QK_NORMS = hf_norms({"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"})
HF_PRE_NORMS = hf_norms({"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
HF_POST_NORMS = hf_norms(
    {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
)
HF_FOUR_NORMS = HF_POST_NORMS + hf_norms(
    {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
)
HF_SINKS = hf_row("self_attn.sinks", "attn/sinks")
HF_LLAMA = (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_FFN)
# Norms of outputs, and of queries and keys.
HF_OLMO2 = (*HF_ENDS, *HF_POST_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *HF_FFN)

# ---------------------------------------------------------------- llama.cpp

_GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_GGUF_FFN_NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
# Changes of a kernel and a bias, without and with llama.cpp's order of rotated rows.
_TRANSPOSED: tuple[Change, Change] = ("transpose", "")
_PAIRED: tuple[Change, Change] = ("pairs_transpose", "pairs")
gguf_kernel = partial(_kernel, "blk.{layer}")
gguf_norms = partial(_norms, "blk.{layer}")


def _gguf_dense(folder: str, names: Mapping[str, str], pairs: tuple[str, ...] = ()) -> Rows:
    rows = []
    for ours, theirs in names.items():
        stem, leaf = f"blk.{{layer}}.{theirs}", f"layers/{folder}/{ours}"
        kernel, bias = _TRANSPOSED
        if ours in pairs:
            kernel, bias = _PAIRED
        rows.append(TensorRow(f"{stem}.weight", (f"{leaf}/kernel",), kernel))
        rows.append(TensorRow(f"{stem}.bias", (f"{leaf}/bias",), bias))
    return tuple(rows)


def gguf_ends(change: Change = "") -> Rows:
    """Returns embedding, final norm and head."""
    return (
        TensorRow("token_embd.weight", ("embed/embedding",)),
        TensorRow("output_norm.weight", ("final_norm/scale",), change),
        TensorRow("output.weight", ("lm_head/kernel",), "transpose"),
    )


GGUF_PRE = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
GGUF_POST = {"attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
GGUF_QK = {"attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm"}
GGUF_FFN = _gguf_dense("ffn", _GGUF_FFN_NAMES)
GGUF_ATTENTION = _gguf_dense("attn", _GGUF_NAMES)
# Families for which llama.cpp rotates adjacent pairs; in others it pairs channels half a head
# apart, like transformers.
GGUF_PAIRED = _gguf_dense("attn", _GGUF_NAMES, pairs=("q_proj", "k_proj"))
GGUF_LLAMA = (*gguf_ends(), *gguf_norms(GGUF_PRE), *GGUF_PAIRED, *GGUF_FFN)
GGUF_QWEN2 = (*gguf_ends(), *gguf_norms(GGUF_PRE), *GGUF_ATTENTION, *GGUF_FFN)
GGUF_EXPERTS = (
    gguf_kernel("ffn_gate_inp", "ffn/router"),
    *(gguf_kernel(f"{theirs}_exps", f"ffn/{ours}") for ours, theirs in _GGUF_FFN_NAMES.items()),
)
