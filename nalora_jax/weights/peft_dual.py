"""Writes and reads PEFT adapter folders of dual encoders, with both towers in one file.

The two files have PEFT's format (``PeftModel.from_pretrained(CLIPModel..., folder)`` loads them).
Other trained parameters (projections between separately trained towers, the temperature) cannot be
stored there and are written to ``trained.safetensors``, under transformers' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nalora_jax.common import buckets
from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.models.vision.dual import trained_shapes
from nalora_jax.weights.encoders import module_names
from nalora_jax.weights.peft import difference_of, differs, file_metadata, layer_adapter
from nalora_jax.weights.peft_config import CONFIG_NAME, PeftConfig
from nalora_jax.weights.peft_modules import (
    Entry,
    HostModule,
    ModuleAdapter,
    ModuleLayout,
    adapter_settings,
    adapter_tensors,
)
from nalora_jax.weights.peft_read import (
    TENSORS_NAME,
    Slot,
    adapter_of,
    by_module,
    check_complete,
    read_adapter,
    stack_adapters,
)
from nalora_jax.weights.shards import write_tensors

TRAINED = "trained.safetensors"
OWN_FILES = frozenset({CONFIG_NAME, TENSORS_NAME, TRAINED, "README.md"})
# Relative; alpha in the files is rounded, and all other numbers are equal.
_TOLERANCE = 1e-9
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
    entries = list(_entries(leaves, spec, config))
    tensors = dict(adapter_tensors(entries, ModuleLayout(())))
    complete = {
        _WHOLE[path]: _outside(np.asarray(leaves[path], np.float32)) for path in trained_shapes(config)
    }
    # Full names: both towers have modules with the same short names, and perhaps only one is adapted.
    targets = sorted(entry.name for entry in entries)
    settings = adapter_settings(entries, spec, targets, rslora=spec.rslora)
    with new_folder(folder, replaces=OWN_FILES, overwrite=overwrite) as scratch:
        write_json(scratch / CONFIG_NAME, settings | {"base_model_name_or_path": base_model_name})
        write_tensors(scratch / TENSORS_NAME, tensors, file_metadata(fingerprint))
        if complete:
            write_tensors(scratch / TRAINED, complete, file_metadata(fingerprint))
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
    folder = buckets.local_path(folder)
    path = folder / TENSORS_NAME
    peft, tensors = read_adapter(folder, fingerprint)
    for field, listed in (
        ("modules_to_save", peft.modules_to_save),
        ("trainable_token_indices", peft.token_indices),
    ):
        if listed:
            numbers = ", ".join(map(str, listed))
            raise NaloraError(
                f"{peft.where}: {field}", expected="null for image and text encoders", found=numbers
            )
    modules = by_module(tensors, path, dora=peft.dora)
    slots = _slots(config, peft)
    check_complete(peft, path, slots, modules)
    shapes = config.projection_shapes()
    pieces: dict[str, dict[int, ModuleAdapter]] = {}
    for name, parts in modules.items():
        slot = slots[name]
        (place,) = slot.module.parts
        pieces.setdefault(place, {})[slot.layer] = adapter_of(shapes[place], 0, peft, path, slot, parts)
    lora, spec = stack_adapters(shapes, config.depths(), peft, pieces)
    return unflatten(lora | _read_whole(folder, config)), spec


def _slots(config: DualConfig, peft: PeftConfig) -> dict[str, Slot]:
    """Returns the modules of the towers' layers by name, as the adapter's settings target them."""
    choices = peft.choose([name for name, *_ in _modules(config)])
    return {
        name: Slot(
            name, name, layer, module, name in choices.modules, choices.ranks[name], choices.alphas[name]
        )
        for name, layer, module in _modules(config)
    }


def _modules(config: DualConfig) -> Iterator[tuple[str, int, HostModule]]:
    """Yields full name, layer and module of each projection of the towers' layers."""
    for path, layers in config.depths().items():
        module = HostModule(module_names(config, path), (path,), whole=True)
        for layer in range(layers):
            yield module.name.format(layer=layer), layer, module


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
    for name, layer, module in _modules(config):
        (path,) = module.parts
        meant, reloaded = (layer_adapter(t, s, path, layer) for t, s in ((ours, spec), (back, read)))
        difference_of(folder, name, meant, reloaded, _TOLERANCE)
    for path in trained_shapes(config):
        if not np.array_equal(np.asarray(ours[path]), back[path]):
            raise differs(folder, path)


def _entries(leaves: Mapping[str, Any], spec: AdapterSpec, config: DualConfig) -> Iterator[Entry]:
    for name, layer, module in _modules(config):
        adapter = layer_adapter(leaves, spec, module.parts[0], layer)
        if adapter is not None:
            yield Entry(name, layer, module, adapter)


def _read_whole(folder: Path, config: DualConfig) -> dict[str, np.ndarray]:
    """Reads the leaves that were fully trained."""
    shapes = trained_shapes(config)
    if not shapes:
        return {}
    path = folder / TRAINED
    try:
        with safe_open(path, framework="np") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
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
