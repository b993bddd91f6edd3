"""Converts PEFT's `LoraConfig` to the settings of a run.

`PEFT` is the only list of the fields of `LoraConfig` and has all of them, so that none is dropped
silently; docs/from_peft.md shows the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import ROWS, TABLES
from nalora_jax.weights.peft_adalora import training_settings
from nalora_jax.weights.peft_rules import rules_of

# Settings as nested dicts, by the names of `nalora_jax.config`.
Settings = dict[str, Any]
_RESIZED = (
    "if the tokenizer got new tokens: name them in data.add_tokens or data.add_special_tokens, in their order; the "
    "embedding is resized for them"
)
_DENSE = (
    "target_parameters: dense layers of a mixture have the same paths as experts; leave them out with a first rule "
    "such as layers/0/ffn/:0"
)


@dataclass(frozen=True)
class Refused:
    """A value that is not supported, with the reason."""

    reason: str


@dataclass(frozen=True)
class Field:
    """Conversion of a field."""

    ours: str = ""  # the setting, dotted; empty without one
    note: str = ""  # for the table
    value: Callable[[Any], Any] = lambda value: value  # our value of theirs; may be `Refused`
    ignored: bool = False  # no effect on the result
    in_files: bool = False  # read from the files of an adapter, although a run has no setting for it


def only(*accepted: Any, because: str) -> Callable[[Any], Any]:
    """Returns a conversion that accepts only ``accepted``, values without effect here."""
    return lambda value: (
        None if any(value == default for default in (None, *accepted, {}, [])) else Refused(because)
    )


_OTHER_METHOD = "it is another method than LoRA, and is not implemented here"
_PISSA = re.compile(r"pissa(_niter_\d+)?")


def _init(value: Any) -> Any:
    if isinstance(value, str) and _PISSA.fullmatch(value):
        return "pissa"
    if value == "lora_ga":
        return Refused(
            "PEFT's scales B by the singular values; --lora.init lora_ga scales both sides as the paper does"
        )
    if value in (True, None):
        return "default"
    return Refused("there are PEFT's default and PiSSA; gaussian and others are not made here")


def _saved(value: Any) -> Any:
    names = [str(name).rpartition(".")[2] for name in value or []]
    if set(names) <= set(TABLES):
        return [name for name in TABLES if name in names] or None
    return Refused(
        f"of the base, {' and '.join(TABLES)} are trained as a whole; norms and the rest stay as they are"
    )


def _indices(value: Any) -> Any:
    """Returns the token ids; `_token_modules` reads their tables from the same field."""
    lists = [ids for ids in ids_by_table(value).values() if ids]
    if not lists:
        return None
    if not all(isinstance(ids, list | tuple) for ids in lists):
        return Refused("token ids are given as a list, or as lists by the table's name")
    if not set(_token_modules(value)) <= set(ROWS):
        return Refused(f"rows of {' and '.join(ROWS)} are trained alone; other modules are not")
    if any(list(ids) != list(lists[0]) for ids in lists):
        return Refused("the same rows of both tables are trained here: give both the same list")
    return list(lists[0])


def ids_by_table(value: Any) -> Mapping[str, Any]:
    """Returns ``trainable_token_indices`` by the table's name; a plain list is of the embedding."""
    if isinstance(value, Mapping):
        return value
    return {"embed_tokens": value}


def _token_modules(value: Any) -> list[str]:
    """Returns the names of the tables."""
    return sorted({str(name).rpartition(".")[2] for name, ids in ids_by_table(value).items() if ids})


# Fields that are combined into rules have the setting "lora.rules".
PEFT: dict[str, Field] = {
    "r": Field("lora.rules", "rank of each rule"),
    "lora_alpha": Field("lora.rules", "alpha of each rule"),
    "target_modules": Field(
        "lora.rules", 'patterns, first match wins; names and "all-linear", not an expression'
    ),
    "exclude_modules": Field("lora.rules", "left out of the patterns"),
    "layers_to_transform": Field("lora.rules", "layer numbers in the patterns"),
    "layers_pattern": Field(
        "",
        "layers are found by number",
        only(because="layers are found by their number alone"),
        in_files=True,
    ),
    "rank_pattern": Field("lora.rules", "separate rules, listed first"),
    "alpha_pattern": Field("lora.rules", "separate rules, listed first"),
    "lora_dropout": Field("lora.dropout"),
    "use_rslora": Field("lora.rslora"),
    "use_dora": Field("lora.dora"),
    "init_lora_weights": Field(
        "lora.init", "True and PiSSA (an exact decomposition instead of its iterations)", _init
    ),
    "base_model_name_or_path": Field("model"),
    "bias": Field(
        "", "biases stay as they are", only("none", because="biases stay as they are here"), in_files=True
    ),
    "task_type": Field(
        "",
        "language models",
        only("CAUSAL_LM", because="language models are trained here (images: --vision.task)"),
        in_files=True,
    ),
    "peft_type": Field("", "LORA, ADALORA", only("LORA", because=_OTHER_METHOD), in_files=True),
    "modules_to_save": Field(
        "lora.modules_to_save",
        f"{' and '.join(TABLES)}; new tokens of the tokenizer: `data.add_tokens`",
        _saved,
    ),
    "trainable_token_indices": Field(
        "lora.trainable_token_indices",
        "a dict names the tables in `lora.trainable_token_modules`, with equal lists; new tokens of the tokenizer: "
        "`data.add_tokens`",
        _indices,
    ),
    "target_parameters": Field(
        "lora.rules", "stacks of experts; the two parts of gate_up_proj have one A each"
    ),
    "layer_replication": Field("", "", only(because="layers are not repeated here")),
    "lora_bias": Field("", "", only(False, because="adapters have no bias here")),
    "alora_invocation_tokens": Field("", "", only(because=_OTHER_METHOD)),
    "use_qalora": Field("", "", only(False, because=_OTHER_METHOD)),
    "use_bdlora": Field("", "", only(because=_OTHER_METHOD)),
    "velora_config": Field("", "", only(because=_OTHER_METHOD)),
    "monteclora_config": Field("", "", only(because=_OTHER_METHOD)),
    "arrow_config": Field("", "", only(because=_OTHER_METHOD)),
    "kasa_config": Field("", "", only(because=_OTHER_METHOD)),
    "megatron_config": Field("", "", only(because="there is no Megatron here; see --mesh")),
    "eva_config": Field("", "settings of an initialisation", ignored=True),
    "corda_config": Field("", "settings of an initialisation", ignored=True),
    "loftq_config": Field("", "settings of an initialisation", ignored=True),
    "lora_ga_config": Field("", "settings of an initialisation", ignored=True),
    "qalora_group_size": Field("", "a setting of use_qalora", ignored=True),
    "fan_in_fan_out": Field("", "without influence on Linear layers", ignored=True),
    "inference_mode": Field("", "said by the verb", ignored=True),
    "auto_mapping": Field("", "of PEFT's own loading", ignored=True),
    "peft_version": Field("", "of the file", ignored=True),
    "revision": Field("", "name a snapshot's folder as --model instead", ignored=True),
    "megatron_core": Field("", "a name of a module", ignored=True),
    "runtime_config": Field("", "of PEFT's own memory", ignored=True),
    "ensure_weight_tying": Field(
        "", "", only(False, because="a trained embedding and its head are apart here"), in_files=True
    ),
}


def from_peft(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Returns settings and notes from an ``adapter_config.json`` or a `LoraConfig` as a dict.

    Raises:
      NaloraError: names every unsupported field, with the reason.
    """
    values, allocation = training_settings(values)
    settings, notes = _converted(values)
    settings |= allocation
    indices = values.get("trainable_token_indices")
    if isinstance(indices, Mapping) and "trainable_token_indices" in settings.get("lora", {}):
        _put(settings, "lora.trainable_token_modules", _token_modules(indices))
    _put(settings, "lora.rules", rules_of(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        targets=values.get("target_modules"),
        excluded=values.get("exclude_modules"),
        layers=values.get("layers_to_transform"),
        ranks=values.get("rank_pattern"),
        alphas=values.get("alpha_pattern"),
        parameters=values.get("target_parameters"),
    ))  # fmt: skip
    return settings, notes


def _converted(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Returns the settings of single fields, and notes; adapter rules, which need several fields, are left out.

    Raises:
      NaloraError: names every field that is refused, with the reason.
    """
    settings: Settings = {}
    notes, refused = [], []
    for name, value in values.items():
        field = PEFT.get(name)
        if field is None:
            notes.append(f"{name} is not known here: left out")
            continue
        if field.ignored or field.ours == "lora.rules":
            if field.ignored and value not in (None, False, {}, []):
                notes.append(f"{name} is left out: {field.note}")
            continue
        try:
            ours = field.value(value)
        except (AttributeError, OverflowError, TypeError, ValueError):
            ours = Refused("its value has another type")
        if isinstance(ours, Refused):
            refused.append(f"{name} = {value!r} ({ours.reason})")
        elif ours is not None and field.ours:
            _put(settings, field.ours, ours)
    if refused:
        expected = "settings that are supported here"
        raise NaloraError(
            "LoraConfig", expected=expected, found="; ".join(refused), remedy="remove or change them"
        )
    if values.get("target_parameters"):
        notes.append(_DENSE)
    lora = settings.get("lora", {})
    if "embed_tokens" in lora.get("modules_to_save", ()) or "trainable_token_indices" in lora:
        notes.append(_RESIZED)
    return settings, notes


def _put(settings: Settings, name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts."""
    *groups, last = name.split(".")
    for group in groups:
        settings = settings.setdefault(group, {})
    settings[last] = value
