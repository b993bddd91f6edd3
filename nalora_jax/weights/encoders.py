"""Tensor names of every encoder family in transformers' files; see `nalora_jax.weights.keymaps`.

A tower's table has the names in a folder with this tower only; in a dual encoder's file the names
have a prefix, and so they do in a multimodal model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.tensor_rows import Change, Source, TensorRow
from nalora_jax.models.vision.config import UNUSED, DualConfig, EncoderConfig, Sight
from nalora_jax.weights.keymaps import (
    ONCE,
    SIGHT,
    KeyMap,
    Layers,
    Slot,
    SourceTensor,
    keymap_for,
    row_tensors,
)


def _dense(name: str, path: str) -> tuple[TensorRow, TensorRow]:
    kernel = TensorRow(f"{name}.weight", (f"{path}/kernel",), "transpose")
    return kernel, TensorRow(f"{name}.bias", (f"{path}/bias",))


def _norm(name: str, path: str) -> tuple[TensorRow, TensorRow]:
    return TensorRow(f"{name}.weight", (f"{path}/scale",)), TensorRow(f"{name}.bias", (f"{path}/bias",))


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
_WRAPPERS = (
    (r"^(clip\.|siglip\.)?(vision_model|text_model)\.", ""),
    (r"^(bert|vit|dinov2)\.", ""),
)
_PREFIXES = {"image": "vision_model.", "text": "text_model."}  # of towers in a pair's file


def keymap_of(config: ModelConfig | DualConfig | EncoderConfig, source: Source = "hf") -> KeyMap:
    """Returns the key map of a model's files: a decoder's, a dual encoder's, or those of one tower.

    A decoder's has vision tower and projector, except in llama.cpp's files, which have the text
    model only. The prefixes of wrappers (``bert.``, ``vision_model.``) of one tower are optional.

    Raises:
      NaloraError: see `nalora_jax.weights.keymaps.keymap_for`.
    """
    if isinstance(config, DualConfig):
        return KeyMap(tuple(_pair(config)), _ignored(config.image, config.text))
    if isinstance(config, EncoderConfig):
        return KeyMap(tuple(_tower_tensors(config, "", "")), _ignored(config), (), _WRAPPERS)
    text = keymap_for(replace(config, sight=None), source)
    if config.sight is None or source != "hf":
        return text
    tensors = (*text.tensors, *_tower(config.sight), *_projector(config.sight))
    ignored = (*(pattern for pattern in text.ignored if pattern not in SIGHT), r"position_ids$")
    return KeyMap(tensors, ignored, text.aliases, (*text.renames, *_RENAMES))


def _ignored(*towers: EncoderConfig) -> tuple[str, ...]:
    """Returns the patterns of tensors that are not loaded."""
    if any(tower.pooler for tower in towers):
        return _IGNORED
    return (*_IGNORED, _POOLER_UNUSED)


def _pair(config: DualConfig) -> Iterator[SourceTensor]:
    """Yields the tensors of both towers, their projections, and the temperature."""
    for name, tower in config.towers.items():
        yield from _tower_tensors(tower, f"{name}/", _PREFIXES[name])
    rows = []
    if config.model_type in ("clip", "vision-text-dual-encoder"):
        for name, path in (("visual_projection", "image"), ("text_projection", "text")):
            rows.append(TensorRow(f"{name}.weight", (f"{path}/projection/kernel",), "transpose"))
    shapes = config.param_shapes()
    change: Change = "lead" if config.model_type.startswith("siglip") else ""
    rows += [TensorRow(path, (path,), change) for path in shapes if path.startswith("logit_")]
    for row in rows:
        yield from _row_tensors(row, shapes, config.image)


def _tower_tensors(config: EncoderConfig, path: str, prefix: str) -> Iterator[SourceTensor]:
    """Yields a tower's tensors, under a prefix in the file and a path in the tree."""
    shapes = {f"{path}{name}": shape for name, shape in config.param_shapes().items()}
    covered: set[str] = set()
    for row in TABLES[config.model_type]:
        ours = TensorRow(prefix + row.name, tuple(path + name for name in row.paths), row.change)
        if all(name in shapes for name in ours.paths):
            covered |= set(ours.paths)
            yield from _row_tensors(ours, shapes, config)
    # The projections of a pair have other names, see `_pair`.
    left = {name for name in set(shapes) - covered if not name.endswith("projection/kernel")}
    assert not left, f"{config.model_type}: {left}"


def _row_tensors(
    row: TensorRow, shapes: Mapping[str, tuple[int, ...]], config: EncoderConfig
) -> Iterator[SourceTensor]:
    layers: Layers = ONCE
    if "{layer}" in row.name:
        layers = [(layer, layer) for layer in range(config.n_layers)]
    yield from row_tensors(row, row.paths, shapes, config, layers)


def encoder_modules(config: ModelConfig | DualConfig) -> dict[str, str]:
    """Returns transformers' module of each projection outside a decoder, by stacked path.

    Module names contain ``{layer}``.
    """
    if isinstance(config, DualConfig):
        towers = {name: (tower, _PREFIXES[name]) for name, tower in config.towers.items()}
        paths, projector = config.projection_shapes(), ""
    elif config.sight is not None:
        towers = {"image": (config.sight.tower, f"model.{_TOWER}")}
        paths, projector = config.sight.projection_shapes(), config.sight.projector
    else:
        return {}
    modules = {}
    for path in paths:
        head, _, tail = path.partition("/")
        if head in towers:
            tower, prefix = towers[head]
            modules[path] = prefix + _in_memory(tower, _module(TABLES[tower.model_type], tail))
        else:
            modules[path] = f"model.{_module(_PROJECTORS[projector], path)}"
    return modules


def _module(rows: tuple[TensorRow, ...], path: str) -> str:
    (name,) = (row.name for row in rows if row.paths == (f"{path}/kernel",))
    return name.removesuffix(".weight")


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
        *_dense("multi_modal_projector.linear_1", "projector/ffn/in_proj"),
        *_dense("multi_modal_projector.linear_2", "projector/ffn/out_proj"),
    ),
    "pooled": (
        TensorRow("multi_modal_projector.mm_soft_emb_norm.weight", ("projector/norm/scale",)),
        TensorRow("multi_modal_projector.mm_input_projection_weight", ("projector/projection/kernel",)),
    ),
}


def file_name(config: ModelConfig | DualConfig, name: str) -> str:
    """Returns a tensor's name in the models' original repositories.

    Every transformers release can read these names.
    """
    if isinstance(config, DualConfig) or config.sight is None:
        return name
    name = re.sub(r"^(lm_head|model)\.", r"language_model.\1.", name)
    if name.startswith(_TOWER):
        return name.replace(_TOWER, f"{_TOWER}vision_model.", 1)
    return name


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

    for tensor in _tower_tensors(sight.tower, "image/", _TOWER):
        yield replace(tensor, slots=tuple(place(slot) for slot in tensor.slots))


def _projector(sight: Sight) -> Iterator[SourceTensor]:
    """Yields the projector's tensors; its two matmuls are a stack of one layer."""
    shapes, stacked = sight.param_shapes(), sight.projector == "mlp"
    for row in _PROJECTORS[sight.projector]:
        (path,) = row.paths
        if path in shapes:
            layers: Layers = [(0, None)] if stacked else ONCE
            yield from row_tensors(row, row.paths, {path: shapes[path][stacked:]}, sight.tower, layers)
