"""Tensor names of every encoder family in transformers' files; see `nalora_jax.weights.keymaps`.

A tower's table has the names in a folder with this tower only; in a dual encoder's file the names
have a prefix, and so they do in a multimodal model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nalora_jax.common.trees import flatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.tensors import Source, TensorRow
from nalora_jax.models.vision.config import UNUSED, DualConfig, EncoderConfig, Sight
from nalora_jax.weights.keymaps import (
    SIGHT,
    Array,
    KeyMap,
    Slot,
    SourceTensor,
    Transform,
    keymap_for,
    same,
    swap,
)


def _dense(name: str, path: str) -> tuple[TensorRow, TensorRow]:
    kernel = TensorRow(f"{name}.weight", (f"{path}/kernel",), "transpose")
    return kernel, TensorRow(f"{name}.bias", (f"{path}/bias",))


def _norm(name: str, path: str) -> tuple[TensorRow, TensorRow]:
    scale = TensorRow(f"{name}.weight", (f"{path}/scale",))
    return scale, TensorRow(f"{name}.bias", (f"{path}/bias",))


def _layers(stem: str, names: Mapping[str, str], norms: Mapping[str, str]) -> tuple[TensorRow, ...]:
    rows: list[TensorRow] = []
    for theirs, ours in names.items():
        rows += _dense(f"{stem}.{{layer}}.{theirs}", f"layers/{ours}")
    for theirs, ours in norms.items():
        rows += _norm(f"{stem}.{{layer}}.{theirs}", f"layers/{ours}")
    return tuple(rows)


_CLIP_LAYERS = _layers(
    "encoder.layers",
    {f"self_attn.{n}_proj": f"attn/{n}_proj" for n in "qkv"}
    | {"self_attn.out_proj": "attn/o_proj", "mlp.fc1": "ffn/in_proj", "mlp.fc2": "ffn/out_proj"},
    {"layer_norm1": "attn_norm", "layer_norm2": "ffn_norm"},
)
_CLIP_TOKENS = (
    TensorRow("embeddings.token_embedding.weight", ("tokens/embedding",)),
    TensorRow("embeddings.position_embedding.weight", ("positions/embedding",)),
    *_norm("final_layer_norm", "final_norm"),
)
_CLIP_VISION = (
    TensorRow("embeddings.class_embedding", ("class_token",)),
    TensorRow("embeddings.patch_embedding.weight", ("patches/kernel",), "patches"),
    TensorRow("embeddings.position_embedding.weight", ("positions/embedding",)),
    *_norm("pre_layrnorm", "embed_norm"),  # the spelling in the files
    *_norm("post_layernorm", "final_norm"),
    *_CLIP_LAYERS,
)
_SIGLIP_HEAD = (
    TensorRow("head.probe", ("pool/probe",), "lead"),
    TensorRow(
        "head.attention.in_proj_weight",
        tuple(f"pool/attn/{n}_proj/kernel" for n in "qkv"),
        "transpose",
    ),
    TensorRow("head.attention.in_proj_bias", tuple(f"pool/attn/{n}_proj/bias" for n in "qkv")),
    *_dense("head.attention.out_proj", "pool/attn/o_proj"),
    *_norm("head.layernorm", "pool/norm"),
    *_dense("head.mlp.fc1", "pool/ffn/in_proj"),
    *_dense("head.mlp.fc2", "pool/ffn/out_proj"),
)
_SIGLIP_REST = (
    TensorRow("embeddings.patch_embedding.bias", ("patches/bias",)),
    TensorRow("embeddings.position_embedding.weight", ("positions/embedding",)),
    *_norm("post_layernorm", "final_norm"),
    *_CLIP_LAYERS,
    *_SIGLIP_HEAD,
)
_SIGLIP_TEXT = (*_CLIP_TOKENS, *_CLIP_LAYERS, *_dense("head", "projection"))
_VIT_ENDS = (
    TensorRow("embeddings.cls_token", ("class_token",), "lead"),
    TensorRow("embeddings.patch_embeddings.projection.weight", ("patches/kernel",), "patches"),
    TensorRow("embeddings.patch_embeddings.projection.bias", ("patches/bias",)),
    TensorRow("embeddings.position_embeddings", ("positions/embedding",), "lead"),
    *_norm("layernorm", "final_norm"),
)
_VIT_ATTENTION = {f"attention.attention.{n}": f"attn/{n[0]}_proj" for n in ("query", "key", "value")} | {
    "attention.output.dense": "attn/o_proj"
}
_POOLER = _dense("pooler.dense", "pooler")
_DINOV2 = (
    *_VIT_ENDS,
    *_layers(
        "encoder.layer",
        _VIT_ATTENTION
        | {"mlp.fc1": "ffn/in_proj", "mlp.fc2": "ffn/out_proj", "mlp.weights_out": "ffn/down_proj"},
        {"norm1": "attn_norm", "norm2": "ffn_norm"},
    ),
    # The files fuse the two halves of a gated FFN into one tensor.
    TensorRow(
        "encoder.layer.{layer}.mlp.weights_in.weight",
        ("layers/ffn/gate_proj/kernel", "layers/ffn/up_proj/kernel"),
        "transpose",
    ),
    TensorRow(
        "encoder.layer.{layer}.mlp.weights_in.bias",
        ("layers/ffn/gate_proj/bias", "layers/ffn/up_proj/bias"),
    ),
    TensorRow("encoder.layer.{layer}.layer_scale1.lambda1", ("layers/attn_scale",)),
    TensorRow("encoder.layer.{layer}.layer_scale2.lambda1", ("layers/ffn_scale",)),
)
_BERT = (
    TensorRow("embeddings.word_embeddings.weight", ("tokens/embedding",)),
    TensorRow("embeddings.position_embeddings.weight", ("positions/embedding",)),
    TensorRow("embeddings.token_type_embeddings.weight", ("types/embedding",)),
    *_norm("embeddings.LayerNorm", "embed_norm"),
    *_layers(
        "encoder.layer",
        {f"attention.self.{n}": f"attn/{n[0]}_proj" for n in ("query", "key", "value")}
        | {
            "attention.output.dense": "attn/o_proj",
            "intermediate.dense": "ffn/in_proj",
            "output.dense": "ffn/out_proj",
        },
        {"attention.output.LayerNorm": "attn_norm", "output.LayerNorm": "ffn_norm"},
    ),
    *_POOLER,
)

TABLES: dict[str, tuple[TensorRow, ...]] = {
    "clip_vision_model": _CLIP_VISION,
    "clip_text_model": (*_CLIP_TOKENS, *_CLIP_LAYERS),
    "siglip_vision_model": (
        TensorRow("embeddings.patch_embedding.weight", ("patches/kernel",), "patches"),
        *_SIGLIP_REST,
    ),
    "siglip_text_model": _SIGLIP_TEXT,
    "siglip2_vision_model": (
        TensorRow("embeddings.patch_embedding.weight", ("patches/kernel",), "transpose"),
        *_SIGLIP_REST,
    ),
    "siglip2_text_model": _SIGLIP_TEXT,
    "vit": (
        *_VIT_ENDS,
        *_POOLER,
        *_layers(
            "encoder.layer",
            _VIT_ATTENTION | {"intermediate.dense": "ffn/in_proj", "output.dense": "ffn/out_proj"},
            {"layernorm_before": "attn_norm", "layernorm_after": "ffn_norm"},
        ),
    ),
    "dinov2": _DINOV2,
    "bert": _BERT,
}

# Further tensors that a file may contain: buffers, heads of other tasks, and the dense layer of an
# unused pooler.
_IGNORED = (r"position_ids$", r"^classifier\.", r"^cls\.", r"mask_token$")
_POOLER_UNUSED = r"(^|\.)pooler\.dense\."


def encoder_keymap(config: EncoderConfig) -> KeyMap:
    """Returns the key map of a folder with one tower.

    The prefixes of wrappers (``bert.``, ``vision_model.``) are optional.
    """
    tensors = tuple(tower_tensors(config, "", ""))
    renames = (
        (r"^(clip\.|siglip\.)?(vision_model|text_model)\.", ""),
        (r"^(bert|vit|dinov2)\.", ""),
    )
    return KeyMap(tensors, _ignored(config), (), renames)


def _ignored(*towers: EncoderConfig) -> tuple[str, ...]:
    """Returns the patterns of tensors that are not loaded."""
    if any(tower.pooler for tower in towers):
        return _IGNORED
    return (*_IGNORED, _POOLER_UNUSED)


def dual_keymap(config: DualConfig) -> KeyMap:
    """Returns the key map of a dual encoder's folder."""
    tensors = [
        *tower_tensors(config.image, "image/", "vision_model."),
        *tower_tensors(config.text, "text/", "text_model."),
    ]
    shapes = config.param_shapes()
    if config.model_type in ("clip", "vision-text-dual-encoder"):
        for name, tower in (("visual_projection", "image"), ("text_projection", "text")):
            row = TensorRow(f"{name}.weight", (f"{tower}/projection/kernel",), "transpose")
            tensors += row_tensors(row, shapes, config.towers[tower])
    lone = (1,) if config.model_type.startswith("siglip") else ()
    into = Transform(lambda x: x.reshape(()), lambda x: x.reshape(lone), mixes_rows=True)
    for name in [path for path in shapes if path.startswith("logit_")]:
        tensors.append(SourceTensor(name, lone, (Slot(name),), lone or (1,), into))
    return KeyMap(tuple(tensors), _ignored(config.image, config.text))


def tower_tensors(config: EncoderConfig, path: str, prefix: str) -> Iterator[SourceTensor]:
    """Yields a tower's tensors, under a prefix in the file and a path in the tree."""
    shapes = {f"{path}{name}": shape for name, shape in config.param_shapes().items()}
    covered: set[str] = set()
    for row in TABLES[config.model_type]:
        ours = TensorRow(prefix + row.name, tuple(path + name for name in row.paths), row.change)
        if all(name in shapes for name in ours.paths):
            covered |= set(ours.paths)
            yield from row_tensors(ours, shapes, config)
    # The projections of a pair have other names, see `dual_keymap`.
    left = {name for name in set(shapes) - covered if not name.endswith("projection/kernel")}
    assert not left, f"{config.model_type}: {left}"


def row_tensors(
    row: TensorRow, shapes: Mapping[str, tuple[int, ...]], config: EncoderConfig
) -> Iterator[SourceTensor]:
    """Yields the tensors of one row: one, or one per layer."""
    layers = range(config.n_layers) if "{layer}" in row.name else [None]
    ours = [shapes[path]["{layer}" in row.name :] for path in row.paths]
    shape, rows, transform = _turned(row.change, ours, config)
    if row.change == "lead" and row.name.endswith(("cls_token", "probe")):
        shape, rows = (1, *shape), [1]
    for layer in layers:
        slots = tuple(Slot(path, layer) for path in row.paths)
        yield SourceTensor(row.name.format(layer=layer), shape, slots, tuple(rows), transform)


def _turned(
    change: str, ours: list[tuple[int, ...]], config: EncoderConfig
) -> tuple[tuple[int, ...], list[int], Transform]:
    """Returns the shape of the file's tensor, its rows per part, and the transformation."""
    first = ours[0]
    if change == "transpose":
        rows = [shape[-1] for shape in ours]
        return (sum(rows), first[0]), rows, Transform(swap, swap, swaps=True)
    if change == "patches":
        p, d = config.patch_size, first[-1]
        return (
            (d, config.channels, p, p),
            [d],
            Transform(_from_conv, lambda x: _to_conv(x, p), mixes_rows=True),
        )
    if change == "lead":
        shape = (1, *first)
        into = Transform(
            lambda x: x.reshape(first), lambda x: np.asarray(x).reshape(1, *first), mixes_rows=True
        )
        return shape, [1], into
    rows = [shape[0] for shape in ours]
    return (sum(rows), *first[1:]), rows, Transform(same, same)


def _from_conv(kernel: Array) -> Array:
    """Converts ``[d, channels, p, p]`` to ``[p * p * channels, d]``.

    A strided convolution is a matmul of its patches.
    """
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _to_conv(kernel: Array, patch: int) -> Array:
    return kernel.reshape(patch, patch, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)


def tensors_from_params(
    config: DualConfig | EncoderConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and tensors of a model's file."""
    leaves = flatten(params)
    for tensor in keymap_of(config).tensors:
        parts = [np.asarray(leaves[slot.path])[slot.index] for slot in tensor.slots]
        yield tensor.name, tensor.join(parts).reshape(tensor.shape)


def keymap_of(config: DualConfig | EncoderConfig) -> KeyMap:
    """Returns the key map of an encoder's folder."""
    if isinstance(config, DualConfig):
        return dual_keymap(config)
    return encoder_keymap(config)


def module_names(config: DualConfig | EncoderConfig, path: str) -> str:
    """Returns transformers' module of the stacked projection ``path``, with ``{layer}`` in it."""
    if isinstance(config, EncoderConfig):
        tower, prefix, name = config, "", path
    else:
        tower_name, _, name = path.partition("/")
        tower = config.towers[tower_name]
        prefix = {"image": "vision_model.", "text": "text_model."}[tower_name]
    for row in TABLES[tower.model_type]:
        if row.paths == (f"{name}/kernel",):
            return prefix + _in_memory(tower, row.name.removesuffix(".weight"))
    raise KeyError(path)


def _in_memory(tower: EncoderConfig, name: str) -> str:
    """Returns the module name in transformers 5 if it differs from the files' (ViT, DINOv2)."""
    if tower.model_type not in ("vit", "dinov2"):
        return name
    name = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.\1_proj", name)
    name = name.replace("attention.output.dense", "attention.o_proj")
    if tower.model_type == "vit":
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        name = name.replace("encoder.layer.", "layers.")
    return name


# ---------------------------------------------------------------- multimodal models


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
