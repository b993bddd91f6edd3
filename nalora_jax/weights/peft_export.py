"""Writes a stacked tree as PEFT's adapter files, and verifies what was written."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.common.trees import flatten
from nalora_jax.data.labels import LABELS_FILE
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import family_of
from nalora_jax.models.stacks import depths
from nalora_jax.models.targets import (
    AdapterSpec,
    adapter_scale,
    uniform_path,
)
from nalora_jax.weights.peft_config import (
    CONFIG_NAME,
    TENSORS_NAME,
)
from nalora_jax.weights.peft_modules import (
    ModuleAdapter,
    ModuleLayout,
    PeftForm,
    Place,
    alpha_for,
    compact,
    fold,
    fuse,
    layout_for,
    module_layout,
    modules_of_form,
    places_in,
    tensor_keys,
    value_names,
)
from nalora_jax.weights.peft_tables import (
    PREFIX,
    TRAINED,
    refuse_saved,
    saved_modules,
    table_tensors,
    token_settings,
    trained_tensors,
)
from nalora_jax.weights.shards import write_tensors
from nalora_jax.weights.tokenizer_files import TEXT_FILES

if TYPE_CHECKING:
    from nalora_jax.weights.peft_modules import Host

from nalora_jax.weights.embedding_files import EMBEDDING_FILES
from nalora_jax.weights.peft_import import import_adapter

__all__ = ["export_adapter", "max_logit_difference", "verify_export"]

OWN_FILES = frozenset(
    {
        CONFIG_NAME,
        TENSORS_NAME,
        TRAINED,
        LABELS_FILE,
        "README.md",
        *TEXT_FILES,
        *EMBEDDING_FILES,
    }
)
# Largest relative difference of a folded B: folding a scale into B rounds every entry once, and so
# does reading it back.
_FOLD_TOLERANCE = 2.0**-21


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
    target: Literal["peft", "embedding", "vllm"] = "peft",
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
      target: the tool that must be able to load the files; "embedding": PEFT with transformers'
        AutoModel, and sentence-transformers.
      max_lora_rank: vLLM's setting of that name.
      base_weights: name by which this library loads a copy of that model, if the adapter was
        trained on one; recorded in the file, from which `nalora_jax.loading.located.base_of` reads
        it.
      fingerprint: of the base weights; recorded in the file, checked by `import_adapter`.
      rope_scaling: RoPE scaling of the base if it is not its files'; recorded in the file, from
        which `nalora_jax.loading.adapted.load` reads it.
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
        _check_vllm(spec, config)
    else:
        # PEFT treats names of target_modules that end like an expert's modules in transformers 4 as
        # the experts, also if they name a dense layer or a shared expert.
        by_weight = {module.short for module in modules_of_form(layout, "expert")}
    experts: PeftForm = "stack"
    if for_vllm and modules_of_form(layout, "expert"):
        experts = "expert"
    layout = modules_of_form(layout, "linear", experts)
    entries = list(_entries(lora, spec, config, layout, by_weight))
    if for_vllm:
        entries = _adapt_to_vllm(entries, config, layout, max_lora_rank)
    else:
        # PEFT applies rank_pattern to parameters too, but warns that the keys "were ignored": with
        # one rank and one scale no pattern is needed.
        modules = [entry for entry in entries if not entry.parameter]
        entries = modules + _equalize([entry for entry in entries if entry.parameter])
    rslora = spec.rslora and not for_vllm
    settings = _settings(entries, config, layout, spec, rslora=rslora)
    if target == "embedding":
        settings["task_type"] = "FEATURE_EXTRACTION"
    settings["base_model_name_or_path"] = base_model_name
    if for_vllm:
        copies = value_names(config, layout)
        for entry in [entry for entry in entries if entry.place.name in copies]:
            place = replace(entry.place, name=copies[entry.place.name])
            entries.append(replace(entry, place=place))
    tensors = dict(_tensors(entries))
    if isinstance(config, ModelConfig):
        tensors |= table_tensors(lora, spec, config)
    facts = {
        "base_fingerprint": fingerprint,
        "rope_scaling": rope_scaling,
        "base": base_weights,
    }
    metadata = {"format": "pt"}
    for name, value in facts.items():
        if value:
            metadata[f"nalora.{name}"] = value
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
    a = np.asarray(leaves[f"{path}/a"][layer], np.float32)
    b = np.asarray(leaves[f"{path}/b"][layer], np.float32)
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
    paths: set[str] = set()
    for module in layout:
        paths.update(module.parts)
    for path, _ in spec.targets:
        if uniform_path(path) not in paths:
            raise NaloraError(
                f"adapter at {path}",
                expected=f"one of {', '.join(sorted(paths))}",
                found=path,
            )

    @functools.cache
    def part(path: str, index: int) -> ModuleAdapter | None:
        """Returns the adapter of one layer of a stacked path; all experts of a layer read the same
        one."""
        return layer_adapter(leaves, spec, path, index)

    for place in places_in(config, layout):
        module = place.module
        expert = place.expert
        parts = [part(*slot) for slot in place.slots]
        adapter = fuse(parts, place.widths, alternates=module.alternates)
        if adapter is None:
            continue
        if expert is not None:
            adapter = ModuleAdapter(adapter.a[expert], adapter.b[expert], adapter.scale)
        named_by_weight = module.form == "linear" and module.short in by_weight
        parameter = place.stacked or named_by_weight
        # `fuse` returns no magnitude if one of the fused projections has no adapter.
        if spec.dora and (adapter.magnitude is None or parameter):
            expected = "a Linear module (PEFT has no DoRA for experts)"
            actual = "experts"
            if not parameter:
                expected = (
                    "an adapter on every projection that the family fuses into this "
                    "module, for its column norms"
                )
                actual = "some without"
            raise NaloraError(
                f"DoRA at {place.name}",
                expected=expected,
                found=actual,
                remedy="merge the adapter instead",
            )
        yield Entry(place, adapter, parameter)


def _equalize(entries: list[Entry]) -> list[Entry]:
    """Returns adapters of the same effect that all have the largest rank and the most frequent
    scale.

    Ranks are padded with zeros, and other scales are folded into B.
    """
    if not entries:
        return []
    rank = max(entry.adapter.rank for entry in entries)
    scale = _most_common(entry.adapter.scale for entry in entries)
    return [
        replace(entry, adapter=fold(entry.adapter, rank, scale)) for entry in entries
    ]


def _most_common(values: Iterable[Any]) -> Any:
    """Returns the most frequent value; the first of them if several are equally frequent."""
    ((value, _),) = Counter(values).most_common(1)
    return value


def _check_vllm(spec: AdapterSpec, config: Host) -> None:
    """Raises an error for an adapter that vLLM cannot load.

    Unsupported are trained tables or rows, DoRA, adapters outside of the language model, and
    those that the family's kernels skip.
    """
    remedy = (
        "vLLM supports neither modules_to_save nor trainable_token_indices: merge it into the "
        "base instead"
    )
    refuse_saved(spec, "--for vllm", remedy)
    paths = [uniform_path(path) for path, _ in spec.targets]
    outside = [path for path in paths if not path.startswith("layers/")]
    skipped: list[str] = []
    if isinstance(config, ModelConfig):
        unserved = family_of(config.model_type).unserved_in_vllm
        skipped = [path for path in paths if path in unserved]
    if spec.dora:
        rule = "no DoRA (vLLM's rule: use_dora is refused)"
        actual = "a DoRA adapter"
    elif outside:
        rule = "adapters of the language model alone (vLLM's rule)"
        actual = f"one at {outside[0]}"
    elif skipped:
        rule = "no adapter that vLLM loads but never applies"
        actual = f"one at {skipped[0]}"
    else:
        return
    raise NaloraError(
        "--for vllm",
        expected=rule,
        found=actual,
        remedy="merge it into the base instead",
    )


def _adapt_to_vllm(
    entries: list[Entry], config: Host, layout: ModuleLayout, limit: int
) -> list[Entry]:
    """Returns the adapters with one rank and one scale, in every layer of each adapted module.

    Layers and modules that vLLM requires in addition get adapters with A = B = 0.

    Args:
      entries: the adapters.
      config: the base model.
      layout: its modules.
      limit: vLLM's max_lora_rank; a larger rank is an error.
    """
    equal = {entry.place.name: entry for entry in _equalize(entries)}
    first = next(iter(equal.values())).adapter
    rank = first.rank
    scale = first.scale
    if rank > limit:
        raise NaloraError(
            "--for vllm: rank",
            expected=f"at most {limit} (vLLM's rule: max_lora_rank)",
            found=rank,
            remedy=f"start vLLM with --max-lora-rank {rank} or more and export with the same "
            "max_lora_rank",
        )
    adapted = {entry.place.module for entry in entries}
    # Linear modules with an adapted module's short name are adapted too.
    shorts = {module.short for module in adapted if module.form != "stack"}
    adapted |= {
        module for module in modules_of_form(layout, "linear") if module.short in shorts
    }
    # vLLM requires all three projections of the experts or none, and all stacks of experts or none.
    if modules_of_form(tuple(adapted), "expert", "stack"):
        adapted |= set(modules_of_form(layout, "expert", "stack"))

    def zeros(place: Place) -> ModuleAdapter:
        """Returns an adapter without effect: a ``[..., d_in, rank]``, b ``[..., rank, d_out]``."""
        shape = place.shape
        # A place of one expert has the shape of all: [experts, d_in, d_out].
        if not place.stacked:
            shape = shape[-2:]
        *lead, d_in, d_out = shape
        a = np.zeros((*lead, d_in, rank), np.float32)
        b = np.zeros((*lead, rank, d_out), np.float32)
        return ModuleAdapter(a, b, scale)

    return [
        equal.get(place.name) or Entry(place, zeros(place), place.stacked)
        for place in places_in(config, layout)
        if place.module in adapted
    ]


def _tensors(entries: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields PEFT's key and the array of each tensor: A ``[r, d_in]``, B ``[d_out, r]``.

    For a stack of experts both are 2-D, see the shapes below.
    """
    keys = tensor_keys(entry.place for entry in entries)
    for entry in entries:
        key = keys[entry.place.name]
        adapter = entry.adapter
        a = adapter.a.T
        b = adapter.b.T
        if entry.place.stacked:
            # [experts, d_in, r] -> [experts * r, d_in]; [experts, r, d_out] -> [d_out, r * experts]
            a = adapter.a.transpose(0, 2, 1).reshape(-1, adapter.a.shape[1])
            b = adapter.b.transpose(2, 1, 0).reshape(adapter.b.shape[2], -1)
        yield f"{PREFIX}{key}.lora_A.weight", np.ascontiguousarray(a)
        yield f"{PREFIX}{key}.lora_B.weight", np.ascontiguousarray(b)
        if adapter.magnitude is not None:
            magnitude = np.ascontiguousarray(adapter.magnitude)
            yield f"{PREFIX}{key}.lora_magnitude_vector", magnitude


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
        # It acts in training only, and PEFT refuses to load it for experts.
        dropout = 0.0
    alphas: list[float] = []
    for entry in entries:
        alpha = alpha_for(entry.adapter.scale, entry.adapter.rank, rslora=rslora)
        # 16 instead of 16.0 in the JSON file
        if alpha.is_integer():
            alpha = int(alpha)
        alphas.append(alpha)
    ranks = [entry.adapter.rank for entry in entries]
    rank, rank_pattern = _pattern(ranks, entries)
    usual_alpha, alpha_pattern = _pattern(alphas, entries)
    task = None
    if spec.score:
        task = "SEQ_CLS"
    elif isinstance(config, ModelConfig):
        task = "CAUSAL_LM"
    settings = {
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual_alpha,
        "lora_dropout": dropout,
        "modules_to_save": saved_modules(spec) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(entries, config, layout),
        "task_type": task,
        "use_dora": spec.dora,
        "use_rslora": rslora,
    }
    parameters = [entry.place for entry in entries if entry.parameter]
    if parameters:
        existing = places_in(config, modules_of_form(layout, "linear", "stack"))
        settings["target_parameters"] = _shorten(
            map(_parameter_names, parameters), map(_parameter_names, existing)
        )
    return settings | token_settings(spec)


def _pattern(values: list[Any], entries: list[Entry]) -> tuple[Any, dict[str, Any]]:
    """Returns a default value and a pattern for the modules with another value.

    The default is the most frequent value of the parameters, which must need no pattern (see
    `export_adapter`); without parameters, the most frequent of all values. Keys are
    ``mlp.up_proj`` if all layers have the same value, full names otherwise.

    Args:
      values: of each entry.
      entries: the adapters.
    """
    pairs = list(zip(entries, values, strict=True))
    of_parameters = [value for entry, value in pairs if entry.parameter]
    usual = _most_common(of_parameters or values)
    of_modules: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for entry, value in pairs:
        of_modules[entry.place.module.in_layer][entry.place.name] = value
    pattern: dict[str, Any] = {}
    for module, members in of_modules.items():
        # A tower's module name contains {layer} and cannot stand for all layers.
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
    if not isinstance(config, ModelConfig) or config.vision is not None:
        return sorted(names)
    # A short name would target the experts too, which are not modules if they are stacks.
    experts = modules_of_form(layout, "expert") or modules_of_form(
        module_layout(config), "expert"
    )
    existing = places_in(config, modules_of_form(layout, "linear") + experts)
    return _shorten(
        map(_module_names, names), [_module_names(place.name) for place in existing]
    )


def _module_names(name: str) -> tuple[str, str]:
    """Returns a module's short name, the last part of its name, and its full name."""
    _, _, short = name.rpartition(".")
    return short, name


def _parameter_names(place: Place) -> tuple[str, str]:
    """Returns a parameter's name within the layer, and its full name."""
    if place.stacked:
        return place.module.in_layer, place.name
    return f"{place.module.in_layer}.weight", f"{place.name}.weight"


def _shorten(
    adapted: Iterable[tuple[str, str]], existing: Iterable[tuple[str, str]]
) -> list[str]:
    """Returns the shortest list of names that targets the adapted modules and no others.

    A short name stands for all modules that end with it. It is used if all of them are adapted;
    otherwise the full names are listed. ``adapted`` and ``existing`` have pairs (short, full).
    """
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for short, full in adapted:
        groups[short].add(full)
    incomplete = {
        short for short, full in existing if full not in groups.get(short, ())
    }
    names: set[str] = set()
    for short, full_names in groups.items():
        if short in incomplete:
            names |= full_names
        else:
            names.add(short)
    return sorted(names)


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
    for path in sorted(ours.keys() | theirs.keys()):
        # Here only tables, rows and other parameters that were trained directly; adapters follow.
        if path.rpartition("/")[2] in ("a", "b", "magnitude"):
            continue
        exported = np.asarray(ours.get(path, 0.0), np.float32)
        read = np.asarray(theirs.get(path, 0.0), np.float32)
        if not np.array_equal(exported, read):
            raise differs(f"{folder}: {path}")
    for path in sorted({path for path, _ in (*spec.targets, *loaded_spec.targets)}):
        for layer in range(depths(config)[path]):
            difference = _difference(
                layer_adapter(ours, spec, path, layer),
                layer_adapter(theirs, loaded_spec, path, layer),
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
        remedy="do not use these files; please report this as a bug, with the adapter's "
        "configuration",
    )


def _difference(first: ModuleAdapter | None, second: ModuleAdapter | None) -> float:
    """Returns the largest relative difference of ``scale * B`` between two adapters of a layer.

    Infinity if the ranks with an effect, A or the magnitude differ, or if only one adapter has an
    effect; 0 if neither has (None, or B = 0 without a magnitude).
    """
    present = [compact(adapter) for adapter in (first, second) if adapter is not None]
    effective = [
        adapter for adapter in present if adapter.rank or adapter.magnitude is not None
    ]
    if not effective:
        return 0.0
    if len(effective) == 1:
        return np.inf
    ours, theirs = effective
    if ours.b.shape != theirs.b.shape or not np.array_equal(ours.a, theirs.a):
        return np.inf
    if not _equal_magnitudes(ours, theirs):
        return np.inf
    if ours.scale == theirs.scale and np.array_equal(ours.b, theirs.b):
        return 0.0
    expected = ours.scale * ours.b.astype(np.float64)
    found = theirs.scale * theirs.b.astype(np.float64)
    # `tiny` avoids 0 / 0 at entries that are 0 in both.
    size = np.maximum(np.abs(expected), np.finfo(np.float32).tiny)
    return float(np.max(np.abs(expected - found) / size, initial=0.0))


def _equal_magnitudes(first: ModuleAdapter, second: ModuleAdapter) -> bool:
    """Returns True if both magnitudes are equal, or both are missing."""
    if first.magnitude is None or second.magnitude is None:
        return first.magnitude is second.magnitude
    return np.array_equal(first.magnitude, second.magnitude)


def max_logit_difference(
    first: Callable[[Any], Any], second: Callable[[Any], Any], tokens: Any
) -> float:
    """Returns the largest difference of two models' logits, relative to the largest logit.

    Args:
      first: tokens -> logits ``[..., vocab]``, e.g. the base with the trained adapter.
      second: the same for the written model: the imported adapter, or the merged weights.
      tokens: input of both models, e.g. int32 ``[batch, seq]``.
    """
    expected = np.asarray(first(tokens), np.float64)
    found = np.asarray(second(tokens), np.float64)
    largest = max(float(np.max(np.abs(expected))), np.finfo(np.float32).tiny)
    return float(np.max(np.abs(expected - found)) / largest)
