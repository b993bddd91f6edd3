"""Fields of a ``config.json`` that families share: sizes, windows, and layers of several kinds.

The readers of `nalora_jax.models.families` use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig, activation_name
from nalora_jax.models.moe import Mixture
from nalora_jax.models.ropes import context_length, read_ropes
from nalora_jax.models.routing import RouterSpec

SLIDING, FULL = "sliding_attention", "full_attention"


Overrides = tuple[tuple[str, Any], ...]  # fields of `ModelConfig` of one kind of layer


def base_config(f: Fields, name: str, **features: Any) -> ModelConfig:
    """Returns the config with the fields that all families share, updated with ``features``.

    The features are fields of `ModelConfig`, and ``norm_topk``: False if the weights of a token's experts
    do not have to sum to 1.
    """
    heads, d_model = f.integer("num_attention_heads", high=2**16), f.integer("hidden_size")
    if f.get("head_dim") is None and "head_dim" not in features and d_model % heads:
        raise f.error("hidden_size", f"a multiple of num_attention_heads ({heads})", d_model)
    values: dict[str, Any] = {
        "model_type": name,
        "vocab_size": f.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": layer_count(f),
        "n_heads": heads,
        "n_kv_heads": f.integer("num_key_value_heads", high=2**16, default=heads),
        "head_dim": f.integer("head_dim", high=2**16, default=d_model // heads),
        "max_positions": f.integer("max_position_embeddings", high=2**30),
        "norm_eps": f.number("rms_norm_eps", zero=True),
        "tie_embeddings": f.flag("tie_word_embeddings"),
        "attn_dropout": f.number("attention_dropout", default=0.0, zero=True),
    }
    if "d_ff" not in features:
        values["d_ff"] = f.integer("intermediate_size")
    if "activation" not in features:
        values["activation"] = activation_name(f, "hidden_act")
    values |= features
    normalize = values.pop("norm_topk", True)
    if values.get("n_experts") and "ffn" not in values:
        values["ffn"] = Mixture(RouterSpec(normalize=normalize))
    if "ropes" not in values:
        ropes, index = read_ropes(f, values["head_dim"], layer_types(f))
        values |= {"ropes": ropes, "rope_index": index}
    values["max_positions"] = context_length(values["ropes"], values["max_positions"])
    return ModelConfig(**values)


def attention_bias(f: Fields) -> dict[str, bool]:
    """Returns the biases of families with one switch for all projections of attention."""
    bias = f.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


# ---------------------------------------------------------------- windows


def layer_count(f: Fields) -> int:
    """Returns the number of layers."""
    return f.integer("num_hidden_layers", high=2**10)


def layer_types(f: Fields, other: str = SLIDING) -> list[str] | None:
    """Returns the kind of every layer, full attention or ``other``, or None if the file has no list."""
    kinds = f.items("layer_types", layer_count(f), str)
    for kind in kinds or ():
        if kind not in (FULL, other):
            raise f.error("layer_types", f"{FULL!r} or {other!r}", repr(kind))
    return kinds


def windows_of(f: Fields, kinds: list[str]) -> tuple[int, ...]:
    """Returns the window of each layer from the layers' kinds."""
    if SLIDING not in kinds:
        return ()
    window = f.integer("sliding_window", high=GLOBAL_WINDOW)
    return tuple(window if kind == SLIDING else GLOBAL_WINDOW for kind in kinds)


def same_window(f: Fields) -> tuple[int, ...]:
    """Returns one window for all layers, the only arrangement of these families in transformers."""
    expected = FULL if f.get("sliding_window") is None else SLIDING
    kinds = layer_types(f) or [expected] * layer_count(f)
    if set(kinds) != {expected}:
        raise f.error(
            "layer_types", f"{expected!r} in every layer, as sliding_window says", sorted(set(kinds))
        )
    return windows_of(f, kinds)


def optional_windows(f: Fields, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Returns the windows of families with the switch ``use_sliding_window``.

    ``slides`` tests whether a layer slides; ``layer_types`` takes precedence.
    """
    on = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    kinds = layer_types(f)
    if kinds is None:
        kinds = [SLIDING if on and slides(i) else FULL for i in range(layer_count(f))]
    if SLIDING in kinds and not on:
        raise f.error("layer_types", "no sliding layers, as use_sliding_window says", SLIDING)
    return windows_of(f, kinds)


def periodic(f: Fields, period: int) -> list[str]:
    """Returns the layers' kinds; without a list, the last layer of every period attends globally."""
    return layer_types(f) or [SLIDING if (i + 1) % period else FULL for i in range(layer_count(f))]


def head_dim_of(f: Fields, absent: int | None = None) -> int:
    """Returns the dimensions of a head; ``absent`` if the file has no such field, not even null."""
    if absent is not None and "head_dim" not in f.raw:
        return absent
    heads = f.integer("num_attention_heads", high=2**16)
    return f.integer("head_dim", high=2**16, default=f.integer("hidden_size") // heads)


def first_present(f: Fields, *names: str) -> str:
    """Returns the first of a field's names in the file; transformers 5 renamed some fields."""
    return next((name for name in names if f.get(name) is not None), names[0])


# ---------------------------------------------------------------- layers of several kinds


def fields_of_layers(layers: Sequence[Overrides]) -> dict[str, Any]:
    """Returns the fields of a config each of whose layers has the given fields; () is the first kind."""
    kinds = tuple(sorted(dict.fromkeys(layers), key=bool))
    if len(kinds) == 1:
        return dict(kinds[0])
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}


def dense_layer(d_ff: int) -> Overrides:
    """Returns the fields of a dense layer in a model with experts."""
    return (("d_ff", d_ff), ("n_experts", 0), ("experts_per_token", 0), ("ffn", None))


def expert_counts(f: Fields, *names: str, default: int | None = None) -> dict[str, Any]:
    """Returns the number of experts, from the first of the fields ``names`` in the file, and of a token's."""
    return {
        "n_experts": f.integer(first_present(f, *names), high=2**12, default=default),
        "experts_per_token": f.integer("num_experts_per_tok", high=2**12),
    }


def expert_fields(
    f: Fields, counts: dict[str, Any], dense: Sequence[bool]
) -> tuple[dict[str, Any], list[Overrides]]:
    """Returns the fields of narrow experts, and of every layer: ``dense`` marks layers without experts."""
    fields = counts | {"d_ff": f.integer("moe_intermediate_size")}
    if not any(dense):
        return fields, [()] * len(dense)
    layer = dense_layer(f.integer("intermediate_size"))
    return fields, [layer if is_dense else () for is_dense in dense]
