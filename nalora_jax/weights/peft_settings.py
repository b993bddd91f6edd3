"""Converts PEFT's `LoraConfig` to the settings of a run.

`PEFT` is the only list of the fields of `LoraConfig` and has all of them, so that none is dropped
silently; docs/from_peft.md shows the table. `rules_of` converts module names to ordered rules over
this library's projections.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nalora_jax.errors import NaloraError, shown
from nalora_jax.models import families  # noqa: F401  (enters the families that names are of)
from nalora_jax.models.family import BUILT_IN, Family
from nalora_jax.models.targets import TABLES
from nalora_jax.weights.peft_config import PEFT, Refused, listed, token_modules

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

# Settings of the allocation: PEFT's name, our name, and PEFT's default.
_ALLOCATION = (
    ("target_r", "target_rank", 8),
    ("deltaT", "interval", 1),
    ("beta1", "sensitivity_decay", 0.85),
    ("beta2", "uncertainty_decay", 0.85),
    ("orth_reg_weight", "orthogonality", 0.5),
)
_SHARES = (("tinit", "warmup"), ("tfinal", "final"))  # steps in PEFT, shares of them here
# Fields of AdaLoraConfig alone.
_ADALORA = {"init_r", "total_step", *(theirs for theirs, *_ in (*_ALLOCATION, *_SHARES))}


def from_peft(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Returns settings and notes from an ``adapter_config.json`` or a `LoraConfig` as a dict.

    Raises:
      NaloraError: names every unsupported field, with the reason.
    """
    values, allocation = _training_settings(values)
    settings, notes = _converted(values)
    settings |= allocation
    indices = values.get("trainable_token_indices")
    if isinstance(indices, Mapping) and "trainable_token_indices" in settings.get("lora", {}):
        _put(settings, "lora.trainable_token_modules", token_modules(indices))
    _put(settings, "lora.rules", rules_of(values))
    return settings, notes


def _training_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an ``AdaLoraConfig`` into fields of a ``LoraConfig`` and this library's settings.

    Any other configuration is returned unchanged.

    Raises:
      NaloraError: ``total_step`` is missing, or ``tinit`` or ``tfinal`` is no number of its steps.
    """
    if values.get("peft_type") != "ADALORA":
        return dict(values), {}
    total = values.get("total_step")
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        expected = "the number of steps, which AdaLoRA's schedule spans"
        raise NaloraError("total_step", expected=expected, found=total)
    ours = {name: values.get(theirs, default) for theirs, name, default in _ALLOCATION}
    shares = {}
    for theirs, name in _SHARES:
        steps = values.get(theirs) or 0
        if not isinstance(steps, int) or not 0 <= steps <= total:
            raise NaloraError(theirs, expected=f"a number of steps up to {total}", found=shown(steps))
        shares[f"{name}_share"] = steps / total
    plain = {name: value for name, value in values.items() if name not in {*_ADALORA, "rank_pattern"}}
    plain |= {"peft_type": "LORA", "r": values.get("init_r", 12)}
    return plain, {"steps": total, "adalora": ours | shares}


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


# ---------------------------------------------------------------- rules of names


_PATH = re.compile(r"layers/(\w+)/(?:\w+/)?(\w*_proj\w*)/kernel")


def _paths_of(records: Iterable[Family]) -> dict[str, list[str]]:
    """Returns the paths of every projection by transformers' name of its module.

    Example: ``{"q_proj": ["attn/q_proj"], "qkv_proj": ["attn/q_proj", "attn/k_proj", "attn/v_proj"], ...}``
    """
    paths: dict[str, list[str]] = {}
    for row in (row for family in records for row in family.tensors):
        name = row.name.removesuffix(".weight").rpartition(".")[2]
        for match in filter(None, map(_PATH.fullmatch, row.paths)):
            path = f"{match[1]}/{match[2]}"  # also matches parts of a part: ffn/experts_ffn/gate_proj
            if path not in paths.setdefault(name, []):
                paths[name].append(path)
    return paths


def _pattern(paths: Sequence[str]) -> str:
    """Returns an expression that is found in these paths only."""
    longer = {path for others in _known_paths().values() for path in others}
    exact = [path + "$" * any(p != path and p.startswith(path) for p in longer) for path in paths]
    if len(exact) == 1:
        return exact[0]
    return f"({'|'.join(exact)})"


@functools.cache
def _known_paths() -> dict[str, list[str]]:
    """Returns `_paths_of` all families."""
    return _paths_of(BUILT_IN.values())


@functools.cache
def _modules() -> dict[str, str]:
    """Returns transformers' name of each projection, and its pattern in the paths that rules are searched in."""
    return {name: _pattern(paths) for name, paths in _known_paths().items()}


def _outputs() -> str:
    """Returns the pattern of o_proj in "all-linear", with linear attention and convolutions.

    They are in one rule, because a rule must match in every model.
    """
    mixers = dict.fromkeys(
        path
        for paths in _known_paths().values()
        for path in paths
        if path.partition("/")[0] not in ("attn", "ffn", "tail")
    )
    return _pattern(["attn/o_proj", *mixers])


# transformers' stacks of all experts of a layer; the slash in front keeps shared experts out.
_STACKS = {
    "gate_up_proj": "/ffn/(experts_ffn/)?(gate|up)_proj",
    "down_proj": "/ffn/(experts_ffn/)?down_proj",
}
_NAME = re.compile(r"[\w.]+")


def rules_of(values: Mapping[str, Any]) -> list[str]:
    """Returns rules ``PATTERN:RANK:ALPHA`` that target the same modules as the fields of a `LoraConfig`.

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
            raise NaloraError(where, expected="values by name", found=shown(values[where]))
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    ranks, alphas = (dict(values.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
    parameters = _names(listed(values.get("target_parameters")), "target_parameters")
    stacks = [_stack_path(name) for name in parameters]
    targets, excluded = values.get("target_modules"), values.get("exclude_modules")
    if targets is None and stacks:
        targets = []
    everything, targets = isinstance(targets, str), _target_names(targets)
    if isinstance(excluded, str):
        raise NaloraError("exclude_modules", expected="names", found=f"the expression {excluded!r}")
    out = {_path(name, "exclude_modules") for name in _names(excluded or [], "exclude_modules")}
    if everything and any("linear_attn/" in path for path in out):
        expected, actual = "no linear attention, next to all-linear", ", ".join(excluded or ())
        remedy = "list target_modules by name"
        raise NaloraError("exclude_modules", expected=expected, found=actual, remedy=remedy)
    plain = [name for name in targets if _path(name, "target_modules") not in out]
    within = ""
    if numbers := listed(values.get("layers_to_transform")):
        if not isinstance(numbers, Sequence) or not all(type(number) is int for number in numbers):
            raise NaloraError("layers_to_transform", expected="layer numbers", found=shown(numbers))
        within = f"layers/({'|'.join(map(str, numbers))})/"
    paths = {_path(name, "target_modules") for name in plain}
    rules = []
    # Of rules the first that matches counts, so longer names come before the names that they end with.
    for name in sorted(dict.fromkeys([*ranks, *alphas]), key=lambda name: -_bare(name).count(".")):
        path = _path(name, "rank_pattern, alpha_pattern")
        scales = _first_value(ranks, name, rank), _first_value(alphas, name, alpha)
        # PEFT ignores a pattern for a module that is not targeted.
        if _may_be_stack(name) and _without_layer(_stack_path(name)) in map(_without_layer, stacks):
            rules.append(_rule(_stack_path(name), *scales, ""))
        if _without_layer(path) in paths:
            rules.append(_rule(path, *scales, within))
    rules += [_rule(_path(name, "target_modules"), rank, alpha, within) for name in plain]
    # PEFT applies neither exclude_modules nor layers_to_transform to target_parameters.
    rules += [_rule(path, rank, alpha, "") for path in stacks]
    if everything:
        rules = [rule.replace(_modules()["o_proj"], _outputs()) for rule in rules]
    return list(dict.fromkeys(rules))


def _first_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first key that ``name`` ends with, as PEFT looks it up for a module."""
    dotted = f".{_bare(name)}"
    return next((value for key, value in pattern.items() if dotted.endswith(f".{_bare(key)}")), default)


def _target_names(targets: Sequence[str] | str | None) -> Sequence[str]:
    """Returns the names of ``target_modules``; of "all-linear", every projection's.

    Raises:
      NaloraError: no names, or a regular expression.
    """
    if targets is None:
        expected, remedy = "names of modules", "PEFT's default depends on the model: name them"
        raise NaloraError("target_modules", expected=expected, found="none", remedy=remedy)
    if not isinstance(targets, str):
        return _names(targets, "target_modules")
    if targets.lower() != "all-linear":
        expected, actual = 'names, or "all-linear"', f"the expression {targets!r}"
        remedy = "write it as --lora.rules: patterns are searched in paths such as layers/3/ffn/gate_proj"
        raise NaloraError("target_modules", expected=expected, found=actual, remedy=remedy)
    return tuple(_paths_of([BUILT_IN["llama"]]))  # the projections that every model of gated blocks has


def _names(value: Any, where: str) -> Sequence[str]:
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise NaloraError(where, expected="a list of names", found=shown(value))
    return value


def _rule(path: str, rank: Any, alpha: Any, within: str) -> str:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e38:
        raise NaloraError("lora_alpha or alpha_pattern", expected="a number", found=shown(alpha))
    pattern = path if path.startswith("layers/") else within + path
    return f"{pattern}:{rank}:{alpha:g}"


def _path(name: str, where: str) -> str:
    """Returns the pattern of a module: in every layer, or in the layer that its name contains."""
    bare = _bare(name)
    last = bare.rpartition(".")[2]
    if last in TABLES:
        raise NaloraError(
            where,
            expected="modules of a model's layers",
            found=f"{name!r}, which is trained as a whole here",
            remedy=f"leave it out, and add --lora.modules-to-save {last}",
        )
    if not _NAME.fullmatch(bare) or last not in _modules():
        expected, remedy = f"modules of {', '.join(_modules())}", "write it as --lora.rules by hand"
        raise NaloraError(where, expected=expected, found=repr(name), remedy=remedy)
    return _in_layer(bare, _modules()[last])


def _stack_path(name: str) -> str:
    """Returns the pattern of a stack of experts: in every layer, or in the layer that its name contains."""
    if not _may_be_stack(name):
        stacks = ", ".join(f"experts.{stack}" for stack in _STACKS)
        remedy = "name a Linear module in target_modules; routers and biases are not adapted here"
        raise NaloraError("target_parameters", expected=stacks, found=repr(name), remedy=remedy)
    bare = _bare(name)
    return _in_layer(bare, _STACKS[bare.rpartition(".")[2]])


def _in_layer(name: str, pattern: str) -> str:
    """Returns ``pattern`` for every layer, or for the layer that ``name`` contains."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return f"layers/{layer[1]}/{pattern.removeprefix('/')}" if layer else pattern


def _may_be_stack(name: str) -> bool:
    """Returns True for names that end like a stack of experts, and for a stack's bare name."""
    module, _, last = _bare(name).rpartition(".")
    return last in _STACKS and module.rpartition(".")[2] in ("", "experts")


def _bare(name: str) -> str:
    """Returns a name without the marks of an expression that PEFT itself writes for experts."""
    name = name.removeprefix("^").removesuffix("$")
    return name.removeprefix(r".*\.").replace(r"\.", ".")


def _without_layer(path: str) -> str:
    """Returns a pattern for every layer instead of one."""
    return re.sub(r"^layers/\d+", "", path).removeprefix("/")
