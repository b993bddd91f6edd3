"""PEFT adapters on disk: writes a stacked tree as PEFT's files, reads such files, and verifies what
was written."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import (
    AdapterSpec,
    TargetSpec,
    adapter_scale,
    uniform_path,
)
from nalora_jax.weights.peft_config import (
    CONFIG_NAME,
    TENSORS_NAME,
    PeftConfig,
    read_peft_config,
)
from nalora_jax.weights.peft_modules import (
    ModuleAdapter,
    ModuleLayout,
    Place,
    alpha_for,
    compact,
    fold,
    fuse,
    layout_for,
    layout_of,
    module_layout,
    of_form,
    places_in,
    split_fused,
    tensor_keys,
    value_names,
)
from nalora_jax.weights.peft_tables import (
    PREFIX,
    TRAINED,
    read_trained,
    refuse_saved,
    table_modules,
    table_tensors,
    take_tables,
    token_settings,
    trained_tensors,
)
from nalora_jax.weights.shards import read_tensors, write_tensors
from nalora_jax.weights.tokenizer_files import FILES

if TYPE_CHECKING:
    from nalora_jax.weights.peft_modules import Host

__all__ = ["export_adapter", "import_adapter", "max_logit_difference", "verify_export"]

OWN_FILES = frozenset({CONFIG_NAME, TENSORS_NAME, TRAINED, "README.md", *FILES})
_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
# Folding a scale into B rounds every entry once, and so does reading it back.
_FOLD_TOLERANCE = 2.0**-21


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Entry:
    """The adapter of one place."""

    place: Place
    adapter: ModuleAdapter
    parameter: bool = False  # named in target_parameters


def export_adapter(
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: Host,
    folder: str | Path,
    *,
    base_model_name: str,
    target: Literal["peft", "vllm"] = "peft",
    max_lora_rank: int = 16,
    base_weights: str = "",
    fingerprint: str | None = None,
    rope_scaling: str = "",
    overwrite: bool = False,
    layout: ModuleLayout | None = None,
    write_extra: Callable[[Path], object] | None = None,
) -> Path:
    """Writes an adapter that PEFT (and, with ``target="vllm"``, vLLM) loads unmodified.

    Ranks are trimmed to each layer's rank. For PEFT, values that differ between layers or modules
    are written to rank_pattern and alpha_pattern. vLLM ignores these fields, so for vLLM ranks are
    zero-padded to the largest and scales are folded into B, under one r and alpha. Projections
    that the family fuses get one exact adapter of the fused module. Experts are written as PEFT's
    target_parameters for transformers 5, and expert by expert for vLLM, unless the family's own
    files stack them (gpt-oss), whose target_parameters vLLM reads. Parameters of a dual encoder
    that were trained as a whole are in a third file, which this library reads.

    Args:
      lora: stacked tree, e.g. ``layers/ffn/gate_proj/{a, b}``.
      spec: ranks, alphas and variant of every projection in ``lora``.
      config: the base model, or a dual encoder.
      folder: new or empty; the files appear in it together or not at all.
      base_model_name: hub id or path that other tools load as the base.
      target: the tool that must be able to load the files.
      max_lora_rank: vLLM's setting of that name.
      base_weights: name by which this library loads a copy of that model, if the adapter was
        trained on one; recorded in the file, from which `nalora_jax.train.located.base_of` reads
        it.
      fingerprint: of the base weights; recorded in the file, checked by `import_adapter`.
      rope_scaling: RoPE scaling of the base if it is not its files'; recorded in the file, from
        which `nalora_jax.train.adapted.load` reads it.
      overwrite: allow ``folder`` to contain an earlier adapter (its files, a README.md and a
        tokenizer's files), which is replaced.
      layout: module names, if they are not those of `layout_for` without a ``config.json``.
      write_extra: function that writes further files into the folder, such as a tokenizer with
        added tokens.

    Raises:
      NaloraError: the tool does not support a property of the adapter (the message names it); the
        folder has other content; or a write fails.
    """
    layout = layout or layout_for(target, config)
    for_vllm = target == "vllm"
    # Linear modules that PEFT adapts by their weight only, as parameters
    by_weight: set[str] = set()
    if for_vllm:
        _check_vllm(spec)
    else:
        # PEFT takes names of target_modules that end like an expert's modules in transformers 4 for
        # the experts, also if they name a dense layer or a shared expert.
        by_weight = {module.short for module in of_form(layout, "expert")}
    one_by_one = for_vllm and of_form(layout, "expert")
    layout = of_form(layout, "linear", "expert" if one_by_one else "stack")
    entries = list(_entries(lora, spec, config, layout, by_weight))
    if for_vllm:
        entries = _for_vllm(entries, config, layout, max_lora_rank)
    else:
        # PEFT applies rank_pattern to parameters too, but warns that the keys "were ignored": with
        # one rank and one scale no pattern is needed.
        parameters = [entry for entry in entries if entry.parameter]
        entries = [entry for entry in entries if not entry.parameter] + _even(
            parameters
        )
    settings = _settings(
        entries, config, layout, spec, rslora=spec.rslora and not for_vllm
    )
    settings["base_model_name_or_path"] = base_model_name
    if for_vllm:
        copies = value_names(config, layout)
        copied = [entry for entry in entries if entry.place.name in copies]
        entries += [
            replace(e, place=replace(e.place, name=copies[e.place.name]))
            for e in copied
        ]
    tensors = dict(_tensors(entries))
    if isinstance(config, ModelConfig):
        tensors |= table_tensors(lora, spec, config)
    facts = {
        "base_fingerprint": fingerprint,
        "rope_scaling": rope_scaling,
        "base": base_weights,
    }
    metadata = {"format": "pt"} | {
        f"nalora.{name}": value for name, value in facts.items() if value
    }
    with new_folder(folder, replaces=OWN_FILES, overwrite=overwrite) as scratch:
        write_json(scratch / CONFIG_NAME, settings)
        write_tensors(scratch / TENSORS_NAME, tensors, metadata)
        if not isinstance(config, ModelConfig) and config.trained:
            write_tensors(scratch / TRAINED, trained_tensors(lora, config), metadata)
        if write_extra is not None:
            write_extra(scratch)
    return Path(folder)


def layer_adapter(
    leaves: Mapping[str, Any], spec: AdapterSpec, path: str, layer: int
) -> ModuleAdapter | None:
    """Returns one layer's adapter of ``path`` without padding; None if the layer has none.

    Args:
      leaves: the flattened ``lora`` tree.
      spec: its spec.
      path: stacked path of the projection.
      layer: index on the stack.
    """
    target = spec.target(path)
    if target is None or target.ranks[layer] == 0:
        return None
    rank = target.ranks[layer]
    a, b = (
        np.asarray(leaves[f"{path}/{name}"][layer], np.float32) for name in ("a", "b")
    )
    magnitude = None
    if spec.dora:
        magnitude = np.asarray(leaves[f"{path}/magnitude"][layer], np.float32)
    scale = adapter_scale(target.alphas[layer], rank, rslora=spec.rslora)
    return ModuleAdapter(a[..., :rank], b[..., :rank, :], scale, magnitude)


def _entries(
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: Host,
    layout: ModuleLayout,
    by_weight: set[str],
) -> Iterator[Entry]:
    """Yields every adapted module, fused if the family fuses it.

    ``by_weight`` has short names of Linear modules that are named in target_parameters.
    """
    leaves = flatten(lora)
    paths = {path for module in layout for path in module.parts}
    for path, _ in spec.targets:
        if uniform_path(path) not in paths:
            expected = f"one of {', '.join(sorted(paths))}"
            raise NaloraError(f"adapter at {path}", expected=expected, found=path)

    @functools.cache
    def part(path: str, index: int) -> ModuleAdapter | None:
        return layer_adapter(leaves, spec, path, index)

    for place in places_in(config, layout):
        module = place.module
        expert = place.expert
        adapter = fuse(
            [part(*slot) for slot in place.slots],
            place.widths,
            alternates=module.alternates,
        )
        if adapter is None:
            continue
        if expert is not None:
            adapter = ModuleAdapter(adapter.a[expert], adapter.b[expert], adapter.scale)
        parameter = place.stacked or (
            module.form == "linear" and module.short in by_weight
        )
        if spec.dora and (adapter.magnitude is None or parameter):
            expected = "a Linear module (PEFT has no DoRA for experts)"
            actual = "experts"
            if not parameter:
                expected = "an adapter on every projection that the family fuses into this module, for its column norms"
                actual = "some without"
            raise NaloraError(
                f"DoRA at {place.name}",
                expected=expected,
                found=actual,
                remedy="merge the adapter instead",
            )
        yield Entry(place, adapter, parameter)


def _even(entries: list[Entry]) -> list[Entry]:
    """Returns the same adapters with one rank and one scale."""
    if not entries:
        return []
    rank = max(entry.adapter.rank for entry in entries)
    scale = _most_common(entry.adapter.scale for entry in entries)
    return [
        replace(entry, adapter=fold(entry.adapter, rank, scale)) for entry in entries
    ]


def _most_common(values: Iterable[Any]) -> Any:
    """Returns the most frequent value; the first of them if several are equally frequent."""
    return Counter(values).most_common(1)[0][0]


def _check_vllm(spec: AdapterSpec) -> None:
    remedy = "vLLM takes no modules_to_save and no trainable_token_indices: merge it into the base instead"
    refuse_saved(spec, "--for vllm", remedy)
    rule = "no DoRA (vLLM's rule: use_dora is refused)"
    actual = "a DoRA adapter"
    if not spec.dora:
        other = [path for path, _ in spec.targets if not path.startswith("layers/")]
        if not other:
            return
        rule = "adapters of the language model alone (vLLM's rule)"
        actual = f"one at {other[0]}"
    raise NaloraError(
        "--for vllm",
        expected=rule,
        found=actual,
        remedy="merge it into the base instead",
    )


def _for_vllm(
    entries: list[Entry], config: Host, layout: ModuleLayout, limit: int
) -> list[Entry]:
    """Returns the adapters with one rank and scale, on every layer of each adapted module."""
    even = {entry.place.name: entry for entry in _even(entries)}
    rank, scale = next(
        (entry.adapter.rank, entry.adapter.scale) for entry in even.values()
    )
    if rank > limit:
        expected = f"at most {limit} (vLLM's rule: max_lora_rank)"
        remedy = f"start vLLM with --max-lora-rank {rank} or more and export with the same max_lora_rank"
        raise NaloraError(
            "--for vllm: rank", expected=expected, found=rank, remedy=remedy
        )
    adapted = {entry.place.module for entry in entries}
    shorts = {module.short for module in adapted if module.form != "stack"}
    adapted |= {
        module for module in of_form(layout, "linear") if module.short in shorts
    }
    # vLLM requires all three projections of the experts or none, and all stacks of experts or none.
    if of_form(tuple(adapted), "expert", "stack"):
        adapted |= set(of_form(layout, "expert", "stack"))

    def zeros(place: Place) -> ModuleAdapter:
        *lead, d_in, d_out = place.shape[0 if place.stacked else -2 :]
        a = np.zeros((*lead, d_in, rank), np.float32)
        b = np.zeros((*lead, rank, d_out), np.float32)
        return ModuleAdapter(a, b, scale)

    return [
        even.get(place.name) or Entry(place, zeros(place), place.stacked)
        for place in places_in(config, layout)
        if place.module in adapted
    ]


def _tensors(entries: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the array of each tensor."""
    keys = tensor_keys(entry.place for entry in entries)
    for entry in entries:
        key = keys[entry.place.name]
        a = entry.adapter.a.T
        b = entry.adapter.b.T
        if entry.place.stacked:
            # [experts, d_in, r] -> [experts * r, d_in]; [experts, r, d_out] -> [d_out, r * experts]
            a = entry.adapter.a.transpose(0, 2, 1).reshape(-1, entry.adapter.a.shape[1])
            b = entry.adapter.b.transpose(2, 1, 0).reshape(entry.adapter.b.shape[2], -1)
        yield f"{PREFIX}{key}.lora_A.weight", np.ascontiguousarray(a)
        yield f"{PREFIX}{key}.lora_B.weight", np.ascontiguousarray(b)
        if entry.adapter.magnitude is not None:
            yield (
                f"{PREFIX}{key}.lora_magnitude_vector",
                np.ascontiguousarray(entry.adapter.magnitude),
            )


def _settings(
    entries: list[Entry],
    config: Host,
    layout: ModuleLayout,
    spec: AdapterSpec,
    *,
    rslora: bool,
) -> dict[str, Any]:
    """Returns ``adapter_config.json`` without the base model's name."""
    dropout = spec.dropout
    if any(entry.parameter or entry.place.expert is not None for entry in entries):
        dropout = (
            0.0  # it acts in training only, and PEFT refuses to load it for experts
        )
    alphas = [
        alpha_for(entry.adapter.scale, entry.adapter.rank, rslora=rslora)
        for entry in entries
    ]
    rank, rank_pattern = _pattern([entry.adapter.rank for entry in entries], entries)
    alpha, alpha_pattern = _pattern(
        [int(a) if a.is_integer() else a for a in alphas], entries
    )
    settings = {
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(spec.saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(entries, config, layout),
        "task_type": "CAUSAL_LM" if isinstance(config, ModelConfig) else None,
        "use_dora": spec.dora,
        "use_rslora": rslora,
    }
    if any(entry.parameter for entry in entries):
        adapted = [
            _parameter_names(entry.place) for entry in entries if entry.parameter
        ]
        existing = map(
            _parameter_names, places_in(config, of_form(layout, "linear", "stack"))
        )
        settings["target_parameters"] = _shortened(adapted, existing)
    return settings | token_settings(spec)


def _pattern(values: list[Any], entries: list[Entry]) -> tuple[Any, dict[str, Any]]:
    """Returns a default value and a pattern for the modules with another value.

    The default is the parameters' most frequent value, otherwise the most frequent of all. Keys
    are ``mlp.up_proj`` if all layers agree, full names otherwise.

    Args:
      values: of each entry.
      entries: the adapters.
    """
    pairs = list(zip(entries, values, strict=True))
    usual = _most_common([value for entry, value in pairs if entry.parameter] or values)
    of_modules: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for entry, value in pairs:
        of_modules[entry.place.module.in_layer][entry.place.name] = value
    pattern: dict[str, Any] = {}
    for module, members in of_modules.items():
        if len(set(members.values())) == 1 and "{layer}" not in module:
            members = {module: next(iter(members.values()))}
        pattern |= {name: value for name, value in members.items() if value != usual}
    return usual, dict(sorted(pattern.items()))


def _target_modules(
    entries: list[Entry], config: Host, layout: ModuleLayout
) -> list[str]:
    """Returns short names of modules that are adapted in all layers, full names of the others."""
    names = [entry.place.name for entry in entries if not entry.parameter]
    # A vision tower has modules with the same short names as a decoder or a text tower.
    if not isinstance(config, ModelConfig) or config.sight is not None:
        return sorted(names)
    # A short name would target the experts too, which a file of their stacks does not hold one by
    # one.
    experts = of_form(layout, "expert") or of_form(module_layout(config), "expert")
    existing = [
        place.name for place in places_in(config, of_form(layout, "linear") + experts)
    ]
    return _shortened(
        *([(name.rpartition(".")[2], name) for name in of] for of in (names, existing))
    )


def _parameter_names(place: Place) -> tuple[str, str]:
    """Returns a parameter's name within the layer, and its full name."""
    weight = "" if place.stacked else ".weight"
    return place.module.in_layer + weight, place.name + weight


def _shortened(
    adapted: Iterable[tuple[str, str]], existing: Iterable[tuple[str, str]]
) -> list[str]:
    """Returns short names whose full names are all adapted, full names of the others; pairs are
    (short, full)."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    complete: defaultdict[str, set[str]] = defaultdict(set)
    for pairs, names in ((adapted, groups), (existing, complete)):
        for short, full in pairs:
            names[short].add(full)
    return sorted(
        name
        for short, names in groups.items()
        for name in ({short} if names >= complete[short] else names)
    )


# ---------------------------------------------------------------- reading


def import_adapter(
    folder: str | Path, config: Host, *, fingerprint: str | None = None
) -> tuple[dict[str, Any], AdapterSpec]:
    """Reads a PEFT LoRA adapter as this library's ``lora`` tree.

    Supports rank_pattern, alpha_pattern, rsLoRA, DoRA, target lists, regular expressions and
    "all-linear" (matched exactly as in PEFT), target_parameters, layers_to_transform,
    exclude_modules, modules_to_save, trainable_token_indices, fused projections, mixtures of
    experts and multimodal models as PEFT writes them for transformers 4 and 5, and float32, float16
    and bfloat16 files. Every tensor is consumed and every targeted module must have its tensors, so
    no part of an adapter is dropped silently.

    Args:
      folder: contains ``adapter_config.json`` and ``adapter_model.safetensors``; may be in a
        bucket.
      config: the base model, or a dual encoder.
      fingerprint: of the base model's weights; compared with the fingerprint recorded by
        `export_adapter`, if any.

    Returns:
      ``(lora, spec)``: nested dict of float32 numpy arrays, stacked and zero-padded to the largest
      rank of each projection, and the spec that describes them.

    Raises:
      NaloraError: anything missing, unknown, misshapen or unsupported; the message names the field
        or tensor.
    """
    folder = buckets.local_path(folder)
    path = folder / TENSORS_NAME
    peft = read_peft_config(folder)
    _check_exists(path)
    tensors, metadata = read_tensors(path)
    noted = metadata.get("nalora.base_fingerprint")
    if noted and fingerprint and noted != fingerprint:
        raise NaloraError(
            str(path),
            expected=f"an adapter of the base model {fingerprint}",
            found=f"one of the base model {noted}",
            remedy="load exactly the weights that the adapter was trained on (named in adapter_config.json); the same "
            "model in another precision is another base",
        )
    trained = AdapterSpec()
    if not isinstance(config, ModelConfig):
        if named := peft.modules_to_save or peft.token_indices:
            if peft.modules_to_save:
                field = "modules_to_save"
            else:
                field = "trainable_token_indices"
            expected = "null for image and text encoders"
            actual = ", ".join(map(str, named))
            raise NaloraError(f"{peft.where}: {field}", expected=expected, found=actual)
        tables = read_trained(folder, config)
    else:
        for key in tensors:
            if key.startswith(
                tuple(f"{module}.lora_" for module in table_modules(config).values())
            ):
                remedy = "train the table with modules_to_save, or merge the adapter in PEFT (merge_and_unload)"
                expected = "adapters of a model's layers"
                actual = "an adapter of the embedding or the head"
                raise NaloraError(
                    f"{path}: {key}", expected=expected, found=actual, remedy=remedy
                )
        tables, trained = take_tables(config, tensors, peft, str(path))
    modules = _by_module(tensors, path, dora=peft.dora)
    layout = layout_of(config, modules)
    for name, copy in value_names(config, layout).items():
        if (
            name in modules
            and copy in modules
            and all(map(np.array_equal, modules[name], modules[copy]))
        ):
            del modules[copy]
    slots = _slots(layout, config, peft)
    _check_complete(peft, path, slots, modules)
    adapters = _by_projection(
        config, peft, path, [(slots[key], modules[key]) for key in modules]
    )
    leaves, spec = _stacked(config, peft, adapters)
    spec = replace(spec, saved=trained.saved, token_indices=trained.token_indices)
    return unflatten(leaves | tables), spec


def _check_exists(path: Path) -> None:
    """Raises an error if an adapter has no safetensors file, and names a pickle in its place."""
    if path.is_file():
        return
    actual = "no such file"
    remedy = ""
    for name in ("adapter_model.pt", "adapter_model.bin"):
        if path.with_name(name).exists():
            actual = f"only {name}, a pickle, which can run code when it is read"
            remedy = "save it again with safe_serialization=True"
    raise NaloraError(
        str(path), expected="the adapter's tensors", found=actual, remedy=remedy
    )


# Tensors of a module in the order of their names: A, B and, with DoRA, the magnitude.
Factors = list[np.ndarray]


def _by_module(
    tensors: Mapping[str, np.ndarray], path: Path, *, dora: bool
) -> dict[str, Factors]:
    """Groups tensors by module: ``{"model.layers.0.mlp.up_proj": [A, B]}``."""
    kinds = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * dora
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        kind = match[2].removesuffix(".weight") if match else ""
        if match is None or kind not in kinds:
            raise NaloraError(
                f"{path}: {key}",
                expected="keys such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                found="a tensor that no LoRA module reads"
                if key.startswith(PREFIX)
                else "another prefix",
                remedy="PEFT would ignore it silently; save the adapter with PEFT's save_pretrained",
            )
        modules.setdefault(match[1], {})[kind] = tensor
    for module, parts in modules.items():
        missing = [kind for kind in kinds if kind not in parts]
        if missing:
            raise NaloraError(
                f"{path}: {module}", expected=" and ".join(missing), found="nothing"
            )
    return {
        module: [parts[kind] for kind in kinds] for module, parts in modules.items()
    }


@dataclass(frozen=True)
class Slot:
    """A possible location of tensors: a Linear module, an expert, or a stack of experts."""

    key: str  # module name in the tensors' keys
    place: Place  # patterns are matched with its name
    targeted: bool
    rank: int
    alpha: float


def _slots(layout: ModuleLayout, config: Host, peft: PeftConfig) -> dict[str, Slot]:
    """Returns the possible locations by key; of stacks, the targeted ones."""
    places = list(places_in(config, layout))
    linear = [place.name for place in places if not place.stacked]
    stacks = [place.name for place in places if place.stacked]
    modules = peft.targeted_modules(linear)
    parameters = peft.targeted_parameters(
        [*stacks, *(f"{name}.weight" for name in linear)]
    )
    places = [
        place for place in places if not place.stacked or place.name in parameters
    ]
    slots = {}
    for key, place in zip(tensor_keys(places).values(), places, strict=True):
        # An adapter on a Linear module's weight computes the same as an adapter on the module.
        weight = f"{place.name}.weight"
        name = weight if weight in parameters else place.name
        targeted = name in modules or name in parameters
        slots[key] = Slot(key, place, targeted, peft.rank_of(name), peft.alpha_of(name))
    return slots


def _check_complete(
    peft: PeftConfig,
    path: Path,
    slots: Mapping[str, Slot],
    modules: Mapping[str, Factors],
) -> None:
    """Checks that the file's modules and the targeted modules are the same."""
    for key in modules:
        if key not in slots:
            patterns = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in slots})
            raise NaloraError(
                f"{path}: {PREFIX}{key}",
                expected="a module of this model that takes adapters",
                found="an unknown module",
                remedy="is it an adapter of another architecture or prefix? These exist: "
                + ", ".join(patterns),
            )
        if not slots[key].targeted:
            raise NaloraError(
                f"{peft.where}: target_modules",
                expected=f"to cover {key}, which has tensors in {path.name}",
                found=str(peft.target_modules)[:200],
                remedy="PEFT would drop these tensors silently; add the module to the list",
            )
    missing = [
        slot.place.name
        for slot in slots.values()
        if slot.targeted and slot.key not in modules
    ]
    if missing or not modules:
        where = "tensors"
        actual = "none, and no module that target_modules matches"
        if missing:
            where = missing[0]
            actual = f"{len(missing)} modules without"
        expected = "lora_A and lora_B of every module that target_modules names"
        remedy = "the file is incomplete, or the adapter belongs to another model"
        raise NaloraError(
            f"{path}: {where}", expected=expected, found=actual, remedy=remedy
        )


def _by_projection(
    config: Host, peft: PeftConfig, path: Path, filled: list[tuple[Slot, Factors]]
) -> dict[str, dict[int, ModuleAdapter]]:
    """Returns adapters by stacked path and layer."""
    adapters: defaultdict[str, dict[int, ModuleAdapter]] = defaultdict(dict)
    experts: defaultdict[tuple[int, str, int], dict[int, ModuleAdapter]] = defaultdict(
        dict
    )
    for slot, factors in filled:
        place = slot.place
        adapter = _adapter_of(peft, path, slot, factors)
        if place.expert is not None:
            experts[place.layer, *place.slots[0]][place.expert] = adapter
            continue
        split = split_fused(adapter, place.widths, alternates=place.module.alternates)
        for (stacked, index), part in zip(place.slots, split, strict=True):
            if part is not None:
                adapters[stacked][index] = part
    for (layer, stacked, index), members in experts.items():
        count = projection_shapes(config)[stacked][0]
        if len(members) != count:
            expected = f"adapters on all {count}"
            actual = len(members)
            raise NaloraError(
                f"{path}: experts of layer {layer}", expected=expected, found=actual
            )
        # Ranks are padded, and scales folded relative to the first expert's.
        rank = max(member.rank for member in members.values())
        scale = members[0].scale
        padded = [fold(members[expert], rank, scale) for expert in range(count)]
        a = np.stack([member.a for member in padded])
        b = np.stack([member.b for member in padded])
        adapters[stacked][index] = ModuleAdapter(a, b, scale)
    return adapters


def _adapter_of(
    peft: PeftConfig, path: Path, slot: Slot, factors: Factors
) -> ModuleAdapter:
    """Checks one slot's tensors and converts them to this library's layout."""
    shape = slot.place.shape
    rank = slot.rank
    stacked = slot.place.stacked
    d_in, d_out = shape[-2:]
    count = shape[0] if stacked else 1
    kinds = {
        "a": (count * rank, d_in),
        "b": (d_out, count * rank),
        "magnitude": (d_out,),
    }
    for tensor, (kind, size) in zip(factors, kinds.items(), strict=False):
        if tensor.shape != size:
            raise NaloraError(
                f"{path}: {slot.key} ({kind})",
                expected=f"shape {size} (rank {rank}, {d_in} -> {d_out})",
                found=f"shape {tensor.shape}",
                remedy="the adapter belongs to another base model, or r in adapter_config.json is wrong",
            )
    if peft.dora and len(shape) > 2:
        expected = "false for experts (PEFT has no such adapter)"
        raise NaloraError(f"{peft.where}: use_dora", expected=expected, found="true")
    a = factors[0].T
    b = factors[1].T
    # A is [experts * r, d_in], expert-major; B is [d_out, r * experts], rank-major
    if stacked:
        a = factors[0].reshape(count, rank, d_in).transpose(0, 2, 1)
        b = factors[1].reshape(d_out, rank, count).transpose(2, 1, 0)
    scale = adapter_scale(slot.alpha, rank, rslora=peft.rslora)
    adapter = ModuleAdapter(a, b, scale, factors[2] if peft.dora else None)
    # PEFT pads the ranks of stacks; a fresh adapter (B = 0) keeps its rank
    if stacked and b.any():
        return compact(adapter)
    return adapter


def _stacked(
    config: Host, peft: PeftConfig, adapters: Mapping[str, Mapping[int, ModuleAdapter]]
) -> tuple[dict[str, np.ndarray], AdapterSpec]:
    """Stacks adapters over layers with zero-padding; returns leaves by path and their spec."""
    shapes = projection_shapes(config)
    numbers = depths(config)
    leaves: dict[str, np.ndarray] = {}
    targets = []
    for path, layers in sorted(adapters.items()):
        *lead, d_in, d_out = shapes[path]
        n = numbers[path]
        rank = max(adapter.rank for adapter in layers.values())
        a = leaves[f"{path}/a"] = np.zeros((n, *lead, d_in, rank), np.float32)
        b = leaves[f"{path}/b"] = np.zeros((n, *lead, rank, d_out), np.float32)
        if peft.dora:  # layers without an adapter do not read theirs
            leaves[f"{path}/magnitude"] = np.ones((n, d_out), np.float32)
        ranks = [0] * n
        alphas = [1.0] * n
        for i, adapter in layers.items():
            ranks[i] = adapter.rank
            alphas[i] = alpha_for(adapter.scale, adapter.rank, rslora=peft.rslora)
            a[i, ..., : adapter.rank], b[i, ..., : adapter.rank, :] = (
                adapter.a,
                adapter.b,
            )
            if adapter.magnitude is not None:
                leaves[f"{path}/magnitude"][i] = adapter.magnitude
        targets.append((path, TargetSpec(tuple(ranks), tuple(alphas))))
    return leaves, AdapterSpec(
        tuple(targets), rslora=peft.rslora, dora=peft.dora, dropout=peft.dropout
    )


# ---------------------------------------------------------------- verification


def verify_export(
    folder: str | Path,
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: Host,
    *,
    fingerprint: str | None = None,
) -> float:
    """Reads an exported adapter back and compares it with the original tree, factor by factor.

    A must be equal bit for bit, and so must B, the scale and the magnitude unless a scale was
    folded into B; then ``scale * B`` must agree to float32's rounding. Padding and ranks without
    effect are ignored.

    Returns:
      The largest relative difference of ``scale * B`` over all layers; 0.0 if no scale was folded.

    Raises:
      NaloraError: the file cannot be read, or differs; the message names the projection and the
        layer.
    """
    loaded, loaded_spec = import_adapter(folder, config, fingerprint=fingerprint)
    ours = flatten(lora)
    theirs = flatten(loaded)
    worst = 0.0
    if loaded_spec.token_indices != spec.token_indices:
        raise differs(f"{folder}: trainable_token_indices")
    whole = {
        path
        for path in (*ours, *theirs)
        if path.rpartition("/")[2] not in ("a", "b", "magnitude")
    }
    for path in sorted(whole):
        trained, read = (
            np.asarray(leaves.get(path, 0.0), np.float32) for leaves in (ours, theirs)
        )
        if not np.array_equal(trained, read):
            raise differs(f"{folder}: {path}")
    for path in sorted({path for path, _ in (*spec.targets, *loaded_spec.targets)}):
        for layer in range(depths(config)[path]):
            meant = layer_adapter(ours, spec, path, layer)
            difference = _difference(
                meant, layer_adapter(theirs, loaded_spec, path, layer)
            )
            if difference > _FOLD_TOLERANCE:
                raise differs(f"{folder}: {path}, layer {layer}")
            worst = max(worst, difference)
    return worst


def differs(where: str) -> NaloraError:
    """Returns the error for a file that differs from the exported adapter."""
    return NaloraError(
        where,
        expected="the adapter that was exported",
        found="another one on reading it back",
        remedy="do not use these files; please report this as a bug, with the adapter's configuration",
    )


def _difference(first: ModuleAdapter | None, second: ModuleAdapter | None) -> float:
    """Returns the relative difference of ``scale * B``, infinity if anything else that has an
    effect differs."""
    both = [compact(adapter) for adapter in (first, second) if adapter is not None]
    live = [
        adapter for adapter in both if adapter.rank or adapter.magnitude is not None
    ]
    if len(live) < 2:
        return np.inf if live else 0.0
    a, b = live
    ours, theirs = (
        np.zeros(0) if adapter.magnitude is None else adapter.magnitude
        for adapter in live
    )
    if (
        a.b.shape != b.b.shape
        or not np.array_equal(a.a, b.a)
        or not np.array_equal(ours, theirs)
    ):
        return np.inf
    if a.scale == b.scale and np.array_equal(a.b, b.b):
        return 0.0
    expected, found = (adapter.scale * adapter.b.astype(np.float64) for adapter in live)
    relative = np.abs(expected - found) / np.maximum(
        np.abs(expected), np.finfo(np.float32).tiny
    )
    return float(np.max(relative, initial=0.0))


def max_logit_difference(
    first: Callable[[Any], Any], second: Callable[[Any], Any], tokens: Any
) -> float:
    """Returns the largest difference of two models' logits, relative to the largest logit.

    Args:
      first: tokens -> logits ``[..., vocab]``, e.g. the base with the trained adapter.
      second: the same for the written model: the imported adapter, or the merged weights.
      tokens: input of both models, e.g. int32 ``[batch, seq]``.
    """
    a, b = (np.asarray(model(tokens), np.float64) for model in (first, second))
    return float(
        np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), np.finfo(np.float32).tiny)
    )
