"""Reads PEFT adapter folders (config and safetensors) as a stacked tree and its spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.trees import unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec, adapter_scale
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.weights.peft_config import PeftConfig, read_peft_config
from nalora_jax.weights.peft_modules import (
    Host,
    ModuleAdapter,
    ModuleLayout,
    Place,
    alpha_for,
    compact,
    fold,
    layout_of,
    places_in,
    split_fused,
    tensor_keys,
    without_copies,
)
from nalora_jax.weights.peft_tables import read_trained, take_saved, take_token_rows, tensor_names
from nalora_jax.weights.shards import DTYPES, FileTensor, read_header, read_whole

TENSORS_NAME = "adapter_model.safetensors"
# Metadata of an adapter's file: properties of its base.
FINGERPRINT_KEY = "nalora.base_fingerprint"
BASE_KEY = "nalora.base"  # name of the base's weights if the settings name their original
ROPE_KEY = "nalora.rope_scaling"  # `ResolvedSource.rope_scaling` of the base
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_KINDS = {"lora_A.weight": "a", "lora_B.weight": "b"}


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
      folder: contains ``adapter_config.json`` and ``adapter_model.safetensors``; may be in a bucket.
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
    where = str(path)
    peft = read_peft_config(folder)
    tensors, metadata = read_tensors(folder)
    _check_fingerprint(path, metadata, fingerprint)
    trained = AdapterSpec()
    if isinstance(config, DualConfig):
        _refuse_text_tables(peft)
        tables = read_trained(folder, config)
    else:
        _refuse_table_adapters(config, tensors, where)
        rows, indices = take_token_rows(config, tensors, peft, where)
        tables, saved = take_saved(config, tensors, peft.modules_to_save, tied=peft.tied, where=where)
        tables |= rows
        trained = AdapterSpec(saved=saved, token_indices=indices)
    modules = _by_module(tensors, path, dora=peft.dora)
    layout = layout_of(config, modules)
    modules = without_copies(modules, config, layout)
    slots = _slots(layout, config, peft)
    _check_complete(peft, path, slots, modules)
    pieces = _pieces(config, peft, path, [(slots[key], modules[key]) for key in modules])
    leaves, spec = _stack_adapters(config, peft, pieces)
    spec = replace(spec, saved=trained.saved, token_indices=trained.token_indices)
    return unflatten(leaves | tables), spec


def _refuse_text_tables(peft: PeftConfig) -> None:
    for field, listed in (
        ("modules_to_save", peft.modules_to_save),
        ("trainable_token_indices", peft.token_indices),
    ):
        if listed:
            expected, actual = "null for image and text encoders", ", ".join(map(str, listed))
            raise NaloraError(f"{peft.where}: {field}", expected=expected, found=actual)


def _refuse_table_adapters(config: ModelConfig, tensors: Mapping[str, np.ndarray], where: str) -> None:
    modules = [name.removesuffix(".weight") for name in tensor_names(config).values()]
    for key in tensors:
        if any(key.startswith(f"{_PREFIX}{module}.lora_") for module in modules):
            remedy = "train the table with modules_to_save, or merge the adapter in PEFT (merge_and_unload)"
            expected, actual = "adapters of a model's layers", "an adapter of the embedding or the head"
            raise NaloraError(f"{where}: {key}", expected=expected, found=actual, remedy=remedy)


def _check_fingerprint(path: Path, metadata: Mapping[str, str], fingerprint: str | None) -> None:
    """Raises an error if the file's base fingerprint belongs to another base model."""
    noted = metadata.get(FINGERPRINT_KEY)
    if noted and fingerprint and noted != fingerprint:
        raise NaloraError(
            str(path),
            expected=f"an adapter of the base model {fingerprint}",
            found=f"one of the base model {noted}",
            remedy="load exactly the weights that the adapter was trained on (named in adapter_config.json); the same "
            "model in another precision is another base",
        )


def recorded_rope_scaling(folder: Path) -> str:
    """Returns the RoPE scaling that an adapter was trained with; "" if it is the base's or unknown."""
    return _recorded(folder, ROPE_KEY)


def recorded_base(folder: Path) -> str:
    """Returns the name that loads exactly the weights that an adapter was trained on; "" if unknown."""
    return _recorded(folder, BASE_KEY)


def _recorded(folder: Path, key: str) -> str:
    try:
        return read_header(folder / TENSORS_NAME)[1].get(key, "")
    except NaloraError:  # `import_adapter` reports a missing or damaged file
        return ""


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns every tensor of ``adapter_model.safetensors`` in float32, and the file's metadata."""
    path = folder / TENSORS_NAME
    if not path.is_file():
        actual, remedy = "no such file", ""
        for name in ("adapter_model.pt", "adapter_model.bin"):
            if (folder / name).exists():
                actual = f"only {name}, a pickle, which can run code when it is read"
                remedy = "save it again with safe_serialization=True"
        raise NaloraError(str(path), expected="the adapter's tensors", found=actual, remedy=remedy)
    stored, metadata = read_header(path)
    return {name: _floats(name, tensor) for name, tensor in stored.items()}, metadata


def _floats(name: str, stored: FileTensor) -> np.ndarray:
    where = f"{stored.file}: {name}"
    if stored.format not in DTYPES:
        raise NaloraError(where, expected=f"one of {', '.join(DTYPES)}", found=stored.format)
    values = read_whole(stored).astype(np.float32)
    if not np.isfinite(values).all():
        raise NaloraError(where, expected="finite numbers", found="NaN or infinity")
    return values


# ---------------------------------------------------------------- expected tensors


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
    parameters = peft.targeted_parameters([*stacks, *(f"{name}.weight" for name in linear)])
    places = [place for place in places if not place.stacked or place.name in parameters]
    slots = {}
    for key, place in zip(tensor_keys(places).values(), places, strict=True):
        # An adapter on a Linear module's weight computes the same as an adapter on the module.
        weight = f"{place.name}.weight"
        name = weight if weight in parameters else place.name
        targeted = name in modules or name in parameters
        slots[key] = Slot(key, place, targeted, peft.rank_of(name), peft.alpha_of(name))
    return slots


def _by_module(
    tensors: Mapping[str, np.ndarray], path: Path, *, dora: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Groups tensors by module and kind: ``{"model.layers.0.mlp.up_proj": {"a": ...}}``."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or (match[2] not in _KINDS and not dora):
            raise NaloraError(
                f"{path}: {key}",
                expected="keys such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                found="a tensor that no LoRA module reads" if key.startswith(_PREFIX) else "another prefix",
                remedy="PEFT would ignore it silently; save the adapter with PEFT's save_pretrained",
            )
        modules.setdefault(match[1], {})[_KINDS.get(match[2], "magnitude")] = tensor
    kinds = {"a": "lora_A", "b": "lora_B"}
    if dora:
        kinds["magnitude"] = "lora_magnitude_vector"
    for module, parts in modules.items():
        missing = [name for kind, name in kinds.items() if kind not in parts]
        if missing:
            raise NaloraError(f"{path}: {module}", expected=" and ".join(missing), found="nothing")
    return modules


def _check_complete(
    peft: PeftConfig, path: Path, slots: Mapping[str, Slot], modules: Mapping[str, dict[str, np.ndarray]]
) -> None:
    """Checks that the file's modules and the targeted modules are the same."""
    for key in modules:
        if key not in slots:
            patterns = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in slots})
            raise NaloraError(
                f"{path}: {_PREFIX}{key}",
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
    missing = [slot.place.name for slot in slots.values() if slot.targeted and slot.key not in modules]
    if missing or not modules:
        where, actual = "tensors", "none, and no module that target_modules matches"
        if missing:
            where, actual = missing[0], f"{len(missing)} modules without"
        expected = "lora_A and lora_B of every module that target_modules names"
        remedy = "the file is incomplete, or the adapter belongs to another model"
        raise NaloraError(f"{path}: {where}", expected=expected, found=actual, remedy=remedy)


# ---------------------------------------------------------------- conversion to the tree


def _pieces(
    config: Host, peft: PeftConfig, path: Path, filled: list[tuple[Slot, dict[str, np.ndarray]]]
) -> dict[str, dict[int, ModuleAdapter]]:
    """Returns adapters by stacked path and layer."""
    pieces: dict[str, dict[int, ModuleAdapter]] = {}
    experts: dict[tuple[int, str, int], dict[int, ModuleAdapter]] = {}
    for slot, parts in filled:
        place, adapter = slot.place, _adapter_of(peft, path, slot, parts)
        if place.expert is not None:
            experts.setdefault((place.layer, *place.slots[0]), {})[place.expert] = adapter
            continue
        split = split_fused(adapter, place.widths, alternates=place.module.alternates)
        for (stacked, index), piece in zip(place.slots, split, strict=True):
            if piece is not None:
                pieces.setdefault(stacked, {})[index] = piece
    for (layer, stacked, index), members in experts.items():
        count = projection_shapes(config)[stacked][0]
        if len(members) != count:
            expected, actual = f"adapters on all {count}", len(members)
            raise NaloraError(f"{path}: experts of layer {layer}", expected=expected, found=actual)
        pieces.setdefault(stacked, {})[index] = _join_experts([members[e] for e in range(count)])
    return pieces


def _adapter_of(peft: PeftConfig, path: Path, slot: Slot, parts: Mapping[str, np.ndarray]) -> ModuleAdapter:
    """Checks one slot's tensors and converts them to this library's layout.

    Args:
      peft: settings of the adapter.
      path: file of the tensors.
      slot: their location.
      parts: the tensors by kind.
    """
    shape, rank, stacked = slot.place.shape, slot.rank, slot.place.stacked
    d_in, d_out = shape[-2:]
    count = shape[0] if stacked else 1
    shapes = {"a": (count * rank, d_in), "b": (d_out, count * rank), "magnitude": (d_out,)}
    for kind, tensor in parts.items():
        if tensor.shape != shapes[kind]:
            raise NaloraError(
                f"{path}: {slot.key} ({kind})",
                expected=f"shape {shapes[kind]} (rank {rank}, {d_in} -> {d_out})",
                found=f"shape {tensor.shape}",
                remedy="the adapter belongs to another base model, or r in adapter_config.json is wrong",
            )
    if peft.dora and len(shape) > 2:
        raise NaloraError(
            f"{peft.where}: use_dora", expected="false for experts (PEFT has no such adapter)", found="true"
        )
    a, b = parts["a"].T, parts["b"].T
    if stacked:  # A is [experts * r, d_in], expert-major; B is [d_out, r * experts], rank-major
        a = parts["a"].reshape(count, rank, d_in).transpose(0, 2, 1)
        b = parts["b"].reshape(d_out, rank, count).transpose(2, 1, 0)
    scale = adapter_scale(slot.alpha, rank, rslora=peft.rslora)
    adapter = ModuleAdapter(a, b, scale, parts.get("magnitude"))
    if stacked and b.any():  # PEFT pads the ranks of stacks; a fresh adapter (B = 0) keeps its rank
        return compact(adapter)
    return adapter


def _join_experts(members: list[ModuleAdapter]) -> ModuleAdapter:
    """Stacks experts' adapters: ranks padded, scales folded relative to the first expert's."""
    rank, scale = max(member.rank for member in members), members[0].scale
    padded = [fold(member, rank, scale) for member in members]
    a, b = (np.stack([getattr(member, name) for member in padded]) for name in "ab")
    return ModuleAdapter(a, b, scale)


def _stack_adapters(
    config: Host, peft: PeftConfig, adapters: Mapping[str, Mapping[int, ModuleAdapter]]
) -> tuple[dict[str, np.ndarray], AdapterSpec]:
    """Stacks adapters over layers with zero-padding; returns leaves by path and their spec.

    Args:
      config: the base model.
      peft: the adapter's settings.
      adapters: by stacked path and layer.
    """
    shapes, numbers = projection_shapes(config), depths(config)
    leaves: dict[str, np.ndarray] = {}
    targets = []
    for path, layers in sorted(adapters.items()):
        *lead, d_in, d_out = shapes[path]
        n, rank = numbers[path], max(adapter.rank for adapter in layers.values())
        a = np.zeros((n, *lead, d_in, rank), np.float32)
        b = np.zeros((n, *lead, rank, d_out), np.float32)
        magnitudes = np.ones((n, d_out), np.float32)  # not read by layers without an adapter
        ranks, alphas = [0] * n, [1.0] * n
        for i, adapter in layers.items():
            ranks[i] = adapter.rank
            alphas[i] = alpha_for(adapter.scale, adapter.rank, rslora=peft.rslora)
            padded = fold(adapter, rank, adapter.scale)
            a[i], b[i] = padded.a, padded.b
            if adapter.magnitude is not None:
                magnitudes[i] = adapter.magnitude
        leaves |= {f"{path}/a": a, f"{path}/b": b}
        if peft.dora:
            leaves[f"{path}/magnitude"] = magnitudes
        targets.append((path, TargetSpec(tuple(ranks), tuple(alphas))))
    return leaves, AdapterSpec(tuple(targets), rslora=peft.rslora, dora=peft.dora, dropout=peft.dropout)
