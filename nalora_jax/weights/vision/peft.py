"""Writes and reads PEFT adapter folders of dual encoders, with both towers in one file.

The two files have PEFT's format (``PeftModel.from_pretrained(CLIPModel..., folder)`` loads them).
Other trained parameters (projections between separately trained towers, the temperature) cannot be
stored there and are written to ``trained.safetensors``, under transformers' names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec, adapter_scale
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import trained_shapes
from nalora_jax.trees import flatten, unflatten
from nalora_jax.weights.folders import new_folder, write_json
from nalora_jax.weights.peft_adalora import as_lora_tensors
from nalora_jax.weights.peft_config import CONFIG_NAME, read_peft_config
from nalora_jax.weights.peft_digest import check_digest, check_fingerprint, file_metadata
from nalora_jax.weights.peft_modules import ModuleAdapter, alpha_for, same_array
from nalora_jax.weights.peft_read import TENSORS_NAME, by_module, read_tensors, stack_adapters
from nalora_jax.weights.peft_write import layer_adapter
from nalora_jax.weights.shards import write_tensors
from nalora_jax.weights.vision.keymaps import module_names

TRAINED = "trained.safetensors"
OWN_FILES = frozenset({CONFIG_NAME, TENSORS_NAME, TRAINED, "README.md"})
# Leaves that may be fully trained, with transformers' names; kernels are transposed there.
_WHOLE = {
    "image/projection/kernel": "visual_projection.weight",
    "text/projection/kernel": "text_projection.weight",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}


def export_dual_adapter(
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: DualConfig,
    folder: str | Path,
    *,
    base_model_name: str,
    fingerprint: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter of one or both towers in PEFT's format.

    Args:
      lora: the trained tree (`nalora_jax.models.vision.dual.init_lora`).
      spec: its spec.
      config: the pair.
      folder: new or empty; the files appear in it together or not at all.
      base_model_name: hub id or path that other tools load as the base.
      fingerprint: of the base weights; recorded in the file, checked by `import_dual_adapter`.
      overwrite: allow ``folder`` to contain an earlier adapter, which is replaced.

    Raises:
      NaloraError: a folder with other content, or a failed write.
    """
    leaves = flatten(lora)
    adapters = dict(_adapters(leaves, spec, config))
    tensors: dict[str, np.ndarray] = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(adapter.a.T)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(adapter.b.T)
        if adapter.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = adapter.magnitude
    complete = {
        _WHOLE[path]: _outside(np.asarray(leaves[path], np.float32)) for path in trained_shapes(config)
    }
    settings = _settings(adapters, spec)
    with new_folder(folder, replaces=OWN_FILES, overwrite=overwrite) as scratch:
        write_json(scratch / CONFIG_NAME, settings | {"base_model_name_or_path": base_model_name})
        write_tensors(scratch / TENSORS_NAME, tensors, file_metadata(tensors, settings, fingerprint))
        if complete:
            write_tensors(scratch / TRAINED, complete, file_metadata(complete, settings, fingerprint))
    return Path(folder)


def import_dual_adapter(
    folder: str | Path, config: DualConfig, *, fingerprint: str | None = None
) -> tuple[dict[str, Any], AdapterSpec]:
    """Reads a PEFT LoRA adapter of a dual encoder as this library's ``lora`` tree and its spec.

    Every tensor is consumed and every targeted module of the towers' layers must have its tensors.

    Raises:
      NaloraError: anything missing, unknown, misshapen or unsupported; the message names the field
        or tensor.
    """
    folder = Path(folder)
    peft = read_peft_config(folder)
    for field, listed in (
        ("modules_to_save", peft.modules_to_save),
        ("trainable_token_indices", peft.token_indices),
    ):
        if listed:
            numbers = ", ".join(map(str, listed))
            raise NaloraError(
                f"{peft.where}: {field}", expected="null for image and text encoders", found=numbers
            )
    tensors, metadata = read_tensors(folder)
    check_digest(folder / TENSORS_NAME, tensors, metadata)
    check_fingerprint(folder / TENSORS_NAME, metadata, fingerprint)
    path = folder / TENSORS_NAME
    if peft.adalora:
        tensors = as_lora_tensors(tensors, str(path))
    modules = by_module(tensors, path, dora=peft.dora)
    places = {
        module_names(config, p).format(layer=i): (p, i)
        for p, n in config.depths().items()
        for i in range(n)
    }
    choices = peft.choose(list(places))
    for name in modules:
        if name not in places or name not in choices.modules:
            expected = "a module of this model's layers that target_modules covers"
            actual, remedy = "another one", "PEFT would drop it"
            raise NaloraError(f"{path}: {name}", expected=expected, found=actual, remedy=remedy)
    missing = [name for name in places if name in choices.modules and name not in modules]
    if missing or not modules:
        raise NaloraError(
            f"{path}: {next(iter(missing), 'tensors')}",
            expected="lora_A and lora_B of every target",
            found=f"{len(missing)} modules without",
        )
    pieces: dict[str, dict[int, ModuleAdapter]] = {}
    for name, parts in modules.items():
        place, layer = places[name]
        rank = choices.ranks[name]
        scale = adapter_scale(choices.alphas[name], rank, rslora=peft.rslora)
        shape = config.projection_shapes()[place]
        pieces.setdefault(place, {})[layer] = _read(shape, rank, scale, parts, f"{path}: {name}")
    lora, spec = stack_adapters(config.projection_shapes(), config.depths(), peft, pieces)
    return unflatten(lora | _read_whole(folder, config)), spec


def verify_dual_export(
    folder: str | Path,
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    config: DualConfig,
    fingerprint: str | None = None,
) -> None:
    """Reads an exported adapter back and compares every value with the original tree.

    Raises:
      NaloraError: the file cannot be read, or differs.
    """
    theirs, read = import_dual_adapter(folder, config, fingerprint=fingerprint)
    ours, back = flatten(lora), flatten(theirs)
    for path, layers in config.depths().items():
        for layer in range(layers):
            meant, reloaded = (layer_adapter(t, s, path, layer) for t, s in ((ours, spec), (back, read)))
            if not _same(meant, reloaded):
                raise NaloraError(
                    f"{folder}: {path}, layer {layer}",
                    expected="the adapter that was exported",
                    found="another one on reading it back",
                    remedy="do not use these files; please report this as a bug, with the adapter's configuration",
                )
    for path in trained_shapes(config):
        if not np.array_equal(np.asarray(ours[path]), back[path]):
            raise NaloraError(f"{folder}: {path}", expected="what was exported", found="other numbers")


def _same(a: ModuleAdapter | None, b: ModuleAdapter | None) -> bool:
    if a is None or b is None:
        return a is None and b is None
    pairs = ((a.a, b.a), (a.b, b.b), (a.magnitude, b.magnitude))
    return all(same_array(x, y) for x, y in pairs) and math.isclose(a.scale, b.scale, rel_tol=1e-6)


def _adapters(
    leaves: Mapping[str, Any], spec: AdapterSpec, config: DualConfig
) -> Iterator[tuple[str, ModuleAdapter]]:
    for path, layers in config.depths().items():
        for layer in range(layers):
            adapter = layer_adapter(leaves, spec, path, layer)
            if adapter is not None:
                yield module_names(config, path).format(layer=layer), adapter


def _settings(adapters: Mapping[str, ModuleAdapter], spec: AdapterSpec) -> dict[str, Any]:
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: alpha_for(a.scale, a.rank, rslora=spec.rslora) for name, a in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        # Full names: both towers have modules with the same short names, and perhaps only one is
        # adapted.
        "target_modules": sorted(adapters),
        "task_type": None,
        "use_dora": spec.dora,
        "use_rslora": spec.rslora,
    }


def _read(
    shape: tuple[int, ...], rank: int, scale: float, parts: Mapping[str, np.ndarray], where: str
) -> ModuleAdapter:
    """Checks one module's tensors and converts them to this library's layout."""
    d_in, d_out = shape
    shapes = {"a": (rank, d_in), "b": (d_out, rank), "magnitude": (d_out,)}
    for kind, tensor in parts.items():
        if tensor.shape != shapes[kind]:
            raise NaloraError(
                f"{where} ({kind})", expected=f"shape {shapes[kind]}", found=f"shape {tensor.shape}"
            )
    return ModuleAdapter(parts["a"].T, parts["b"].T, scale, parts.get("magnitude"))


def _read_whole(folder: Path, config: DualConfig) -> dict[str, np.ndarray]:
    """Reads the leaves that were fully trained."""
    shapes = trained_shapes(config)
    if not shapes:
        return {}
    path = folder / TRAINED
    try:
        with safe_open(path, framework="np") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            check_digest(path, tensors, dict(handle.metadata() or {}))
    except (OSError, SafetensorError) as error:
        raise NaloraError(
            str(path), expected="projections and temperature of the pair", found=error
        ) from error
    leaves = {}
    for name, shape in shapes.items():
        value = tensors.get(_WHOLE[name])
        if value is None or _outside(value).shape != shape:
            actual = "nothing" if value is None else f"shape {value.shape}"
            raise NaloraError(
                f"{path}: {_WHOLE[name]}", expected=f"a tensor for {name} {shape}", found=actual
            )
        leaves[name] = _outside(value)
    return leaves


def _outside(value: np.ndarray) -> np.ndarray:
    if value.ndim == 2:
        return np.ascontiguousarray(value.T)
    return value
