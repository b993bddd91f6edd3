"""Names of a decoder's tensors in transformers' and in llama.cpp's files.

Rows whose leaves a config does not have (biases, an untied head) are dropped, so one table serves
every variant of its family. `nalora_jax.weights.keymaps` reads and writes files by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TensorChange = Literal[
    "",
    "transpose",
    "minus_one",
    "pairs",
    "pairs_transpose",
    "columns",
    "halves",
    "patches",
    "frames",
    "lead",
]
TensorNames = Literal["hf", "gguf"]  # names of transformers or of llama.cpp


@dataclass(frozen=True)
class TensorRow:
    """One kind of tensor; ``{layer}`` and ``{expert}`` in its name run over the stack."""

    name: str
    paths: tuple[str, ...]  # several if the file fuses them along its first axis
    # "transpose": kernels; "minus_one": norms stored as 1 + w; "pairs...": llama.cpp's order of
    # rotated rows; "columns": the last axis of the paths' arrays alternates: first, second, first,
    # ...; "halves": it has all columns of the first, then those of the second, and some releases
    # exchange the last two axes. Of encoders also "patches": kernel of a convolution, "frames": of
    # one over frames, and "lead": axes of length 1.
    change: TensorChange = ""
    experts: bool | None = (
        None  # True: only in layers with a mixture of experts; False: only in the others
    )


Rows = tuple[TensorRow, ...]
# Modules of a layer: the file's name by our path, or by the paths that the file fuses.
Modules = Mapping[str | tuple[str, ...], str]


def module_rows(
    stem: str,
    modules: Modules,
    *,
    norm: TensorChange = "",
    paired: tuple[str, ...] = (),
    experts: bool | None = None,
) -> Rows:
    """Returns the rows of modules whose names follow ``stem``: scales of norms, kernels, and then
    biases.

    A path that ends in "norm" is a norm, any other a projection.

    Args:
      stem: name of the layer in the file.
      modules: names by path.
      norm: change of the scales.
      paired: projections whose rows have llama.cpp's order.
      experts: see `TensorRow`.
    """
    rows = []
    for ours, theirs in modules.items():
        paths = (ours,) if isinstance(ours, str) else ours
        leaves: dict[str, tuple[str, TensorChange]] = {"weight": ("scale", norm)}
        if not paths[0].endswith("norm"):
            leaves = {"weight": ("kernel", "transpose"), "bias": ("bias", "")}
        if ours in paired:
            leaves = {
                "weight": ("kernel", "pairs_transpose"),
                "bias": ("bias", "pairs"),
            }
        for kind, (leaf, change) in leaves.items():
            stored = tuple(f"layers/{path}/{leaf}" for path in paths)
            rows.append(TensorRow(f"{stem}.{theirs}.{kind}", stored, change, experts))
    return tuple(sorted(rows, key=lambda row: row.name.endswith(".bias")))


GATED = ("gate_proj", "up_proj", "down_proj")

# ---------------------------------------------------------------- transformers

HF_LAYER = "model.layers.{layer}"
ATTENTION: Modules = {f"attn/{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"}
FFN: Modules = {f"ffn/{name}": f"mlp.{name}" for name in GATED}
QK_NORMS: Modules = {
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
}
PRE_NORMS: Modules = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
POST_NORMS: Modules = {
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
FOUR_NORMS: Modules = {
    **POST_NORMS,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}


def hf_row(name: str, *paths: str, change: TensorChange = "") -> TensorRow:
    """Returns a tensor of a layer that is no module's."""
    return TensorRow(
        f"{HF_LAYER}.{name}", tuple(f"layers/{path}" for path in paths), change
    )


def hf_modules(modules: Modules, *, experts: bool | None = None) -> Rows:
    """Returns the rows of modules of a layer; see `module_rows`."""
    return module_rows(HF_LAYER, modules, experts=experts)


def hf_experts(
    module: str, names: tuple[str, ...] = GATED, folder: str = "ffn"
) -> Rows:
    """Returns router and experts; ``names`` are transformers' names of gate, up and down."""
    stem = f"{HF_LAYER}.{module}.experts.{{expert}}"
    experts = (
        TensorRow(
            f"{stem}.{theirs}.weight",
            (f"layers/{folder}/{ours}/kernel",),
            "transpose",
            True,
        )
        for ours, theirs in zip(GATED, names, strict=True)
    )
    return (*hf_modules({f"{folder}/router": f"{module}.gate"}), *experts)


def hf(*modules: Modules, norm: str = "norm") -> Rows:
    """Returns embedding, final norm, head, and the modules of a layer."""
    return (
        TensorRow("model.embed_tokens.weight", ("embed/embedding",)),
        TensorRow(f"model.{norm}.weight", ("final_norm/scale",)),
        TensorRow("lm_head.weight", ("lm_head/kernel",), "transpose"),
        *(row for table in modules for row in hf_modules(table)),
    )


HF_SINKS = hf_row("self_attn.sinks", "attn/sinks")
HF_LLAMA = hf(PRE_NORMS, ATTENTION, FFN)
HF_OLMO2 = hf(POST_NORMS, ATTENTION, QK_NORMS, FFN)
HF_DENSE_LAYERS = hf_modules(FFN, experts=False)

# ---------------------------------------------------------------- llama.cpp

GGUF_PRE: Modules = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
GGUF_POST: Modules = {
    "attn_post_norm": "post_attention_norm",
    "ffn_post_norm": "post_ffw_norm",
}
GGUF_QK: Modules = {"attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm"}
GGUF_FFN: Modules = {
    f"ffn/{name}": f"ffn_{name.removesuffix('_proj')}" for name in GATED
}
GGUF_ATTENTION: Modules = {f"attn/{name}_proj": f"attn_{name}" for name in "qkv"}
GGUF_ATTENTION = {**GGUF_ATTENTION, "attn/o_proj": "attn_output"}
GGUF_EXPERTS: Modules = {
    "ffn/router": "ffn_gate_inp",
    **{ours: f"{theirs}_exps" for ours, theirs in GGUF_FFN.items()},
}


def gguf(*modules: Modules, norm: TensorChange = "", paired: bool = False) -> Rows:
    """Returns embedding, final norm, head, and the modules of a layer.

    ``paired``: llama.cpp rotates adjacent pairs in this family; in others it pairs channels half a
    head apart, like transformers.
    """
    rotated = ("attn/q_proj", "attn/k_proj") if paired else ()
    return (
        TensorRow("token_embd.weight", ("embed/embedding",)),
        TensorRow("output_norm.weight", ("final_norm/scale",), norm),
        TensorRow("output.weight", ("lm_head/kernel",), "transpose"),
        *(
            row
            for table in modules
            for row in module_rows("blk.{layer}", table, norm=norm, paired=rotated)
        ),
    )


GGUF_LLAMA = gguf(GGUF_PRE, GGUF_ATTENTION, GGUF_FFN, paired=True)
GGUF_QWEN2 = gguf(GGUF_PRE, GGUF_ATTENTION, GGUF_FFN)
