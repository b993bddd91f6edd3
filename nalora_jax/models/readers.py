"""Fields of a ``config.json`` that families share: sizes, activation, windows, and layers of
several kinds.

The records of `nalora_jax.models.families` use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.errors import NaloraError
from nalora_jax.method import activations
from nalora_jax.models.ropes import context_length, read_ropes

SLIDING = "sliding_attention"
FULL_ATTENTION = "full_attention"
# A window longer than any sequence: global attention as an integer that can be scanned over layers.
GLOBAL_WINDOW = 2**30

Overrides = tuple[tuple[str, Any], ...]  # fields of `ModelConfig` of one kind of layer


def base_values(f: Fields, name: str, features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that all families share, updated with ``features``."""
    heads = f.integer("num_attention_heads", high=2**16)
    d_model = f.integer("hidden_size")
    if f.get("head_dim") is None and "head_dim" not in features and d_model % heads:
        raise f.error(
            "hidden_size", f"a multiple of num_attention_heads ({heads})", d_model
        )
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
    if "ropes" not in values:
        ropes, index = read_ropes(f, values["head_dim"], layer_types(f))
        values |= {"ropes": ropes, "rope_index": index}
    values["max_positions"] = context_length(values["ropes"], values["max_positions"])
    return values


def activation_name(f: Fields, name: str) -> str:
    """Returns the registered activation that the field ``name`` names."""
    try:
        return activations.get_activation(f.text(name)).name
    except NaloraError as error:
        raise f.error(name, error.expected, error.found) from error


def attention_bias(f: Fields) -> dict[str, bool]:
    """Returns the biases of families with one switch for all projections of attention."""
    bias = f.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


# ---------------------------------------------------------------- windows


def layer_count(f: Fields) -> int:
    """Returns the number of layers."""
    return f.integer("num_hidden_layers", high=2**10)


def layer_types(f: Fields, other: str = SLIDING) -> list[str] | None:
    """Returns the kind of every layer, full attention or ``other``, or None if the file has no
    list."""
    kinds = f.items("layer_types", layer_count(f), str)
    for kind in kinds or ():
        if kind not in (FULL_ATTENTION, other):
            raise f.error("layer_types", f"{FULL_ATTENTION!r} or {other!r}", repr(kind))
    return kinds


def windows_of(f: Fields, kinds: list[str]) -> tuple[int, ...]:
    """Returns the window of each layer from the layers' kinds."""
    if SLIDING not in kinds:
        return ()
    window = f.integer("sliding_window", high=GLOBAL_WINDOW)
    return tuple(window if kind == SLIDING else GLOBAL_WINDOW for kind in kinds)


def same_window(f: Fields) -> dict[str, Any]:
    """Returns one window for all layers, the only arrangement of these families in transformers."""
    expected = FULL_ATTENTION if f.get("sliding_window") is None else SLIDING
    kinds = layer_types(f) or [expected] * layer_count(f)
    if set(kinds) != {expected}:
        raise f.error(
            "layer_types",
            f"{expected!r} in every layer, as sliding_window says",
            sorted(set(kinds)),
        )
    return {"windows": windows_of(f, kinds)}


def optional_windows(f: Fields, slides: Callable[[int], bool]) -> dict[str, Any]:
    """Returns the windows of families with the switch ``use_sliding_window``.

    ``slides`` tests whether a layer slides; ``layer_types`` takes precedence.
    """
    on = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    kinds = layer_types(f)
    if kinds is None:
        kinds = [
            SLIDING if on and slides(i) else FULL_ATTENTION
            for i in range(layer_count(f))
        ]
    if SLIDING in kinds and not on:
        raise f.error(
            "layer_types", "no sliding layers, as use_sliding_window says", SLIDING
        )
    return {"windows": windows_of(f, kinds)}


def periodic(f: Fields, period: int) -> list[str]:
    """Returns the layers' kinds; without a list, the last layer of every period attends
    globally."""
    return layer_types(f) or [
        SLIDING if (i + 1) % period else FULL_ATTENTION for i in range(layer_count(f))
    ]


def head_dim_of(f: Fields, absent: int | None = None) -> int:
    """Returns the dimensions of a head; ``absent`` if the file has no such field, not even null."""
    if absent is not None and "head_dim" not in f.raw:
        return absent
    heads = f.integer("num_attention_heads", high=2**16)
    return f.integer("head_dim", high=2**16, default=f.integer("hidden_size") // heads)


def one_rope(f: Fields, *further: str) -> dict[str, Any]:
    """Returns the rotary embedding of families that have one for all layers; see `read_ropes`."""
    return {"ropes": read_ropes(f, head_dim_of(f), None, further=further)[0]}


def first_present(f: Fields, *names: str) -> str:
    """Returns the first of a field's names in the file; transformers 5 renamed some fields."""
    return next((name for name in names if f.get(name) is not None), names[0])


# ---------------------------------------------------------------- layers of several kinds


def fields_of_layers(layers: Sequence[Overrides]) -> dict[str, Any]:
    """Returns the fields of a config each of whose layers has the given fields; () is the first
    kind."""
    kinds = tuple(sorted(dict.fromkeys(layers), key=bool))
    if len(kinds) == 1:
        return dict(kinds[0])
    return {
        "kinds": kinds,
        "layer_kinds": tuple(kinds.index(layer) for layer in layers),
    }
