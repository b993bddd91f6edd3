"""Converts PEFT's `LoraConfig` to the settings of a run.

`PEFT` is the only list of the fields of `LoraConfig` and has all of them, so that none is dropped
silently; docs/from_peft.md has a table of them. `rules_of` converts module names to ordered rules
over this library's projections.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError, abbreviate
from nalora_jax.models import families  # noqa: F401  (enters the families that names are of)
from nalora_jax.models.family import BUILT_IN
from nalora_jax.models.targets import TOKEN_ROWS, TOKEN_TABLES
from nalora_jax.weights.peft_config import ids_by_table, list_of

# Settings as nested dicts, by the names of `nalora_jax.config`.
_Settings = dict[str, Any]


# ---------------------------------------------------------------- fields and their conversion


@dataclass(frozen=True)
class Refused:
    """A value that is not supported, with the reason."""

    reason: str


@dataclass(frozen=True)
class Field:
    """Conversion of a field."""

    ours: str = ""  # the setting, dotted; empty without one
    # our value of theirs; may be `Refused`
    value: Callable[[Any], Any] = lambda value: value
    ignored: str = ""  # the reason that it does not matter here


def _accept_only(*accepted: Any, because: str) -> Field:
    """Returns a field that accepts only ``accepted`` and empty values, which have no effect
    here."""
    fine = (None, False, {}, [], *accepted)

    def convert(value: Any) -> Refused | None:
        """Returns None for an accepted value, otherwise `Refused`."""
        if any(value == each for each in fine):
            return None
        return Refused(because)

    return Field(value=convert)


def _convert_init(value: Any) -> Any:
    """Returns our name of an initialization, "default" or "pissa"; `Refused` for others."""
    if isinstance(value, str) and re.fullmatch(r"pissa(_niter_\d+)?", value):
        return "pissa"
    if value == "lora_ga":
        return Refused(
            "PEFT's scales B by the singular values; --lora.init lora_ga scales both sides as the "
            "paper does"
        )
    if value in (True, None):
        return "default"
    return Refused(
        "there are PEFT's default and PiSSA; gaussian and others are not made here"
    )


def _convert_saved(value: Any) -> Any:
    """Returns the tables of tokens that PEFT's ``modules_to_save`` (``value``) names.

    They are in the order of `TOKEN_TABLES`; None if there are none. Names of other modules give
    `Refused`.
    """
    names = [str(name).rpartition(".")[2] for name in value or []]
    if set(names) <= set(TOKEN_TABLES):
        return [name for name in TOKEN_TABLES if name in names] or None
    return Refused(
        f"of the base, {' and '.join(TOKEN_TABLES)} are trained as a whole; norms and the rest "
        "stay as they are"
    )


def _convert_indices(value: Any) -> Any:
    """Returns the token ids; `_token_modules` reads their tables from the same field."""
    lists = [ids for ids in ids_by_table(value).values() if ids]
    if not lists:
        return None
    if not all(isinstance(ids, list | tuple) for ids in lists):
        return Refused("token ids are given as a list, or as lists by the table's name")
    if not set(_token_modules(value)) <= set(TOKEN_ROWS):
        return Refused(
            f"rows of {' and '.join(TOKEN_ROWS)} are trained alone; other modules are not"
        )
    if any(list(ids) != list(lists[0]) for ids in lists):
        return Refused(
            "the same rows of both tables are trained here: give both the same list"
        )
    return list(lists[0])


def _token_modules(value: Any) -> list[str]:
    """Returns the names of the tables with trained token ids, sorted."""
    named = [str(name) for name, ids in ids_by_table(value).items() if ids]
    return sorted({name.rpartition(".")[2] for name in named})


_RULES = "lora.rules"  # of the fields that are combined into rules
_TARGETS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
)
_OTHER_METHOD = "it is another method than LoRA, and is not implemented here"
_METHODS = (
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
_IGNORED = {
    **dict.fromkeys(
        (
            "eva_config",
            "corda_config",
            "astra_config",
            "loftq_config",
            "lora_ga_config",
        ),
        "it configures an initialization",
    ),
    "qalora_group_size": "it is a setting of use_qalora",
    "fan_in_fan_out": "it has no effect on Linear layers",
    "inference_mode": "the subcommand decides whether the adapter is trained",
    "auto_mapping": "only PEFT needs it, to load a model",
    "peft_version": "it does not change the adapter",
    "revision": "name a snapshot's folder as --model instead",
    "megatron_core": "it names a module of Megatron",
    "runtime_config": "it configures PEFT's use of memory",
}
PEFT: dict[str, Field] = {
    **dict.fromkeys(_TARGETS, Field(_RULES)),
    "layers_pattern": _accept_only(because="layers are found by their number alone"),
    "lora_dropout": Field("lora.dropout"),
    "use_rslora": Field("lora.rslora"),
    "use_dora": Field("lora.dora"),
    "init_lora_weights": Field("lora.init", _convert_init),
    "base_model_name_or_path": Field("model"),
    "bias": _accept_only("none", because="biases stay as they are here"),
    "task_type": _accept_only(
        "CAUSAL_LM", because="language models are trained here (images: --vision.task)"
    ),
    "peft_type": _accept_only("LORA", because=_OTHER_METHOD),
    "modules_to_save": Field("lora.modules_to_save", _convert_saved),
    "trainable_token_indices": Field("lora.trainable_token_indices", _convert_indices),
    "layer_replication": _accept_only(because="layers are not repeated here"),
    "lora_bias": _accept_only(because="adapters have no bias here"),
    **dict.fromkeys(_METHODS, _accept_only(because=_OTHER_METHOD)),
    "megatron_config": _accept_only(because="there is no Megatron here; see --mesh"),
    **{name: Field(ignored=reason) for name, reason in _IGNORED.items()},
    "ensure_weight_tying": _accept_only(
        because="a trained embedding and its head are separate tables here"
    ),
}

# ---------------------------------------------------------------- single fields

_RESIZED = (
    "if the tokenizer got new tokens: name them in data.add_tokens or data.add_special_tokens, in "
    "their order; the embedding is resized for them"
)
_DENSE = (
    "target_parameters: dense layers of a mixture have the same paths as experts; leave them out "
    "with a first rule such as layers/0/ffn/:0"
)

# Settings of AdaLoRA's allocation: PEFT's name, our name, and PEFT's default.
_ALLOCATION = (
    ("target_r", "target_rank", 8),
    ("deltaT", "interval", 1),
    ("beta1", "sensitivity_decay", 0.85),
    ("beta2", "uncertainty_decay", 0.85),
    ("orth_reg_weight", "orthogonality", 0.5),
)
# steps in PEFT, shares of them here
_SHARES = (
    ("tinit", "warmup_share"),
    ("tfinal", "final_share"),
)
# Fields of AdaLoraConfig alone.
_ADALORA = {
    "init_r",
    "total_step",
    *(theirs for theirs, *_ in (*_ALLOCATION, *_SHARES)),
}


def convert_peft_config(values: Mapping[str, Any]) -> tuple[_Settings, list[str]]:
    """Returns settings and notes from an ``adapter_config.json`` or a `LoraConfig` as a dict.

    Raises:
      NaloraError: names every unsupported field, with the reason.
    """
    values, allocation = _training_settings(values)
    settings: _Settings = {}
    notes = []
    refused = []
    for name, value in values.items():
        field = PEFT.get(name)
        if field is None:
            notes.append(f"{name} is not known here: left out")
        elif field.ignored:
            if value not in (None, False, {}, []):
                notes.append(f"{name} is left out: {field.ignored}")
        elif field.ours != _RULES:
            try:
                ours = field.value(value)
            except (AttributeError, OverflowError, TypeError, ValueError):
                ours = Refused("its value has another type")
            if isinstance(ours, Refused):
                refused.append(f"{name} = {value!r} ({ours.reason})")
            elif ours is not None and field.ours:
                _put(settings, field.ours, ours)
    if refused:
        raise NaloraError(
            "LoraConfig",
            expected="settings that are supported here",
            found="; ".join(refused),
            remedy="remove or change them",
        )
    if values.get("target_parameters"):
        notes.append(_DENSE)
    lora = settings.get("lora", {})
    indices = values.get("trainable_token_indices")
    saved = lora.get("modules_to_save", ())
    if "embed_tokens" in saved or "trainable_token_indices" in lora:
        notes.append(_RESIZED)
    settings |= allocation
    if isinstance(indices, Mapping) and "trainable_token_indices" in lora:
        _put(settings, "lora.trainable_token_modules", _token_modules(indices))
    _put(settings, _RULES, rules_of(values))
    return settings, notes


def _training_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], _Settings]:
    """Splits an ``AdaLoraConfig`` into fields of a ``LoraConfig`` and this library's settings.

    Any other configuration is returned unchanged.

    Raises:
      NaloraError: ``total_step`` is missing, or ``tinit`` or ``tfinal`` is not in [0, total_step].
    """
    if values.get("peft_type") != "ADALORA":
        return dict(values), {}
    total = values.get("total_step")
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise NaloraError(
            "total_step",
            expected="the number of steps, which AdaLoRA's schedule spans",
            found=total,
        )
    ours = {name: values.get(theirs, default) for theirs, name, default in _ALLOCATION}
    for theirs, name in _SHARES:
        steps = values.get(theirs) or 0
        if not isinstance(steps, int) or not 0 <= steps <= total:
            raise NaloraError(
                theirs,
                expected=f"a number of steps up to {total}",
                found=abbreviate(steps),
            )
        ours[name] = steps / total
    of_method = {*_ADALORA, "rank_pattern"}
    plain = {name: value for name, value in values.items() if name not in of_method}
    # 12 is PEFT's default of init_r
    plain |= {"peft_type": "LORA", "r": values.get("init_r", 12)}
    return plain, {"steps": total, "adalora": ours}


def _put(settings: _Settings, name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts."""
    *groups, last = name.split(".")
    for group in groups:
        settings = settings.setdefault(group, {})
    settings[last] = value


# ---------------------------------------------------------------- rules of names


_PATH = re.compile(r"layers/(\w+)/(?:\w+/)?(\w*_proj\w*)/kernel")
_NAME = re.compile(r"[\w.]+")
# of every model
_LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
# transformers' stacks of all experts of a layer; the slash in front keeps shared experts out.
_STACKS = {
    "gate_up_proj": "/ffn/(experts_ffn/)?(gate|up)_proj",
    "down_proj": "/ffn/(experts_ffn/)?down_proj",
}


@functools.cache
def _modules() -> tuple[dict[str, str], str]:
    """Returns the pattern of each of transformers' names in the paths that rules are searched in,
    and of outputs.

    Example: ``{"q_proj": "attn/q_proj", "qkv_proj": "(attn/q_proj|attn/k_proj|attn/v_proj)", ...}``

    In "all-linear" outputs of linear attention and convolutions are in one rule with o_proj,
    because a rule must match in every model.
    """
    paths_of: dict[str, list[str]] = {}
    for row in itertools.chain(*(family.tensors for family in BUILT_IN.values())):
        name = row.name.removesuffix(".weight").rpartition(".")[2]
        for match in filter(None, map(_PATH.fullmatch, row.paths)):
            # A path also matches parts of a part: ffn/experts_ffn/gate_proj.
            paths = paths_of.setdefault(name, [])
            path = f"{match[1]}/{match[2]}"
            if path not in paths:
                paths.append(path)
    everything = list(dict.fromkeys(itertools.chain(*paths_of.values())))

    def pattern(paths: Sequence[str]) -> str:
        """Returns an expression that is found in these paths only."""
        exact = []
        for path in paths:
            # A path that begins another one must be at the end.
            if any(other != path and other.startswith(path) for other in everything):
                path = f"{path}$"
            exact.append(path)
        if len(exact) == 1:
            return exact[0]
        return f"({'|'.join(exact)})"

    known = ("attn/", "ffn/", "tail/")
    mixers = [path for path in everything if not path.startswith(known)]
    patterns = {name: pattern(paths) for name, paths in paths_of.items()}
    return patterns, pattern(["attn/o_proj", *mixers])


def rules_of(values: Mapping[str, Any]) -> list[str]:
    """Returns rules ``PATTERN:RANK:ALPHA`` that target the same modules as the fields of a
    `LoraConfig`.

    Example:
      >>> common = {"r": 8, "lora_alpha": 16}
      >>> rules_of(common | {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4}})
      ['attn/v_proj:4:16', 'attn/q_proj:8:16', 'attn/v_proj:8:16']
      >>> rules_of(common | {"target_parameters": ["mlp.experts.down_proj"]})
      ['/ffn/(experts_ffn/)?down_proj:8:16']

    Raises:
      NaloraError: a regular expression, a name that no supported model has, no names at all, or a
        value of another type.
    """
    for where in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(where), Mapping | None):
            raise NaloraError(
                where,
                expected="values by name",
                found=abbreviate(values[where]),
            )
    rank = values.get("r", 8)
    alpha = values.get("lora_alpha", 8)
    ranks = dict(values.get("rank_pattern") or {})
    alphas = dict(values.get("alpha_pattern") or {})
    parameters = list_of(values.get("target_parameters"))
    stacks = [_stack_path(name) for name in _names(parameters, "target_parameters")]
    targets = values.get("target_modules")
    excluded = values.get("exclude_modules")
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if isinstance(targets, str) and not everything:
        raise NaloraError(
            "target_modules",
            expected='names, or "all-linear"',
            found=f"the expression {targets!r}",
            remedy="write it as --lora.rules: patterns are searched in paths such as "
            "layers/3/ffn/gate_proj",
        )
    if targets is None and not stacks:
        raise NaloraError(
            "target_modules",
            expected="names of modules",
            found="none",
            remedy="PEFT's default depends on the model: name them",
        )
    if isinstance(excluded, str):
        raise NaloraError(
            "exclude_modules",
            expected="names",
            found=f"the expression {excluded!r}",
        )
    out = {
        _path(name, "exclude_modules")
        for name in _names(excluded or [], "exclude_modules")
    }
    if everything and any("linear_attn/" in path for path in out):
        raise NaloraError(
            "exclude_modules",
            expected="no linear attention, next to all-linear",
            found=", ".join(excluded or ()),
            remedy="list target_modules by name",
        )
    named: Sequence[str] = _LINEAR
    if targets is None:
        named = ()
    elif not everything:
        named = _names(targets, "target_modules")
    paths = [_path(name, "target_modules") for name in named]
    paths = [path for path in paths if path not in out]
    # Start of the patterns if layers_to_transform is set, e.g. layers/(0|1)/.
    within = ""
    numbers = list_of(values.get("layers_to_transform"))
    if numbers:
        if not isinstance(numbers, Sequence) or {*map(type, numbers)} != {int}:
            raise NaloraError(
                "layers_to_transform",
                expected="layer numbers",
                found=abbreviate(numbers),
            )
        within = f"layers/({'|'.join(map(str, numbers))})/"
    rules = []
    # To find the targets that a pattern belongs to: names of either may contain a layer.
    any_layer = {_drop_layer(path) for path in stacks}
    patterns = dict.fromkeys([*ranks, *alphas])
    # Of rules the first that matches counts, so longer names come before the names that they end
    # with.
    for name in sorted(patterns, key=lambda name: -_bare_name(name).count(".")):
        path = _path(name, "rank_pattern, alpha_pattern")
        scales = _first_value(ranks, name, rank), _first_value(alphas, name, alpha)
        # PEFT ignores a pattern for a module that is not targeted.
        if _may_be_stack(name) and _drop_layer(_stack_path(name)) in any_layer:
            rules.append(_rule(_stack_path(name), *scales, ""))
        if _drop_layer(path) in paths:
            rules.append(_rule(path, *scales, within))
    rules += [_rule(path, rank, alpha, within) for path in paths]
    # PEFT applies neither exclude_modules nor layers_to_transform to target_parameters.
    rules += [_rule(path, rank, alpha, "") for path in stacks]
    if everything:
        modules, outputs = _modules()
        rules = [rule.replace(modules["o_proj"], outputs) for rule in rules]
    return list(dict.fromkeys(rules))


def _names(value: Any, where: str) -> Sequence[str]:
    """Returns a list of names; raises a NaloraError about the field ``where`` for another value."""
    if isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        return value
    raise NaloraError(where, expected="a list of names", found=abbreviate(value))


def _first_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first key that ``name`` ends with, as PEFT looks it up for a
    module."""
    dotted = f".{_bare_name(name)}"
    for key, value in pattern.items():
        if dotted.endswith(f".{_bare_name(key)}"):
            return value
    return default


def _rule(path: str, rank: Any, alpha: Any, within: str) -> str:
    """Returns ``PATTERN:RANK:ALPHA``, e.g. ``attn/q_proj:8:16``.

    ``within`` (``layers/(0|1)/``, or "") precedes a pattern that names no layer.
    """
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    # Refuses NaN too; the largest float32 is 3.4e38.
    if not number or not abs(alpha) < 1e38:
        raise NaloraError(
            "lora_alpha or alpha_pattern",
            expected="a number",
            found=abbreviate(alpha),
        )
    if not path.startswith("layers/"):
        path = within + path
    return f"{path}:{rank}:{alpha:g}"


def _path(name: str, where: str) -> str:
    """Returns the pattern of a module: in every layer, or in the layer that its name contains."""
    bare = _bare_name(name)
    modules, _ = _modules()
    last = bare.rpartition(".")[2]
    if last in TOKEN_TABLES:
        raise NaloraError(
            where,
            expected="modules of a model's layers",
            found=f"{name!r}, which is trained as a whole here",
            remedy=f"leave it out, and add --lora.modules-to-save {last}",
        )
    if not _NAME.fullmatch(bare) or last not in modules:
        raise NaloraError(
            where,
            expected=f"modules of {', '.join(modules)}",
            found=repr(name),
            remedy="write it as --lora.rules by hand",
        )
    return _restrict_to_layer(bare, modules[last])


def _stack_path(name: str) -> str:
    """Returns the pattern of a stack of experts: in every layer, or in the layer that its name
    contains."""
    if not _may_be_stack(name):
        remedy = "name a Linear module in target_modules; routers and biases are not adapted here"
        raise NaloraError(
            "target_parameters",
            expected=", ".join(f"experts.{stack}" for stack in _STACKS),
            found=repr(name),
            remedy=remedy,
        )
    bare = _bare_name(name)
    return _restrict_to_layer(bare, _STACKS[bare.rpartition(".")[2]])


def _restrict_to_layer(name: str, pattern: str) -> str:
    """Returns ``pattern`` for every layer, or for the layer that ``name`` contains."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer:
        return f"layers/{layer[1]}/{pattern.removeprefix('/')}"
    return pattern


def _may_be_stack(name: str) -> bool:
    """Returns True for names that end like a stack of experts, and for a stack's bare name."""
    module, _, last = _bare_name(name).rpartition(".")
    return last in _STACKS and module.rpartition(".")[2] in ("", "experts")


def _bare_name(name: str) -> str:
    """Returns a name without the marks of an expression that PEFT itself writes for experts."""
    name = name.removeprefix("^").removesuffix("$")
    return name.removeprefix(r".*\.").replace(r"\.", ".")


def _drop_layer(path: str) -> str:
    """Returns a pattern for every layer instead of one."""
    return re.sub(r"^layers/\d+", "", path).removeprefix("/")
