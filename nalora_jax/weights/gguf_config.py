"""Converts a GGUF file's metadata to the ``config.json`` of the same model on the hub.

This way `ModelConfig.from_hf` is the only reader of model descriptions, and a model from a GGUF
file can be written as a Hugging Face folder. Comments mark values that llama.cpp hard-codes per
architecture instead of storing them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.models.family import BUILT_IN, Metadata, nearest
from nalora_jax.models.ropes import RopeSpec, inverse_frequencies
from nalora_jax.weights.gguf import GGUFFile

_SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Returns the ``config.json`` of the model in ``file``.

    Raises:
      NaloraError: an unsupported architecture, or a metadata key that is missing or has the wrong
        type.
    """
    architecture = file.about("general").get("architecture", str)
    formats = {family.name: family.gguf for family in BUILT_IN.values() if family.gguf}
    known = {form.architecture: name for name, form in formats.items()}
    if architecture not in known:
        raise NaloraError(
            f"{file.path}: general.architecture",
            expected=f"one of {', '.join(known)}",
            found=repr(architecture),
            remedy=nearest(architecture, known),
        )
    reader = _Model(file, architecture)
    of_architecture = [(name, form) for name, form in formats.items() if form.architecture == architecture]
    name, form = next((name, form) for name, form in of_architecture if form.matches(reader))
    raw = {
        "architectures": [BUILT_IN[name].class_name],
        "model_type": name,
        **_shape(reader),
        **_rope(reader),
    }
    raw |= form.settings(reader)
    tokenizer = file.about("tokenizer.ggml")
    raw |= {key: tokenizer.get(theirs, int) for key, theirs in _SPECIAL.items() if tokenizer.has(theirs)}
    return raw


class _Model(Metadata):
    """Metadata of one architecture, with the file's small tensors."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        super().__init__(file.metadata, architecture, file.where)
        self.file = file

    def tensor(self, name: str) -> np.ndarray | None:
        """Returns a small tensor as float64, or None."""
        return self.file.whole(name) if name in self.file.shapes() else None


def _shape(r: _Model) -> dict[str, Any]:
    """Returns the model's sizes, from the same keys and tensors as llama.cpp."""
    width, heads = r.get("embedding_length", int), r.get("attention.head_count", int)
    vocabulary = r.file.shapes().get("token_embd.weight")
    if vocabulary is None:
        raise NaloraError(r.where, expected="the tensor token_embd.weight", found="none of that name")
    if heads < 1:
        raise r.error("attention.head_count", "1 or more", heads)
    raw = {
        "vocab_size": vocabulary[0],
        "hidden_size": width,
        "num_hidden_layers": r.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": r.get("attention.head_count_kv", int, heads),
        "head_dim": r.get("attention.key_length", int, width // heads),
        "max_position_embeddings": r.get("context_length", int),
        "rms_norm_eps": r.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in r.file.shapes(),
        "attention_bias": "blk.0.attn_q.bias" in r.file.shapes(),
        "mlp_bias": "blk.0.ffn_up.bias" in r.file.shapes(),
    }
    if r.has("attention.causal"):
        raw["is_causal"] = r.get("attention.causal", bool)
    if r.has("feed_forward_length"):
        raw["intermediate_size"] = r.get("feed_forward_length", int)
    return raw


# ---------------------------------------------------------------- rotary embeddings


def _rope(r: _Model) -> dict[str, Any]:
    theta, head_dim = r.get("rope.freq_base", float, 10_000.0), r.get("attention.key_length", int, 0)
    rotated = r.get("rope.dimension_count", int, head_dim)
    raw: dict[str, Any] = {"rope_theta": theta}
    if head_dim and rotated != head_dim:
        raw["partial_rotary_factor"] = rotated / head_dim
    if scaling := _long_factors(r) or _frequency_factors(r, theta) or r.scaling():
        raw["rope_scaling"] = scaling
    return raw


def _long_factors(r: _Model) -> dict[str, Any] | None:
    """Returns LongRoPE's settings; its two lists of divisors are tensors in the file."""
    short, long = r.tensor("rope_factors_short.weight"), r.tensor("rope_factors_long.weight")
    if short is None or long is None:
        return None
    scaling = {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": r.get("rope.scaling.original_context_length", int),
    }
    if r.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = r.get("rope.scaling.attn_factor", float)
    return scaling


def _frequency_factors(r: _Model, theta: float) -> dict[str, Any] | None:
    """Returns Llama 3's scaling, which is stored as one divisor per frequency.

    Divisors that do not match Llama 3's formula are returned as LongRoPE lists.
    """
    divisors = r.tensor("rope_freqs.weight")
    if divisors is None:
        return None
    plain = RopeSpec(dim=2 * divisors.size, theta=theta)
    # Llama 3.1, 3.2 and 3.3 share these settings; the largest divisor is the scaling factor.
    spec = replace(plain, kind="llama3", factor=float(divisors.max()), max_positions=8192)
    if np.allclose(inverse_frequencies(plain) / inverse_frequencies(spec), divisors, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": spec.factor,
            "low_freq_factor": spec.low_freq_factor,
            "high_freq_factor": spec.high_freq_factor,
            "original_max_position_embeddings": spec.max_positions,
        }
    return {
        "rope_type": "longrope",
        "attention_factor": 1.0,
        "original_max_position_embeddings": r.get("context_length", int),
        **dict.fromkeys(("short_factor", "long_factor"), divisors.tolist()),
    }
