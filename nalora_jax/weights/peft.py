"""PEFT adapters on disk: writes a stacked tree as PEFT's files, and verifies what was written.

Example: `export_adapter` writes a folder that PEFT and vLLM load, `import_adapter` (of
`weights.peft_read`) reads one, and `verify_export` compares both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths
from nalora_jax.models.targets import ROWS, TABLES, AdapterSpec, adapter_scale, uniform_path
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.weights.peft_config import CONFIG_NAME
from nalora_jax.weights.peft_modules import (
    Entry,
    Host,
    HostModule,
    ModuleAdapter,
    ModuleLayout,
    Place,
    adapter_settings,
    adapter_tensors,
    common,
    compact,
    copies_for_values,
    fold,
    fuse,
    layout_for,
    places_in,
    short_name,
)
from nalora_jax.weights.peft_read import BASE_KEY, FINGERPRINT_KEY, ROPE_KEY, TENSORS_NAME, import_adapter
from nalora_jax.weights.peft_tables import (
    TRAINED,
    refuse_saved,
    table_tensors,
    trained_tensors,
)
from nalora_jax.weights.shards import write_tensors
from nalora_jax.weights.tokenizer_files import FILES

OWN_FILES = frozenset({CONFIG_NAME, TENSORS_NAME, TRAINED, "README.md", *FILES})


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
    files stack them (gpt-oss), whose target_parameters vLLM reads. Parameters of a dual encoder that
    were trained as a whole are in a third file, which this library reads.

    Args:
      lora: stacked tree, e.g. ``layers/ffn/gate_proj/{a, b}``.
      spec: ranks, alphas and variant of every projection in ``lora``.
      config: the base model, or a dual encoder.
      folder: new or empty; the files appear in it together or not at all.
      base_model_name: hub id or path that other tools load as the base.
      target: the tool that must be able to load the files.
      max_lora_rank: vLLM's setting of that name.
      base_weights: name by which this library loads a copy of that model, if the adapter was trained
        on one; recorded in the file, from which `nalora_jax.train.located.base_of` reads it.
      fingerprint: of the base weights; recorded in the file, checked by `import_adapter`.
      rope_scaling: RoPE scaling of the base if it is not its files'; recorded in the file, from which
        `nalora_jax.train.adapted.load` reads it.
      overwrite: allow ``folder`` to contain an earlier adapter (its files, a README.md and a
        tokenizer's files), which is replaced.
      layout: module names, if they are not those of `layout_for` without a ``config.json``.
      write_extra: function that writes further files into the folder, such as a tokenizer with
        added tokens.

    Raises:
      NaloraError: the tool does not support a property of the adapter (the message names it); the
        folder has other content; or a write fails.
    """
    layout, for_vllm = layout or layout_for(target, config), target == "vllm"
    by_weight: frozenset[HostModule] = frozenset()
    if for_vllm:
        _check_vllm(spec)
    else:
        by_weight = layout.weight_only()
    layout = layout.without("stack" if for_vllm and layout.of("expert") else "expert")
    entries = list(_entries(lora, spec, config, layout, by_weight))
    if for_vllm:
        entries = _for_vllm(entries, config, layout, max_lora_rank)
    else:
        # PEFT applies rank_pattern to parameters too, but warns that the keys "were ignored": with one
        # rank and one scale no pattern is needed.
        parameters = [entry for entry in entries if entry.parameter]
        entries = [entry for entry in entries if not entry.parameter] + _even(parameters)
    written = spec
    if any(entry.parameter or entry.place.expert is not None for entry in entries):
        # Dropout acts in training only, and PEFT refuses to load it for experts.
        written = replace(spec, dropout=0.0)
    settings = adapter_settings(entries, config, layout, written, rslora=spec.rslora and not for_vllm)
    settings["base_model_name_or_path"] = base_model_name
    if for_vllm:
        entries += copies_for_values(entries, config)
    tensors = dict(adapter_tensors(entries))
    if isinstance(config, ModelConfig):
        tensors |= table_tensors(lora, spec, config)
    base = {FINGERPRINT_KEY: fingerprint, ROPE_KEY: rope_scaling, BASE_KEY: base_weights}
    metadata = {"format": "pt"} | {name: value for name, value in base.items() if value}
    with new_folder(folder, replaces=OWN_FILES, overwrite=overwrite) as scratch:
        write_json(scratch / CONFIG_NAME, settings)
        write_tensors(scratch / TENSORS_NAME, tensors, metadata)
        if isinstance(config, DualConfig) and config.trained:
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
    a, b = (np.asarray(leaves[f"{path}/{name}"][layer], np.float32) for name in ("a", "b"))
    magnitude = None
    if spec.dora:
        magnitude = np.asarray(leaves[f"{path}/magnitude"][layer], np.float32)
    scale = adapter_scale(target.alphas[layer], rank, rslora=spec.rslora)
    return ModuleAdapter(a[..., :rank], b[..., :rank, :], scale, magnitude)


# ---------------------------------------------------------------- adapters by module


def _entries(
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: Host,
    layout: ModuleLayout,
    by_weight: frozenset[HostModule],
) -> Iterator[Entry]:
    """Yields every adapted module, fused if the family fuses it.

    Args:
      lora: the adapter's tree.
      spec: its spec.
      config: the base model.
      layout: the modules to write.
      by_weight: Linear modules that are named in target_parameters.
    """
    leaves = flatten(lora)
    paths = {path for module in layout.modules for path in module.parts}
    for path, _ in spec.targets:
        if uniform_path(path) not in paths:
            raise NaloraError(
                f"adapter at {path}", expected=f"one of {', '.join(sorted(paths))}", found=path
            )

    @functools.cache
    def part(path: str, index: int) -> ModuleAdapter | None:
        return layer_adapter(leaves, spec, path, index)

    for place in places_in(config, layout):
        module, expert = place.module, place.expert
        adapter = fuse([part(*slot) for slot in place.slots], place.widths, alternates=module.alternates)
        if adapter is None:
            continue
        if expert is not None:
            adapter = ModuleAdapter(adapter.a[expert], adapter.b[expert], adapter.scale)
        parameter = place.stacked or module in by_weight
        _check_dora(spec, place.name, adapter, parameter=parameter)
        yield Entry(place, adapter, parameter)


def _even(entries: list[Entry]) -> list[Entry]:
    """Returns the same adapters with one rank and one scale."""
    if not entries:
        return []
    rank = max(entry.adapter.rank for entry in entries)
    scale = common(entry.adapter.scale for entry in entries)
    return [replace(entry, adapter=fold(entry.adapter, rank, scale)) for entry in entries]


def _check_dora(spec: AdapterSpec, name: str, adapter: ModuleAdapter, *, parameter: bool) -> None:
    if not spec.dora or (adapter.magnitude is not None and not parameter):
        return
    expected, actual = "a Linear module (PEFT has no DoRA for experts)", "experts"
    if not parameter:
        expected = (
            "an adapter on every projection that the family fuses into this module, for its column norms"
        )
        actual = "some without"
    remedy = "merge the adapter instead"
    raise NaloraError(f"DoRA at {name}", expected=expected, found=actual, remedy=remedy)


# ---------------------------------------------------------------- vLLM


def _check_vllm(spec: AdapterSpec) -> None:
    remedy = "vLLM takes no modules_to_save and no trainable_token_indices: merge it into the base instead"
    refuse_saved(spec, "--for vllm", remedy)
    if spec.dora:
        rule = "no DoRA (vLLM's rule: use_dora is refused)"
        raise NaloraError(
            "--for vllm", expected=rule, found="a DoRA adapter", remedy="merge it into the base instead"
        )
    unsupported = [path for path, _ in spec.targets if not path.startswith("layers/")]
    if unsupported:
        rule = "adapters of the language model alone (vLLM's rule)"
        place, remedy = f"one at {unsupported[0]}", "merge it into the base"
        raise NaloraError("--for vllm", expected=rule, found=place, remedy=remedy)


def _for_vllm(entries: list[Entry], config: Host, layout: ModuleLayout, limit: int) -> list[Entry]:
    """Returns the adapters with one rank and scale, on every layer of each adapted module."""
    even = {entry.place.name: entry for entry in _even(entries)}
    rank, scale = next((entry.adapter.rank, entry.adapter.scale) for entry in even.values())
    if rank > limit:
        expected = f"at most {limit} (vLLM's rule: max_lora_rank)"
        remedy = f"start vLLM with --max-lora-rank {rank} or more and export with the same max_lora_rank"
        raise NaloraError("--for vllm: rank", expected=expected, found=rank, remedy=remedy)
    adapted = {entry.place.module.name for entry in entries}
    lasts = {short_name(entry.place.module.name) for entry in entries if not entry.place.stacked}
    adapted |= {m.name for m in layout.of("linear") if short_name(m.name) in lasts and not m.whole}
    # vLLM requires all three projections of the experts or none, and all stacks of experts or none.
    if any(entry.place.module.form != "linear" for entry in entries):
        adapted |= {module.name for module in (*layout.of("expert"), *layout.of("stack"))}

    def zeros(place: Place) -> ModuleAdapter:
        *lead, d_in, d_out = place.shape[0 if place.stacked else -2 :]
        a, b = np.zeros((*lead, d_in, rank), np.float32), np.zeros((*lead, rank, d_out), np.float32)
        return ModuleAdapter(a, b, scale)

    return [
        even.get(place.name) or Entry(place, zeros(place), place.stacked)
        for place in places_in(config, layout)
        if place.module.name in adapted
    ]


# ---------------------------------------------------------------- verification


__all__ = ["export_adapter", "import_adapter", "max_logit_difference", "verify_export"]

# Folding a scale into B rounds every entry once, and so does reading it back.
_FOLD_TOLERANCE = 2.0**-21


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
    ours, theirs = flatten(lora), flatten(loaded)
    worst = 0.0
    if loaded_spec.token_indices != spec.token_indices:
        raise differs(f"{folder}: trainable_token_indices")
    tables = {
        path: name
        for name in sorted({*spec.saved, *loaded_spec.saved, *dict(spec.token_indices)})
        for path in (TABLES[name], ROWS[name])
    }
    if isinstance(config, DualConfig):
        tables = {path: path for path in config.trained_shapes()}
    for path, name in tables.items():
        trained, read = (np.asarray(leaves.get(path, 0.0), np.float32) for leaves in (ours, theirs))
        if not np.array_equal(trained, read):
            raise differs(f"{folder}: {name}")
    for path in sorted({path for path, _ in (*spec.targets, *loaded_spec.targets)}):
        for layer in range(depths(config)[path]):
            meant = _effective(layer_adapter(ours, spec, path, layer))
            reloaded = _effective(layer_adapter(theirs, loaded_spec, path, layer))
            if meant is None and reloaded is None:
                continue
            difference = np.inf
            if meant is not None and reloaded is not None:
                difference = _relative(meant, reloaded)
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


def _effective(adapter: ModuleAdapter | None) -> ModuleAdapter | None:
    """Returns the adapter without ranks that have no effect; None if it has no effect at all."""
    if adapter is None:
        return None
    live = compact(adapter)
    if live.rank or live.magnitude is not None:
        return live
    return None


def _relative(a: ModuleAdapter, b: ModuleAdapter) -> float:
    """Returns the relative difference of ``scale * B``, infinity if anything else differs."""
    ours, theirs = (np.zeros(0) if adapter.magnitude is None else adapter.magnitude for adapter in (a, b))
    if a.b.shape != b.b.shape or not np.array_equal(a.a, b.a) or not np.array_equal(ours, theirs):
        return np.inf
    if a.scale == b.scale and np.array_equal(a.b, b.b):
        return 0.0
    first, second = (adapter.scale * adapter.b.astype(np.float64) for adapter in (a, b))
    return float(
        np.max(
            np.abs(first - second) / np.maximum(np.abs(first), np.finfo(np.float32).tiny),
            initial=0.0,
        )
    )


def max_logit_difference(first: Callable[[Any], Any], second: Callable[[Any], Any], tokens: Any) -> float:
    """Returns the largest difference of two models' logits, relative to the largest logit.

    Args:
      first: tokens -> logits ``[..., vocab]``, e.g. the base with the trained adapter.
      second: the same for the written model: the imported adapter, or the merged weights.
      tokens: input of both models, e.g. int32 ``[batch, seq]``.
    """
    a, b = (np.asarray(model(tokens), np.float64) for model in (first, second))
    return float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(a))), np.finfo(np.float32).tiny))
