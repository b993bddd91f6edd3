"""Converts PEFT's `LoraConfig` to the settings of a run.

`PEFT` is the only list of the fields of `LoraConfig` and has all of them, so that none is dropped
silently; docs/from_peft.md shows the table. `rules_of` converts module names to ordered rules over
this library's projections.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError, shown
from nalora_jax.models.family import BUILT_IN, Family
from nalora_jax.models.targets import ROWS, TABLES

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

# Fields of AdaLoraConfig alone.
_ADALORA = (
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
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
    plain = {name: value for name, value in values.items() if name not in (*_ADALORA, "rank_pattern")}
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
        rules = [rule.replace(_modules()["o_proj"], _outputs()) for rule in rules]
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
    layer = re.search(r"layers\.(\d+)\.", bare)
    return f"layers/{layer[1]}/{_modules()[last]}" if layer else _modules()[last]


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
