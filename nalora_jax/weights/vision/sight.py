"""Tensor names and PEFT modules of vision towers and projectors in multimodal models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.tensors import Source, TensorRow
from nalora_jax.models.vision.config import UNUSED, Sight
from nalora_jax.weights.keymaps import SIGHT, KeyMap, Slot, SourceTensor, keymap_for
from nalora_jax.weights.vision.keymaps import TABLES, row_tensors, tower_tensors

_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
# Prefixes in files of transformers 4 and 5, and in the models' original repositories.
_RENAMES = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", _TOWER),
    (r"^(model\.)?multi_modal_projector\.", _PROJECTOR),
)
_PROJECTORS: dict[str, tuple[TensorRow, ...]] = {
    "mlp": (
        TensorRow("multi_modal_projector.linear_1.weight", ("projector/ffn/in_proj/kernel",), "transpose"),
        TensorRow("multi_modal_projector.linear_1.bias", ("projector/ffn/in_proj/bias",)),
        TensorRow("multi_modal_projector.linear_2.weight", ("projector/ffn/out_proj/kernel",), "transpose"),
        TensorRow("multi_modal_projector.linear_2.bias", ("projector/ffn/out_proj/bias",)),
    ),
    "pooled": (
        TensorRow("multi_modal_projector.mm_soft_emb_norm.weight", ("projector/norm/scale",)),
        TensorRow("multi_modal_projector.mm_input_projection_weight", ("projector/projection/kernel",)),
    ),
}


def model_keymap(config: ModelConfig, source: Source) -> KeyMap:
    """Returns the key map of a model's files, including vision tower and projector.

    llama.cpp's files have the text model only.

    Raises:
      NaloraError: see `nalora_jax.weights.keymaps.keymap_for`.
    """
    text = keymap_for(replace(config, sight=None), source)
    if config.sight is None or source != "hf":
        return text
    tensors = (*text.tensors, *_tower(config.sight), *_projector(config.sight))
    ignored = (*(pattern for pattern in text.ignored if pattern not in SIGHT), r"position_ids$")
    return KeyMap(tensors, ignored, text.aliases, (*text.renames, *_RENAMES))


def file_name(config: ModelConfig, name: str) -> str:
    """Returns a tensor's name in the models' original repositories.

    Every transformers release can read these names.
    """
    if config.sight is None:
        return name
    name = re.sub(r"^(lm_head|model)\.", r"language_model.\1.", name)
    if name.startswith(_TOWER):
        return name.replace(_TOWER, f"{_TOWER}vision_model.", 1)
    return name


def sight_modules(sight: Sight | None) -> dict[str, str]:
    """Returns transformers' module of each projection outside the decoder, by stacked path.

    Module names contain ``{layer}``.
    """
    if sight is None:
        return {}
    modules = {}
    for path in sight.projection_shapes():
        head, _, tail = path.partition("/")
        rows = TABLES[sight.tower.model_type] if head == "image" else _PROJECTORS[sight.projector]
        prefix, ours = (_TOWER, tail) if head == "image" else ("", path)
        (name,) = (row.name for row in rows if row.paths == (f"{ours}/kernel",))
        modules[path] = f"model.{prefix}{name.removesuffix('.weight')}"
    return modules


def _tower(sight: Sight) -> Iterator[SourceTensor]:
    """Yields the tower's tensors; weights of layers that are not run get a separate branch."""
    run = sight.running.param_shapes()

    def place(slot: Slot) -> Slot:
        path = slot.path.removeprefix("image/")
        if path not in run:
            return replace(slot, path=f"{UNUSED}/{path}")
        if slot.layer is not None and slot.layer >= sight.used_layers:
            return replace(slot, path=f"{UNUSED}/{path}", layer=slot.layer - sight.used_layers)
        return slot

    for tensor in tower_tensors(sight.tower, "image/", _TOWER):
        yield replace(tensor, slots=tuple(place(slot) for slot in tensor.slots))


def _projector(sight: Sight) -> Iterator[SourceTensor]:
    """Yields the projector's tensors; its two matmuls are a stack of one layer."""
    shapes = sight.param_shapes()
    for row in _PROJECTORS[sight.projector]:
        (path,) = row.paths
        if path not in shapes:
            continue
        if sight.projector == "pooled":
            yield from row_tensors(row, shapes, sight.tower)
            continue
        for tensor in row_tensors(row, {path: shapes[path][1:]}, sight.tower):
            yield replace(tensor, slots=(Slot(path, 0),))
