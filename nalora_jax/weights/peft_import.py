"""Reads PEFT's adapter files as a stacked tree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.trees import unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import (
    AdapterSpec,
    TargetSpec,
    adapter_scale,
)
from nalora_jax.weights.peft_config import (
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
    layout_of,
    places_in,
    split_fused,
    tensor_keys,
    value_names,
)
from nalora_jax.weights.peft_tables import (
    PREFIX,
    read_trained,
    table_modules,
    take_tables,
)
from nalora_jax.weights.shards import read_tensors

if TYPE_CHECKING:
    from nalora_jax.weights.peft_modules import Host

__all__ = ["import_adapter"]

_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)


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
            remedy="load exactly the weights that the adapter was trained on (named in "
            "adapter_config.json); the same model in another precision is another base",
        )
    trained = AdapterSpec()
    if not isinstance(config, ModelConfig):
        _refuse_tables(peft)
        tables = read_trained(folder, config)
    else:
        of_tables = tuple(f"{name}.lora_" for name in table_modules(config).values())
        for key in tensors:
            if key.startswith(of_tables):
                raise NaloraError(
                    f"{path}: {key}",
                    expected="adapters of a model's layers",
                    found="an adapter of the embedding or the head",
                    remedy="train the table with modules_to_save, or merge the adapter in PEFT "
                    "(merge_and_unload)",
                )
        tables, trained = take_tables(config, tensors, peft, str(path))
    modules = _group_by_module(tensors, path, dora=peft.dora)
    layout = layout_of(config, modules)
    # Copies of k_proj that an export for vLLM contains; the model has no such module.
    for name, copy in value_names(config, layout).items():
        both = name in modules and copy in modules
        if both and all(map(np.array_equal, modules[name], modules[copy])):
            del modules[copy]
    slots = _slots(layout, config, peft)
    _check_complete(peft, path, slots, modules)
    filled = [(slots[key], modules[key]) for key in modules]
    adapters = _group_by_projection(config, peft, path, filled)
    leaves, spec = _stack(config, peft, adapters)
    spec = replace(
        spec,
        saved=trained.saved,
        token_indices=trained.token_indices,
        score=trained.score,
    )
    return unflatten(leaves | tables), spec


def _refuse_tables(peft: PeftConfig) -> None:
    """Raises a NaloraError if an encoder's adapter has trained tables or rows."""
    fields = {
        "modules_to_save": peft.modules_to_save,
        "trainable_token_indices": peft.token_indices,
    }
    for field, named in fields.items():
        if named:
            raise NaloraError(
                f"{peft.where}: {field}",
                expected="null for image and text encoders",
                found=", ".join(map(str, named)),
            )


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
        str(path),
        expected="the adapter's tensors",
        found=actual,
        remedy=remedy,
    )


# Tensors of a module in the order of their names: A, B and, with DoRA, the magnitude.
_Tensors = list[np.ndarray]


def _group_by_module(
    tensors: Mapping[str, np.ndarray], path: Path, *, dora: bool
) -> dict[str, _Tensors]:
    """Groups tensors by module: ``{"model.layers.0.mlp.up_proj": [A, B]}``.

    With DoRA each list also contains the magnitude.

    Raises:
      NaloraError: a key is not a LoRA module's, or a module lacks a tensor.
    """
    kinds = ["lora_A", "lora_B"]
    if dora:
        kinds.append("lora_magnitude_vector")
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        kind = ""
        if match:
            kind = match[2].removesuffix(".weight")
        if match is None or kind not in kinds:
            actual = "another prefix"
            if key.startswith(PREFIX):
                actual = "a tensor that no LoRA module reads"
            raise NaloraError(
                f"{path}: {key}",
                expected="keys such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                found=actual,
                remedy="PEFT would ignore it silently; save the adapter with PEFT's "
                "save_pretrained",
            )
        modules.setdefault(match[1], {})[kind] = tensor
    factors = {}
    for module, parts in modules.items():
        missing = [kind for kind in kinds if kind not in parts]
        if missing:
            raise NaloraError(
                f"{path}: {module}",
                expected=" and ".join(missing),
                found="nothing",
            )
        factors[module] = [parts[kind] for kind in kinds]
    return factors


@dataclass(frozen=True)
class TensorPlace:
    """A possible location of tensors: a Linear module, an expert, or a stack of experts."""

    key: str  # module name in the tensors' keys
    place: Place  # patterns are matched with its name
    targeted: bool
    rank: int
    alpha: float


def _slots(
    layout: ModuleLayout, config: Host, peft: PeftConfig
) -> dict[str, TensorPlace]:
    """Returns every module that can have tensors, by its name in the tensors' keys.

    Stacks of experts that are not targeted are omitted, because a stack's key depends on which
    stacks PEFT has wrapped (`tensor_keys`).
    """
    places = list(places_in(config, layout))
    linear = [place.name for place in places if not place.stacked]
    stacks = [place.name for place in places if place.stacked]
    modules = peft.targeted_modules(linear)
    weights = [f"{name}.weight" for name in linear]
    parameters = peft.targeted_parameters(stacks + weights)
    places = [
        place for place in places if not place.stacked or place.name in parameters
    ]
    slots = {}
    for key, place in zip(tensor_keys(places).values(), places, strict=True):
        name = place.name
        # An adapter on a Linear module's weight computes the same as an adapter on the module.
        if f"{name}.weight" in parameters:
            name = f"{name}.weight"
        targeted = name in modules or name in parameters
        slots[key] = TensorPlace(
            key,
            place,
            targeted,
            peft.rank_of(name),
            peft.alpha_of(name),
        )
    return slots


def _check_complete(
    peft: PeftConfig,
    path: Path,
    slots: Mapping[str, TensorPlace],
    modules: Mapping[str, _Tensors],
) -> None:
    """Raises a NaloraError unless the file has the tensors of exactly the modules that are
    targeted."""
    for key in modules:
        if key not in slots:
            patterns = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in slots})
            raise NaloraError(
                f"{path}: {PREFIX}{key}",
                expected="a module of this model that takes adapters",
                found="an unknown module",
                remedy="is it an adapter of another architecture or prefix? These exist: "
                f"{', '.join(patterns)}",
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
        raise NaloraError(
            f"{path}: {where}",
            expected="lora_A and lora_B of every module that target_modules names",
            found=actual,
            remedy="the file is incomplete, or the adapter belongs to another model",
        )


def _group_by_projection(
    config: Host,
    peft: PeftConfig,
    path: Path,
    filled: list[tuple[TensorPlace, _Tensors]],
) -> dict[str, dict[int, ModuleAdapter]]:
    """Returns the adapter of each projection, by stacked path and index on the stack.

    Splits the adapters of fused modules, and stacks those of single experts into one adapter:
    a ``[experts, d_in, r]``, b ``[experts, r, d_out]``.

    Raises:
      NaloraError: a tensor has the wrong shape, or only some experts of a layer have adapters.
    """
    adapters: defaultdict[str, dict[int, ModuleAdapter]] = defaultdict(dict)
    # By layer, stacked path and index; then by expert.
    experts: dict[tuple[int, str, int], dict[int, ModuleAdapter]] = defaultdict(dict)
    for slot, factors in filled:
        place = slot.place
        adapter = _read_adapter(peft, path, slot, factors)
        if place.expert is not None:
            experts[place.layer, *place.slots[0]][place.expert] = adapter
            continue
        split = split_fused(adapter, place.widths, alternates=place.module.alternates)
        for (stacked, index), part in zip(place.slots, split, strict=True):
            if part is not None:
                adapters[stacked][index] = part
    for (layer, stacked, index), members in experts.items():
        count, *_ = projection_shapes(config)[stacked]
        if len(members) != count:
            raise NaloraError(
                f"{path}: experts of layer {layer}",
                expected=f"adapters on all {count}",
                found=len(members),
            )
        # Ranks are padded, and scales folded relative to the first expert's.
        rank = max(member.rank for member in members.values())
        scale = members[0].scale
        padded = [fold(members[expert], rank, scale) for expert in range(count)]
        a = np.stack([member.a for member in padded])
        b = np.stack([member.b for member in padded])
        adapters[stacked][index] = ModuleAdapter(a, b, scale)
    return adapters


def _read_adapter(
    peft: PeftConfig, path: Path, slot: TensorPlace, factors: _Tensors
) -> ModuleAdapter:
    """Returns the adapter of a slot in this library's layout: a ``[d_in, r]``, b ``[r, d_out]``.

    Of a stack of experts a is ``[experts, d_in, r]`` and b ``[experts, r, d_out]``.

    Args:
      peft: ``adapter_config.json``.
      path: the tensor file, for error messages.
      slot: the module and its rank in ``peft``.
      factors: the slot's tensors in PEFT's layout.

    Raises: NaloraError: a tensor has another shape, or experts have DoRA.
    """
    *experts, d_in, d_out = slot.place.shape
    rank = slot.rank
    stacked = slot.place.stacked
    count = 1  # experts of a stack
    if stacked:
        (count,) = experts
    shapes = {
        "a": (count * rank, d_in),
        "b": (d_out, count * rank),
        "magnitude": (d_out,),
    }
    # Without DoRA there is no magnitude.
    for tensor, (kind, shape) in zip(factors, shapes.items(), strict=False):
        if tensor.shape != shape:
            raise NaloraError(
                f"{path}: {slot.key} ({kind})",
                expected=f"shape {shape} (rank {rank}, {d_in} -> {d_out})",
                found=f"shape {tensor.shape}",
                remedy="the adapter belongs to another base model, or r in adapter_config.json "
                "is wrong",
            )
    if peft.dora and experts:
        raise NaloraError(
            f"{peft.where}: use_dora",
            expected="false for experts (PEFT has no such adapter)",
            found="true",
        )
    lora_a, lora_b, *magnitudes = factors
    a = lora_a.T
    b = lora_b.T
    if stacked:
        # [experts * r, d_in] -> [experts, d_in, r] and [d_out, r * experts] -> [experts, r, d_out]
        a = lora_a.reshape(count, rank, d_in).transpose(0, 2, 1)
        b = lora_b.reshape(d_out, rank, count).transpose(2, 1, 0)
    scale = adapter_scale(slot.alpha, rank, rslora=peft.rslora)
    magnitude = None
    if peft.dora:
        (magnitude,) = magnitudes
    adapter = ModuleAdapter(a, b, scale, magnitude)
    # PEFT pads the ranks of stacks. A fresh adapter (B = 0) keeps its rank.
    if stacked and b.any():
        return compact(adapter)
    return adapter


def _stack(
    config: Host, peft: PeftConfig, adapters: Mapping[str, Mapping[int, ModuleAdapter]]
) -> tuple[dict[str, np.ndarray], AdapterSpec]:
    """Stacks adapters over layers with zero-padding; returns leaves by path and their spec.

    Leaves are ``a [layers, ..., d_in, r]``, ``b [layers, ..., r, d_out]`` and, with DoRA,
    ``magnitude [layers, d_out]``, where r is the largest rank of the projection. Layers without an
    adapter have rank 0.
    """
    shapes = projection_shapes(config)
    numbers = depths(config)
    leaves: dict[str, np.ndarray] = {}
    targets = []
    for path, layers in sorted(adapters.items()):
        *lead, d_in, d_out = shapes[path]
        n = numbers[path]  # layers
        rank = max(adapter.rank for adapter in layers.values())
        a = np.zeros((n, *lead, d_in, rank), np.float32)
        b = np.zeros((n, *lead, rank, d_out), np.float32)
        leaves |= {f"{path}/a": a, f"{path}/b": b}
        if peft.dora:  # layers without an adapter do not read theirs
            leaves[f"{path}/magnitude"] = np.ones((n, d_out), np.float32)
        ranks = [0] * n
        alphas = [1.0] * n
        for i, adapter in layers.items():
            ranks[i] = adapter.rank
            alphas[i] = alpha_for(adapter.scale, adapter.rank, rslora=peft.rslora)
            a[i, ..., : adapter.rank] = adapter.a
            b[i, ..., : adapter.rank, :] = adapter.b
            if adapter.magnitude is not None:
                leaves[f"{path}/magnitude"][i] = adapter.magnitude
        targets.append((path, TargetSpec(tuple(ranks), tuple(alphas))))
    return leaves, AdapterSpec(
        tuple(targets), rslora=peft.rslora, dora=peft.dora, dropout=peft.dropout
    )
