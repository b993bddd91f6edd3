"""Reads and checks ``adapter_config.json`` and matches module names exactly as PEFT does."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import ROWS, TABLES

# ---------------------------------------------------------------- fields and their conversion


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
    """Returns the token ids; `token_modules` reads their tables from the same field."""
    lists = [ids for ids in ids_by_table(value).values() if ids]
    if not lists:
        return None
    if not all(isinstance(ids, list | tuple) for ids in lists):
        return Refused("token ids are given as a list, or as lists by the table's name")
    if not set(token_modules(value)) <= set(ROWS):
        return Refused(f"rows of {' and '.join(ROWS)} are trained alone; other modules are not")
    if any(list(ids) != list(lists[0]) for ids in lists):
        return Refused("the same rows of both tables are trained here: give both the same list")
    return list(lists[0])


def ids_by_table(value: Any) -> Mapping[str, Any]:
    """Returns ``trainable_token_indices`` by the table's name; a plain list is of the embedding."""
    if isinstance(value, Mapping):
        return value
    return {"embed_tokens": value}


def token_modules(value: Any) -> list[str]:
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
        "lora.init", "True and PiSSA (four iterations of a randomized decomposition)", _init
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


def listed(value: Any) -> Any:
    """Returns a setting as a list: an empty one for None, one item for a name or a number."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    return value


# ---------------------------------------------------------------- the file

CONFIG_NAME = "adapter_config.json"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_RANK = 2**20
# Limit of expressions in one field, above the number of modules of any model. Each expression is
# compiled and matched with every module.
_MAX_PATTERNS = 4096

# Initializations that leave the base weights unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA, ...) train on a changed base; their factors must be converted before they can be used
# with the original base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Fields that this module reads or that do not change the adapter's function: `init_lora_weights` and
# its settings matter only through `_PLAIN_INITS`; PEFT ignores `fan_in_fan_out` for Linear layers.
_SUPPORTED = {name for name, field in PEFT.items() if field.ours or field.ignored or field.in_files}


@dataclass(frozen=True)
class PeftConfig:
    """The fields of ``adapter_config.json`` that determine an adapter's function.

    Module names are transformers' names, without PEFT's prefix:
    ``model.layers.3.mlp.gate_proj``.
    """

    where: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str  # names and suffixes, or one regular expression, or "all-linear"
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()  # () means every layer
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    tied: bool = False  # ensure_weight_tying
    # trainable_token_indices: by the table's name, in the order of the rows; a list without a name
    # is the embedding's.
    token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def targeted_modules(self, names: Sequence[str]) -> set[str]:
        """Returns the targeted ones of a model's Linear modules, without the output head, as PEFT does."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            named = set(names)
        else:
            named = _matching(names, self.target_modules)
        if not isinstance(self.target_modules, str):
            named &= self._in_layers(names)
        return named - _matching(names, self.exclude_modules)

    def targeted_parameters(self, names: Sequence[str]) -> set[str]:
        """Returns the targeted ones of a model's parameters, e.g. stacks of experts."""
        return _matching(names, self.target_parameters)

    def rank_of(self, name: str) -> int:
        """Returns the rank of a module or parameter."""
        return self.rank_pattern.get(_first_key(name, tuple(self.rank_pattern)), self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns the alpha of a module or parameter."""
        return self.alpha_pattern.get(_first_key(name, tuple(self.alpha_pattern)), self.alpha)

    def _in_layers(self, names: Sequence[str]) -> set[str]:
        """Returns the members of ``names`` in the layers of ``layers_to_transform``."""
        if not self.layers_to_transform:
            return set(names)
        layers = {str(index) for index in self.layers_to_transform}
        layer_patterns = [_layer_pattern(p) for p in self.layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        patterns = [re.compile(pattern) for pattern in layer_patterns]
        first = [next(filter(None, (p.match(name) for p in patterns)), None) for name in names]
        return {
            name
            for name, match in zip(names, first, strict=True)
            if match and match.groupdict().get("idx") in layers
        }


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads and checks the ``adapter_config.json`` of ``folder``.

    Raises:
      NaloraError: the file is missing or not a JSON object, rank, alpha or targets are missing or
        have the wrong type, or the adapter uses a feature that this library does not support. The
        message names the field.
    """
    path = folder / CONFIG_NAME
    raw = _read_json(path)
    fields = _Fields(raw, str(path))
    _refuse_unsupported(fields)
    targets, parameters = fields.strings_or_regex("target_modules"), fields.strings("target_parameters")
    if not targets and not parameters:
        expected = "the adapted modules, as a list or a pattern"
        remedy = "name them: PEFT would fall back to defaults of its own and drop the other tensors"
        raise fields.error("target_modules", expected, raw.get("target_modules"), remedy)
    config = PeftConfig(
        where=str(path),
        rank=fields.integer("r", high=_MAX_RANK),
        alpha=fields.number("lora_alpha"),
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=fields.strings_or_regex("exclude_modules"),
        layers_to_transform=fields.integers("layers_to_transform"),
        layers_pattern=fields.layer_patterns(),
        rank_pattern=fields.pattern("rank_pattern", lambda sub, key: sub.integer(key, high=_MAX_RANK)),
        alpha_pattern=fields.pattern("alpha_pattern", lambda sub, key: sub.number(key)),
        rslora=fields.flag("use_rslora"),
        dora=fields.flag("use_dora"),
        dropout=fields.probability("lora_dropout"),
        modules_to_save=fields.strings("modules_to_save"),
        tied=fields.flag("ensure_weight_tying"),
        token_indices=fields.token_indices("trainable_token_indices"),
    )
    if isinstance(targets, str) and (config.layers_to_transform or config.layers_pattern):
        expected = "null beside a target_modules that is a pattern (PEFT refuses the pair too)"
        raise fields.error("layers_to_transform", expected, raw.get("layers_to_transform"))
    return config


def _refuse_unsupported(fields: _Fields) -> None:
    raw = fields.raw
    init = raw.get("init_lora_weights", True)
    of_base = any(init is plain or (isinstance(plain, str) and init == plain) for plain in _PLAIN_INITS)
    merge = "merge it in PEFT (merge_and_unload) and use the merged folder as the base"
    convert = (
        "convert it first: in PEFT, save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    for key, fine, expected, remedy in (
        ("peft_type", raw.get("peft_type") == "LORA", '"LORA"', merge),
        ("task_type", raw.get("task_type") in (None, "CAUSAL_LM"), '"CAUSAL_LM"', ""),
        ("bias", raw.get("bias", "none") == "none", '"none" (trained biases are not supported)', ""),
        ("init_lora_weights", of_base, "an adapter of the unchanged base weights", convert),
    ):
        if not fine:
            raise fields.error(key, expected, repr(raw.get(key)), remedy)
    for key, value in fields.raw.items():
        # A field of a newer PEFT is harmless if it is off; if it is on it may change the function.
        if key not in _SUPPORTED and value not in (None, False, "none") and value != [] and value != {}:
            expected = "null or false (the feature is not supported)"
            raise fields.error(key, expected, json.dumps(value)[:80])


class _Fields(Fields):
    """Typed access to ``adapter_config.json``; every error names the field."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        super().__init__(raw, {}, where)

    def probability(self, key: str) -> float:
        value = 0.0
        if key in self.raw:
            value = self.number(key, zero=True)
        if value >= 1:
            raise self._refused(key, "a number in [0, 1)", value)
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = listed(self.raw.get(key) or [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refused(key, "a list of names", value)
        return tuple(value)

    def strings_or_regex(self, key: str) -> tuple[str, ...] | str:
        value = self.raw.get(key)
        if not isinstance(value, str) or not value:
            return self.strings(key)
        return self._regex(key, value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = listed(self.raw.get(key))
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise self._refused(key, "a list of layer numbers", value)
        return tuple(value)

    def token_indices(self, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        value = self.raw.get(key) or []
        indices: list[tuple[str, tuple[int, ...]]] = []
        for module, ids in ids_by_table(value).items():
            name = module.rpartition(".")[2]
            if name not in ROWS or name in dict(indices):
                expected = f"token ids of {' and '.join(ROWS)} (rows of other modules are not supported), each once"
                raise self._refused(key, expected, module)
            valid = isinstance(ids, list) and all(
                isinstance(i, int) and not isinstance(i, bool) for i in ids
            )
            if not valid or len(set(ids)) < len(ids):
                raise self._refused(
                    key, "a list of different token ids, or such lists by the table's name", value
                )
            indices.append((name, tuple(ids)))
        return tuple((name, ids) for name, ids in sorted(indices) if ids)

    def pattern(self, key: str, read: Any) -> dict[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self._refused(key, "an object of pattern: value", value)
        self._few(key, value)
        inner = _Fields(value, f"{self.where}: {key}")
        return {self._regex(key, name, _suffix_pattern): read(inner, name) for name in value}

    def layer_patterns(self) -> tuple[str, ...]:
        names = self.strings("layers_pattern")
        self._few("layers_pattern", names)
        return tuple(self._regex("layers_pattern", name, _layer_pattern) for name in names)

    def _few(self, key: str, patterns: Collection[str]) -> None:
        if len(patterns) > _MAX_PATTERNS:
            raise self._refused(key, f"at most {_MAX_PATTERNS:,} patterns", f"{len(patterns):,}")

    def _regex(self, key: str, pattern: str, use: Callable[[str], str] = str) -> str:
        """Returns ``pattern`` if it and the expression ``use(pattern)`` are both valid."""
        try:
            re.compile(pattern)
            re.compile(use(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused(key, "a regular expression", f"{pattern!r} ({error})") from error
        return pattern

    def _refused(self, key: str, expected: str, found: object) -> NaloraError:
        return self.error(key, expected, str(found)[:200])


def _suffix_pattern(key: str) -> str:
    """Returns the expression that PEFT builds from a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def _layer_pattern(name: str) -> str:
    """Returns PEFT's expression for an entry of layers_pattern; its group is the layer index."""
    return rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."


def _first_key(name: str, keys: tuple[str, ...]) -> str:
    """Returns the first key that matches a suffix of ``name`` (PEFT's ``get_pattern_key``), or "".

    A suffix starts at the beginning of the name or after a dot.
    """
    return next((key for key, pattern in _compiled(keys) if pattern.match(name)), "")


@functools.lru_cache(maxsize=4)
def _compiled(keys: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    return [(key, re.compile(_suffix_pattern(key))) for key in keys]


def _matching(names: Sequence[str], pattern: tuple[str, ...] | str) -> set[str]:
    """Returns the ``names`` that match one expression, or that end with an entry of a list."""
    if isinstance(pattern, str):
        matches = re.compile(pattern).fullmatch
        return {name for name in names if matches(name)}
    suffixes = frozenset(pattern)
    return {name for name in names if _has_suffix(name, suffixes)}


def _has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Returns True if ``suffixes`` contains ``name`` or a part of it that starts after a dot."""
    parts = name.split(".")
    return any(".".join(parts[first:]) in suffixes for first in range(len(parts)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        expected, remedy = (
            "the configuration of a PEFT adapter",
            f"an adapter folder holds {CONFIG_NAME} and tensors",
        )
        raise NaloraError(str(path), expected=expected, found="no such file", remedy=remedy)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise NaloraError(str(path), expected=f"at most {_MAX_CONFIG_BYTES} bytes", found="more")
    return read_json(path)
