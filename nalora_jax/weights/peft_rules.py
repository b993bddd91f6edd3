"""Converts module names in PEFT's settings to ordered rules over this library's projections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nalora_jax.errors import NaloraError, shown
from nalora_jax.models.families import BUILT_IN
from nalora_jax.models.families.record import Family
from nalora_jax.models.targets import TABLES

_PATH = re.compile(r"layers/(\w+)/(?:\w+/)?(\w*_proj\w*)/kernel")


def _paths_of(families: Iterable[Family]) -> dict[str, list[str]]:
    """Returns the paths of every projection by transformers' name of its module.

    Example: ``{"q_proj": ["attn/q_proj"], "qkv_proj": ["attn/q_proj", "attn/k_proj", "attn/v_proj"], ...}``
    """
    paths: dict[str, list[str]] = {}
    for row in (row for family in families for row in family.tensors):
        name = row.name.removesuffix(".weight").rpartition(".")[2]
        for match in filter(None, map(_PATH.fullmatch, row.paths)):
            path = f"{match[1]}/{match[2]}"  # also matches parts of a part: ffn/experts_ffn/gate_proj
            if path not in paths.setdefault(name, []):
                paths[name].append(path)
    return paths


def _pattern(paths: Sequence[str]) -> str:
    """Returns an expression that is found in these paths only."""
    longer = {path for others in _PATHS.values() for path in others}
    exact = [path + "$" * any(p != path and p.startswith(path) for p in longer) for path in paths]
    if len(exact) == 1:
        return exact[0]
    return f"({'|'.join(exact)})"


_PATHS = _paths_of(BUILT_IN.values())
# transformers' name of each projection, and its pattern in the paths that rules are searched in.
MODULES = {name: _pattern(paths) for name, paths in _PATHS.items()}
# The projections that every model of gated blocks has.
_COMMON = tuple(_paths_of([BUILT_IN["llama"]]))
# "all-linear" has linear attention and convolutions in the rule of o_proj, because a rule must match in
# every model.
_MIXERS = dict.fromkeys(
    path
    for paths in _PATHS.values()
    for path in paths
    if path.partition("/")[0] not in ("attn", "ffn", "tail")
)
_OUTPUTS = _pattern(["attn/o_proj", *_MIXERS])
# transformers' stacks of all experts of a layer; the slash in front keeps shared experts out.
_STACKS = {
    "gate_up_proj": "/ffn/(experts_ffn/)?(gate|up)_proj",
    "down_proj": "/ffn/(experts_ffn/)?down_proj",
}
_NAME = re.compile(r"[\w.]+")


def rules_of(
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str | None,
    excluded: Sequence[str] | str | None = None,
    layers: Sequence[int] | int | None = None,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    parameters: Sequence[str] | None = None,
) -> list[str]:
    """Returns rules ``PATTERN:RANK:ALPHA`` that target the same modules as PEFT's settings.

    Example:
      >>> rules_of(rank=8, alpha=16, targets=["q_proj", "v_proj"], ranks={"v_proj": 4})
      ['attn/v_proj:4:16', 'attn/q_proj:8:16', 'attn/v_proj:8:16']
      >>> rules_of(rank=8, alpha=16, targets=None, parameters=["mlp.experts.down_proj"])
      ['/ffn/(experts_ffn/)?down_proj:8:16']

    Raises:
      NaloraError: a regular expression, a name that no supported model has, no names at all, or a
        value of another type.
    """
    for where, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, Mapping | None):
            raise NaloraError(where, expected="values by name", found=shown(pattern))
    ranks, alphas = dict(ranks or {}), dict(alphas or {})
    stacks = [_stack_path(name) for name in _names(listed(parameters), "target_parameters")]
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
    if numbers := listed(layers):
        if not isinstance(numbers, Sequence) or not all(type(number) is int for number in numbers):
            raise NaloraError("layers_to_transform", expected="layer numbers", found=shown(layers))
        within = f"layers/({'|'.join(map(str, numbers))})/"
    paths = {_path(name, "target_modules") for name in plain}
    rules = []
    for name in dict.fromkeys([*ranks, *alphas]):
        path = _path(name, "rank_pattern, alpha_pattern")
        values = (ranks.get(name, rank), alphas.get(name, alpha))
        # PEFT ignores a pattern for a module that is not targeted.
        if _may_be_stack(name) and _without_layer(_stack_path(name)) in map(_without_layer, stacks):
            rules.append(_rule(_stack_path(name), *values, ""))
        if _without_layer(path) in paths:
            rules.append(_rule(path, *values, within))
    rules += [_rule(_path(name, "target_modules"), rank, alpha, within) for name in plain]
    # PEFT applies neither exclude_modules nor layers_to_transform to target_parameters.
    rules += [_rule(path, rank, alpha, "") for path in stacks]
    if everything:
        rules = [rule.replace(MODULES["o_proj"], _OUTPUTS) for rule in rules]
    return list(dict.fromkeys(rules))


def listed(value: Any) -> Any:
    """Returns a setting as a list: an empty one for None, one item for a name or a number."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    return value


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
    return _COMMON


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
    if not _NAME.fullmatch(bare) or last not in MODULES:
        expected, remedy = f"modules of {', '.join(MODULES)}", "write it as --lora.rules by hand"
        raise NaloraError(where, expected=expected, found=repr(name), remedy=remedy)
    layer = re.search(r"layers\.(\d+)\.", bare)
    return f"layers/{layer[1]}/{MODULES[last]}" if layer else MODULES[last]


def _stack_path(name: str) -> str:
    """Returns the pattern of a stack of experts: in every layer, or in the layer that its name contains."""
    if not _may_be_stack(name):
        stacks = ", ".join(f"experts.{stack}" for stack in _STACKS)
        remedy = "name a Linear module in target_modules; routers and biases are not adapted here"
        raise NaloraError("target_parameters", expected=stacks, found=repr(name), remedy=remedy)
    bare = _bare(name)
    layer = re.search(r"layers\.(\d+)\.", bare)
    path = _STACKS[bare.rpartition(".")[2]]
    return f"layers/{layer[1]}{path}" if layer else path


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
