"""Lists the tensor names of encoder families in transformers' files; see
`nalora_jax.weights.keymaps`.

A tower's table has the names in a folder with this tower only. In the file of a dual encoder or of
a multimodal model they have a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.tensor_rows import Rows, TensorChange, TensorRow
from nalora_jax.models.vision.patch_config import PatchSpec, PatchTower
from nalora_jax.models.vision.vision_config import (
    UNUSED,
    DualConfig,
    EncoderConfig,
    VisionSpec,
)
from nalora_jax.weights.keymaps import (
    OF_ENCODERS,
    ONCE,
    TOWER,
    VISION_TENSORS,
    KeyMap,
    Layers,
    ParamSlot,
    SourceTensor,
    check_covered,
    keymap_for,
    row_tensors,
)


def _rows(names: Mapping[str, str], stem: str = "", folder: str = "") -> Rows:
    """Returns the rows of modules by transformers' name: weights and biases of dense layers and
    norms, and tables.

    Args:
      names: our path of each of transformers' modules.
      stem: begins the tensors' names.
      folder: begins our paths.
    """
    rows: Rows = ()
    for theirs, ours in names.items():
        name = f"{stem}{theirs}"
        path = f"{folder}{ours}"
        if ours.endswith("/embedding"):
            rows += (TensorRow(f"{name}.weight", (path,)),)
            continue
        weight = TensorRow(f"{name}.weight", (f"{path}/kernel",), "transpose")
        if ours.endswith("norm"):
            weight = TensorRow(f"{name}.weight", (f"{path}/scale",))
        rows += (weight, TensorRow(f"{name}.bias", (f"{path}/bias",)))
    return rows


def _layers(stem: str, names: Mapping[str, str]) -> Rows:
    """Returns the rows of modules that every layer ``<stem>.{layer}`` has."""
    return _rows(names, f"{stem}.{{layer}}.", "layers/")


# A tower has the rows of its table whose leaves it has, so one table serves several families.
_CLIP_LAYERS = _layers(
    "encoder.layers",
    {f"self_attn.{n}_proj": f"attn/{n}_proj" for n in "qkv"}
    | {
        "self_attn.out_proj": "attn/o_proj",
        "mlp.fc1": "ffn/in_proj",
        "mlp.fc2": "ffn/out_proj",
    }
    | {"layer_norm1": "attn_norm", "layer_norm2": "ffn_norm"},
)
_TABLES = {
    "token_embedding": "tokens/embedding",
    "position_embedding": "positions/embedding",
}
_CLIP_TEXT = (
    *_rows(_TABLES, "embeddings."),
    *_rows({"final_layer_norm": "final_norm"}),
    *_CLIP_LAYERS,
)
_SIGLIP_TEXT = (*_CLIP_TEXT, *_rows({"head": "projection"}))
_PATCHES = TensorRow(
    "embeddings.patch_embedding.weight", ("patches/kernel",), "patches"
)
_HEAD = {"attention.out_proj": "attn/o_proj", "layernorm": "norm"}
_HEAD |= {"mlp.fc1": "ffn/in_proj", "mlp.fc2": "ffn/out_proj"}
_QKV = tuple(f"pool/attn/{n}_proj" for n in "qkv")
_CLIP_VISION = (  # and SigLIP's
    TensorRow("embeddings.class_embedding", ("class_token",)),
    _PATCHES,
    TensorRow("embeddings.patch_embedding.bias", ("patches/bias",)),
    # "layrnorm" is the spelling in the files.
    *_rows(
        {
            "embeddings.position_embedding": "positions/embedding",
            "pre_layrnorm": "embed_norm",
        }
    ),
    *_rows({"post_layernorm": "final_norm"}),
    *_CLIP_LAYERS,
    TensorRow("head.probe", ("pool/probe",), "lead"),
    TensorRow(
        "head.attention.in_proj_weight",
        tuple(f"{path}/kernel" for path in _QKV),
        "transpose",
    ),
    TensorRow("head.attention.in_proj_bias", tuple(f"{path}/bias" for path in _QKV)),
    *_rows(_HEAD, "head.", "pool/"),
)
_SIGLIP2_VISION = (
    _CLIP_VISION[0],
    replace(_PATCHES, change="transpose"),
    *_CLIP_VISION[2:],
)
_POOLER = _rows({"pooler.dense": "pooler"})
_VIT = (
    TensorRow("embeddings.cls_token", ("class_token",), "lead"),
    TensorRow(
        "embeddings.patch_embeddings.projection.weight", ("patches/kernel",), "patches"
    ),
    TensorRow("embeddings.patch_embeddings.projection.bias", ("patches/bias",)),
    TensorRow("embeddings.position_embeddings", ("positions/embedding",), "lead"),
    *_rows({"layernorm": "final_norm"}),
    *_POOLER,
)
_OUTPUT = {"attention.output.dense": "attn/o_proj"}
_VIT_ATTENTION = {
    f"attention.attention.{n}": f"attn/{n[0]}_proj" for n in ("query", "key", "value")
} | _OUTPUT
_DENSE_FFN = {"intermediate.dense": "ffn/in_proj", "output.dense": "ffn/out_proj"}
_VIT_NORMS = {"layernorm_before": "attn_norm", "layernorm_after": "ffn_norm"}
_DINOV2_FFN = {
    "mlp.fc1": "ffn/in_proj",
    "mlp.fc2": "ffn/out_proj",
    "mlp.weights_out": "ffn/down_proj",
}
# one tensor in the files
_GATED = tuple(f"layers/ffn/{n}_proj" for n in ("gate", "up"))
_DINOV2 = (
    *_VIT,
    *_layers(
        "encoder.layer",
        _VIT_ATTENTION | _DINOV2_FFN | {"norm1": "attn_norm", "norm2": "ffn_norm"},
    ),
    TensorRow(
        "encoder.layer.{layer}.mlp.weights_in.weight",
        tuple(f"{path}/kernel" for path in _GATED),
        "transpose",
    ),
    TensorRow(
        "encoder.layer.{layer}.mlp.weights_in.bias",
        tuple(f"{path}/bias" for path in _GATED),
    ),
    TensorRow("encoder.layer.{layer}.layer_scale1.lambda1", ("layers/attn_scale",)),
    TensorRow("encoder.layer.{layer}.layer_scale2.lambda1", ("layers/ffn_scale",)),
)
_BERT_TABLES = {
    "word_embeddings": "tokens/embedding",
    "position_embeddings": "positions/embedding",
}
_BERT_TABLES |= {"token_type_embeddings": "types/embedding"}
_BERT_ATTENTION = {
    f"attention.self.{n}": f"attn/{n[0]}_proj" for n in ("query", "key", "value")
} | _OUTPUT
_BERT_NORMS = {
    "attention.output.LayerNorm": "attn_norm",
    "output.LayerNorm": "ffn_norm",
}
_BERT = (
    *_rows(_BERT_TABLES | {"LayerNorm": "embed_norm"}, "embeddings."),
    *_layers("encoder.layer", _BERT_ATTENTION | _DENSE_FFN | _BERT_NORMS),
    *_POOLER,
)

_ENCODER_ROWS: dict[str, Rows] = {
    "clip_vision_model": _CLIP_VISION,
    "clip_text_model": _CLIP_TEXT,
    "siglip_vision_model": _CLIP_VISION,
    "siglip_text_model": _SIGLIP_TEXT,
    "siglip2_vision_model": _SIGLIP2_VISION,
    "siglip2_text_model": _SIGLIP_TEXT,
    "vit": (*_VIT, *_layers("encoder.layer", _VIT_ATTENTION | _DENSE_FFN | _VIT_NORMS)),
    "dinov2": _DINOV2,
    "bert": _BERT,
}
_PROJECTIONS = (
    TensorRow("visual_projection.weight", ("image/projection/kernel",), "transpose"),
    TensorRow("text_projection.weight", ("text/projection/kernel",), "transpose"),
)
_PROJECTORS: dict[str, Rows] = {
    "merged": (
        TensorRow(
            "connector.modality_projection.proj.weight",
            ("projector/merged/out_proj/kernel",),
            "transpose",
        ),
    ),
    "mlp": _rows(
        {"linear_1": "in_proj", "linear_2": "out_proj"},
        "multi_modal_projector.",
        "projector/ffn/",
    ),
    "pooled": (
        TensorRow(
            "multi_modal_projector.mm_soft_emb_norm.weight", ("projector/norm/scale",)
        ),
        TensorRow(
            "multi_modal_projector.mm_input_projection_weight",
            ("projector/projection/kernel",),
        ),
    ),
}


def _add_prefix(model_type: str, path: str, prefix: str) -> Rows:
    """Returns a tower's rows, with ``path`` before our paths and ``prefix`` before file names."""
    rows = []
    for row in _ENCODER_ROWS[model_type]:
        paths = tuple(path + name for name in row.paths)
        rows.append(TensorRow(prefix + row.name, paths, row.change))
    return tuple(rows)


_VISUAL_ATTENTION = _rows(
    {"attn.proj": "attn/o_proj"}, "visual.blocks.{layer}.", "image/layers/"
)
_VISUAL_QKV = tuple(f"image/layers/attn/{n}_proj" for n in "qkv")
_VISUAL = (
    TensorRow("visual.patch_embed.proj.weight", ("image/patches/kernel",), "frames"),
    TensorRow("visual.patch_embed.proj.bias", ("image/patches/bias",)),
    *_rows(
        {"norm1": "attn_norm", "norm2": "ffn_norm"},
        "visual.blocks.{layer}.",
        "image/layers/",
    ),
    *_VISUAL_ATTENTION,
    TensorRow(
        "visual.blocks.{layer}.attn.qkv.weight",
        tuple(f"{path}/kernel" for path in _VISUAL_QKV),
        "transpose",
    ),
    TensorRow(
        "visual.blocks.{layer}.attn.qkv.bias",
        tuple(f"{path}/bias" for path in _VISUAL_QKV),
    ),
)
_GATED_MLP = {f"mlp.{n}_proj": f"ffn/{n}_proj" for n in ("gate", "up", "down")}
_FC = {"linear_fc1": "ffn/in_proj", "linear_fc2": "ffn/out_proj"}
_MERGER = "visual.deepstack_merger_list.{layer}."
_QWEN3_VISUAL = (
    *_VISUAL,
    TensorRow("visual.pos_embed.weight", ("image/positions/embedding",)),
    *_rows(
        {f"mlp.{theirs}": ours for theirs, ours in _FC.items()},
        "visual.blocks.{layer}.",
        "image/layers/",
    ),
    *_rows({"norm": "norm"} | _FC, "visual.merger.", "projector/"),
    *_rows({"norm": "norm"} | _FC, _MERGER, "deepstack/"),
)
_PIXTRAL = {f"attention.{n}_proj": f"attn/{n}_proj" for n in "qkvo"}
_PIXTRAL |= {f"feed_forward.{n}_proj": f"ffn/{n}_proj" for n in ("gate", "up", "down")}
_PIXTRAL |= {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
# Tower and projectors of models whose tower reads packed patches, by the model's ``model_type``.
_PATCH_ROWS: dict[str, Rows] = {
    "qwen2_5_vl": (
        *_VISUAL,
        *_rows(_GATED_MLP, "visual.blocks.{layer}.", "image/layers/"),
        *_rows({"ln_q": "norm"}, "visual.merger.", "projector/"),
        *_rows(
            {"mlp.0": "ffn/in_proj", "mlp.2": "ffn/out_proj"},
            "visual.merger.",
            "projector/",
        ),
    ),
    "lfm2_vl": (
        *_add_prefix("siglip2_vision_model", "image/", TOWER),
        *_rows({"layer_norm": "norm"}, "multi_modal_projector.", "projector/"),
        *_PROJECTORS["mlp"],
    ),
    "mistral3": (
        TensorRow(f"{TOWER}patch_conv.weight", ("image/patches/kernel",), "patches"),
        TensorRow(f"{TOWER}ln_pre.weight", ("image/embed_norm/scale",)),
        *_rows(_PIXTRAL, f"{TOWER}transformer.layers.{{layer}}.", "image/layers/"),
        TensorRow("multi_modal_projector.norm.weight", ("projector/norm/scale",)),
        TensorRow(
            "multi_modal_projector.patch_merger.merging_layer.weight",
            ("projector/merged/out_proj/kernel",),
            "transpose",
        ),
        *_PROJECTORS["mlp"],
    ),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN3_VISUAL
    ),
}

# Further tensors that a file may contain: buffers, heads of other tasks, and the dense layer of an
# unused pooler.
_IGNORED = (r"position_ids$", r"^classifier\.", r"^cls\.", r"mask_token$")
_POOLER_UNUSED = r"(^|\.)pooler\.dense\."
_WRAPPERS = (
    (r"^(clip\.|siglip\.)?(vision_model|text_model)\.", ""),
    (r"^(bert|vit|dinov2)\.", ""),
)
# Prefixes in files of transformers 4 and 5, and in the models' original repositories.
_RENAMES = (
    (r"^(model\.)?vision_tower\.(vision_model\.)?", TOWER),
    (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"^(model\.)?visual\.", "visual."),
    (r"^(model\.)?vision_model\.", TOWER),
    (r"^(model\.)?connector\.", "connector."),
    (r"^(model\.)?text_model\.", "model."),
    (r"^model\.image_newline$", "image_newline"),
)


def _keymap(config: ModelConfig | DualConfig | EncoderConfig) -> KeyMap:
    """Returns the key map of a decoder with its image tower, of a dual encoder, or of one tower.

    The prefixes of wrappers (``bert.``, ``vision_model.``) of one tower are optional.
    """
    if isinstance(config, ModelConfig):
        assert config.vision is not None
        text = keymap_for(replace(config, vision=None))
        tensors = (*text.tensors, *_vision_tensors(config.vision))
        unread = [pattern for pattern in text.ignored if pattern not in VISION_TENSORS]
        ignored = (*unread, r"position_ids$")
        return KeyMap(tensors, ignored, text.aliases, (*text.renames, *_RENAMES))
    shapes = config.param_shapes()
    if isinstance(config, DualConfig):
        towers = [config.image, config.text]
    else:
        towers = [config]
    tensors = tuple(_tensors(_names(config), shapes, towers[0]))
    check_covered(tensors, shapes, config.model_type)
    ignored = _IGNORED
    if not any(tower.pooler for tower in towers):
        ignored = (*_IGNORED, _POOLER_UNUSED)
    if isinstance(config, DualConfig):
        return KeyMap(tensors, ignored)
    return KeyMap(tensors, ignored, renames=_WRAPPERS)


def _names(config: DualConfig | EncoderConfig | VisionSpec | PatchSpec) -> Rows:
    """Returns a model's rows, each of which has a tensor's name in files and the leaves that it
    fills.

    Args:
      config: one tower; a dual encoder, with prefixes for its towers, its projections and
        temperature; or the image tower of a multimodal model, followed by the projector.
    """
    if isinstance(config, EncoderConfig):
        return _ENCODER_ROWS[config.model_type]
    if isinstance(config, PatchSpec):
        return _PATCH_ROWS[config.model_type]
    if isinstance(config, VisionSpec):
        tower = _add_prefix(config.tower.model_type, "image/", TOWER)
        line_break = TensorRow("image_newline", ("line_break/feature",))
        return (*tower, *_PROJECTORS[config.projector], line_break)
    image = _add_prefix(config.image.model_type, "image/", "vision_model.")
    text = _add_prefix(config.text.model_type, "text/", "text_model.")
    # SigLIP's projections are in its towers, and its temperature is a vector of one number.
    projections: Rows = ()
    change: TensorChange = "lead"
    if not config.model_type.startswith("siglip"):
        projections = _PROJECTIONS
        change = ""
    scale = TensorRow("logit_scale", ("logit_scale",), change)
    bias = TensorRow("logit_bias", ("logit_bias",), change)
    return (*image, *text, *projections, scale, bias)


def _tensors(
    rows: Iterable[TensorRow],
    shapes: Mapping[str, tuple[int, ...]],
    tower: EncoderConfig | PatchTower,
) -> Iterator[SourceTensor]:
    """Yields the tensors of the rows whose leaves a model has.

    Args:
      rows: rows of the tables of several models; rows without a leaf in ``shapes`` are skipped.
      shapes: shape of every leaf of the model.
      tower: its tower, of which images or texts are the input.
    """
    for row in rows:
        if not all(path in shapes for path in row.paths):
            continue
        first = row.paths[0]
        layers: Layers = ONCE
        if "{layer}" in row.name:
            depth = shapes[first][0]
            layers = [(layer, layer) for layer in range(depth)]
        elif first.startswith(("projector/ffn/", "projector/merged/")):
            # A stack of one layer here; the name in the file has no number.
            layers = [(0, None)]
        yield from row_tensors(row, row.paths, shapes, tower, layers)


def _vision_tensors(vision: VisionSpec | PatchSpec) -> Iterator[SourceTensor]:
    """Yields tensors of tower and projector; weights of unused layers go to the branch `UNUSED`."""
    if isinstance(vision, PatchSpec):
        yield from _tensors(_names(vision), vision.param_shapes(), vision.tower)
        return
    run = vision.running.param_shapes()
    stored = {}  # shapes of the leaves that the files have
    for path, shape in vision.tower.param_shapes().items():
        stored[f"image/{path}"] = shape
    for path, shape in vision.param_shapes().items():
        if path.startswith(("projector/", "line_break")):
            stored[path] = shape

    def place(slot: ParamSlot) -> ParamSlot:
        """Returns the slot in the running model, or below `UNUSED` if the model does not run it."""
        path = slot.path.removeprefix("image/")
        if path == slot.path:
            return slot
        unused = replace(slot, path=f"{UNUSED}/{path}")
        if path not in run:
            return unused
        if slot.layer is not None and slot.layer >= vision.used_layers:
            return replace(unused, layer=slot.layer - vision.used_layers)
        return slot

    for tensor in _tensors(_names(vision), stored, vision.tower):
        yield replace(tensor, slots=tuple(map(place, tensor.slots)))


def _modules(config: ModelConfig | DualConfig) -> dict[tuple[str, ...], str]:
    """Returns transformers' module of each projection outside a decoder, by the stacked paths that
    it fuses.

    Module names contain ``{layer}``.
    """
    host: DualConfig | VisionSpec | PatchSpec
    towers: Mapping[str, EncoderConfig | PatchTower]
    if isinstance(config, DualConfig):
        host = config
        towers = config.towers
        prefix = ""
    elif config.vision is None:
        return {}
    else:
        host = config.vision
        towers = {"image": host.tower}
        prefix = "model."
    shapes = host.projection_shapes()
    modules = {}
    for row in _names(host):
        paths = tuple(path.removesuffix("/kernel") for path in row.paths)
        if all(path in shapes for path in paths):
            name = prefix + row.name.removesuffix(".weight")
            part, _, _ = paths[0].partition("/")  # "image", "text" or "projector"
            modules[paths] = _module_name(towers.get(part), name)
    return modules


def _module_name(tower: EncoderConfig | PatchTower | None, name: str) -> str:
    """Returns the module name in transformers 5 if it differs from the files' (ViT, DINOv2)."""
    if tower is None or tower.model_type not in ("vit", "dinov2"):
        return name
    name = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.\1_proj", name)
    name = name.replace("attention.output.dense", "attention.o_proj")
    if tower.model_type == "vit":
        name = name.replace("intermediate.dense", "mlp.fc1")
        name = name.replace("output.dense", "mlp.fc2")
        name = name.replace("encoder.layer.", "layers.")
    return name


OF_ENCODERS |= {"keymap": _keymap, "modules": _modules}
