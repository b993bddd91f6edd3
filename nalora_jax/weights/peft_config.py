"""Reads and checks ``adapter_config.json`` and matches module names exactly as PEFT does."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nalora_jax.common.fields import Fields
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import TOKEN_ROWS
from nalora_jax.weights.shards import read_header

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 4 << 20
_MAX_RANK = 2**20
# Limit of expressions in one field, above the number of modules of any model. Each expression is
# compiled and matched with every module.
_MAX_PATTERNS = 4096

# Initializations that leave the base weights unchanged. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA, ...) train on a changed base; their factors must be converted before they can be used
# with the original base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Tasks of adapters on a decoder.
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")

# Fields that this module reads or that do not change the adapter's function: `init_lora_weights`
# and its settings matter only through `_PLAIN_INITS`; PEFT ignores `fan_in_fan_out` for Linear
# layers.
_SUPPORTED = {
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "bias",
    "peft_type",
    "task_type",
    "modules_to_save",
    "ensure_weight_tying",
    "trainable_token_indices",
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "astra_config",
    "loftq_config",
    "lora_ga_config",
    "revision",
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "fan_in_fan_out",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
}


def list_of(value: Any) -> Any:
    """Returns a setting as a list: an empty one for None, one item for a name or a number."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    return value


def ids_by_table(value: Any) -> Mapping[str, Any]:
    """Returns ``trainable_token_indices`` by the table's name; a plain list is of the embedding."""
    if isinstance(value, Mapping):
        return value
    return {"embed_tokens": value}


class PeftConfig(Fields):
    """The fields of ``adapter_config.json`` that determine an adapter's function; every error names
    the field.

    Module names are transformers' names, without PEFT's prefix:
    ``model.layers.3.mlp.gate_proj``.

    Raises:
      NaloraError: rank, alpha or targets are missing or have the wrong type, or the adapter uses a
        feature that this library does not support.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        """Reads and checks all fields of ``raw``; ``where`` is the file, for messages."""
        super().__init__(raw, {}, where)
        _refuse_unsupported(self)
        # Names and suffixes, or one regular expression, or "all-linear".
        self.target_modules = self._strings_or_regex("target_modules")
        self.target_parameters = self._strings("target_parameters")
        if not self.target_modules and not self.target_parameters:
            expected = "the adapted modules, as a list or a pattern"
            remedy = (
                "name them: PEFT would fall back to its own defaults and drop the other "
                "tensors"
            )
            raise self.error(
                "target_modules",
                expected,
                raw.get("target_modules"),
                remedy,
            )
        self.rank = self.integer("r", high=_MAX_RANK)
        self.alpha = self.number("lora_alpha")
        self.exclude_modules = self._strings_or_regex("exclude_modules")
        # () means every layer.
        self.layers_to_transform = self._sequence(
            "layers_to_transform", int, "a list of layer numbers"
        )
        self.layers_pattern = self._patterns(
            "layers_pattern", self._strings("layers_pattern"), _layer_pattern
        )
        self.rank_pattern = self._read_patterns(
            "rank_pattern", lambda sub, key: sub.integer(key, high=_MAX_RANK)
        )
        self.alpha_pattern = self._read_patterns(
            "alpha_pattern", lambda sub, key: sub.number(key)
        )
        self.rslora = self.flag("use_rslora")
        self.dora = self.flag("use_dora")
        self.dropout = self.number("lora_dropout", default=0.0, zero=True)
        self.modules_to_save = self._strings("modules_to_save")
        self.tied = self.flag("ensure_weight_tying")
        # By the table's name, in the order of the rows; a list without a name is the embedding's.
        self.token_indices = self._indices("trainable_token_indices")
        if self.dropout >= 1:
            raise self.error("lora_dropout", "a number in [0, 1)", self.dropout)
        selects_layers = self.layers_to_transform or self.layers_pattern
        if selects_layers and isinstance(self.target_modules, str):
            expected = "null with a target_modules that is a pattern (PEFT refuses the pair too)"
            raise self.error(
                "layers_to_transform",
                expected,
                raw.get("layers_to_transform"),
            )

    def targeted_modules(self, names: Sequence[str]) -> set[str]:
        """Returns the targeted ones of a model's Linear modules, without the output head, as PEFT
        does."""
        if isinstance(self.target_modules, str):
            named = set(names)
            if self.target_modules.lower() != "all-linear":
                named = _match_names(names, self.target_modules)
        else:
            named = {
                name
                for name in _match_names(names, self.target_modules)
                if self._is_in_layers(name)
            }
        return named - _match_names(names, self.exclude_modules)

    def targeted_parameters(self, names: Sequence[str]) -> set[str]:
        """Returns the targeted ones of a model's parameters, e.g. stacks of experts."""
        return _match_names(names, self.target_parameters)

    def rank_of(self, name: str) -> int:
        """Returns the rank of a module or parameter."""
        return int(_first_value(self.rank_pattern, name, self.rank))

    def alpha_of(self, name: str) -> float:
        """Returns the alpha of a module or parameter."""
        return float(_first_value(self.alpha_pattern, name, self.alpha))

    def _is_in_layers(self, name: str) -> bool:
        """Returns True for modules in ``layers_to_transform``; for all modules if it is empty."""
        if not self.layers_to_transform:
            return True
        patterns = _compile(self.layers_pattern, _layer_pattern) or [_ANY_LAYER]
        layers = {str(layer) for layer in self.layers_to_transform}
        for pattern in patterns:
            match = pattern.match(name)
            if match is not None:  # the first one counts
                return match.groupdict().get("idx", "") in layers
        return False

    def _sequence(self, key: str, kind: type[Any], expected: str) -> tuple[Any, ...]:
        """Returns a field as a tuple of ``kind``; () for null, one item for a single value."""
        value = list_of(self.raw.get(key))
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self._refusal(key, expected, value)
        return tuple(value)

    def _strings(self, key: str) -> tuple[str, ...]:
        """Returns a list of names as a tuple; () for null and for empty values."""
        if self.raw.get(key):
            return self._sequence(key, str, "a list of names")
        return ()

    def _strings_or_regex(self, key: str) -> tuple[str, ...] | str:
        """Returns a non-empty string as it is (a regular expression), a list as a tuple."""
        value = self.raw.get(key)
        if not isinstance(value, str) or not value:
            return self._strings(key)
        return self._patterns(key, [value])[0]

    def _indices(self, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Returns the trained token ids of each table, sorted by the table's name.

        Example: ``(("embed_tokens", (5, 6)),)``. Tables without ids are left out.
        """
        value = self.raw.get(key) or []
        indices: dict[str, tuple[int, ...]] = {}
        for module, ids in ids_by_table(value).items():
            name = module.rpartition(".")[2]
            if name not in TOKEN_ROWS or name in indices:
                expected = (
                    f"token ids of {' and '.join(TOKEN_ROWS)} (rows of other modules are not "
                    "supported), each once"
                )
                raise self._refusal(key, expected, module)
            valid = isinstance(ids, list) and all(
                type(token_id) is int for token_id in ids
            )
            if not valid or len(set(ids)) < len(ids):
                expected = (
                    "a list of different token ids, or such lists by the table's name"
                )
                raise self._refusal(key, expected, value)
            indices[name] = tuple(ids)
        return tuple((name, ids) for name, ids in sorted(indices.items()) if ids)

    def _read_patterns(
        self, key: str, read: Callable[[Fields, str], Any]
    ) -> dict[str, Any]:
        """Returns the value of each pattern; ``read(fields, pattern)`` reads and checks one."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise self._refusal(key, "an object of pattern: value", value)
        inner = Fields(value, {}, f"{self.where}: {key}")
        return {
            name: read(inner, name)
            for name in self._patterns(key, value, _suffix_pattern)
        }

    def _patterns(
        self, key: str, patterns: Collection[str], use: Callable[[str], str] = str
    ) -> tuple[str, ...]:
        """Returns the patterns if they and the expressions ``use(pattern)`` are valid."""
        if len(patterns) > _MAX_PATTERNS:
            raise self._refusal(
                key,
                f"at most {_MAX_PATTERNS:,} patterns",
                f"{len(patterns):,}",
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
                re.compile(use(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                raise self._refusal(
                    key,
                    "a regular expression",
                    f"{pattern!r} ({error})",
                ) from error
        return tuple(patterns)

    def _refusal(self, key: str, expected: str, found: object) -> NaloraError:
        """Returns the error about a field, with at most 200 characters of its value."""
        return self.error(key, expected, str(found)[:200])


def _refuse_unsupported(fields: Fields) -> None:
    """Raises an error for a field that changes the function of an adapter in a way that is not
    supported."""
    raw = fields.raw
    init = raw.get("init_lora_weights", True)
    # `is` for True, False and None, because 1 == True.
    is_plain = any(
        init is plain or (isinstance(plain, str) and init == plain)
        for plain in _PLAIN_INITS
    )
    merge = "merge it in PEFT (merge_and_unload) and use the merged folder as the base"
    convert = (
        "convert it first: in PEFT, "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    # Field, whether its value is supported, expected value, remedy.
    for key, fine, expected, remedy in (
        ("peft_type", raw.get("peft_type") == "LORA", '"LORA"', merge),
        ("task_type", raw.get("task_type") in _TASKS, '"CAUSAL_LM" or "SEQ_CLS"', ""),
        (
            "bias",
            raw.get("bias", "none") == "none",
            '"none" (trained biases are not supported)',
            "",
        ),
        (
            "init_lora_weights",
            is_plain,
            "an adapter of the unchanged base weights",
            convert,
        ),
    ):
        if not fine:
            raise fields.error(key, expected, repr(raw.get(key)), remedy)
    for key, value in fields.raw.items():
        # A field of a newer PEFT is harmless if it is off; if it is on it may change the function.
        off = value in (None, False, "none", [], {})
        if key not in _SUPPORTED and not off:
            expected = "null or false (the feature is not supported)"
            raise fields.error(key, expected, json.dumps(value)[:80])


def recorded_fact(folder: Path, fact: Literal["base", "rope_scaling"]) -> str:
    """Returns a fact that `export_adapter` recorded in an adapter's file; "" if it is not there.

    "base" is the name that loads exactly the weights that the adapter was trained on,
    "rope_scaling" the base's RoPE scaling if it was not its files'.
    """
    try:
        return read_header(folder / TENSORS_NAME)[1].get(f"nalora.{fact}", "")
    except NaloraError:  # `import_adapter` reports a missing or damaged file
        return ""


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads and checks the ``adapter_config.json`` of ``folder``.

    Raises:
      NaloraError: the file is missing or not a JSON object, rank, alpha or targets are missing or
        have the wrong type, or the adapter uses a feature that this library does not support. The
        message names the field.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise NaloraError(
            str(path),
            expected="the configuration of a PEFT adapter",
            found="no such file",
            remedy=f"an adapter folder holds {CONFIG_NAME} and tensors",
        )
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise NaloraError(
            str(path),
            expected=f"at most {_MAX_CONFIG_BYTES} bytes",
            found="more",
        )
    return PeftConfig(read_json(path), str(path))


def _suffix_pattern(key: str) -> str:
    """Returns the expression that PEFT builds from a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def _layer_pattern(name: str) -> str:
    """Returns PEFT's expression for an entry of layers_pattern; its group is the layer index."""
    return rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."


# PEFT's expression without layers_pattern: the first number between two dots.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def _first_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """Returns the value of the first key that matches a suffix of ``name`` (PEFT's
    ``get_pattern_key``).

    A suffix starts at the beginning of the name or after a dot.
    """
    expressions = _compile(tuple(pattern), _suffix_pattern)
    for value, expression in zip(pattern.values(), expressions, strict=True):
        if expression.match(name):
            return value
    return default


# Room for the three fields of patterns, which are matched with every module of a model.
@functools.lru_cache(maxsize=4)
def _compile(keys: tuple[str, ...], use: Callable[[str], str]) -> list[re.Pattern[str]]:
    """Returns the compiled expressions ``use(key)``."""
    return [re.compile(use(key)) for key in keys]


def _match_names(names: Sequence[str], pattern: tuple[str, ...] | str) -> set[str]:
    """Returns the ``names`` that match one expression, or that end with an entry of a list."""
    if isinstance(pattern, str):
        matches = re.compile(pattern).fullmatch
        return {name for name in names if matches(name)}
    suffixes = frozenset(pattern)
    return {name for name in names if not suffixes.isdisjoint(_suffixes(name))}


def _suffixes(name: str) -> list[str]:
    """Returns ``name`` and its parts that start after a dot."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]
