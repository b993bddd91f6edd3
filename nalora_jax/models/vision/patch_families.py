"""Readers of the ``config.json`` of multimodal models whose tower reads packed patches."""

from __future__ import annotations

import math
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.family import VisionReader, hf_defaults
from nalora_jax.models.readers import activation_name
from nalora_jax.models.vision.patch_config import (
    PatchSpec,
    PatchTower,
    ProjectorNorm,
)
from nalora_jax.models.vision.tower_fields import image_token_of, tower_fields

_TOWER: dict[str, Any] = {
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN2_5: dict[str, Any] = _TOWER | {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN3: dict[str, Any] = _TOWER | {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
_QWEN3_VL = _QWEN3 | {"deepstack_visual_indexes": [8, 16, 24]}
_EPS = 1e-6  # of the towers' norms, which no file states

_SHARED_FIELDS = ("out_hidden_size", "rope_parameters")


def _theta(v: Fields) -> float:
    """Returns the base wavelength of the rotary embedding of rows and columns, which earlier files
    have outside of ``rope_parameters``."""
    where = f"{v.where}: rope_parameters"
    stated = v.number("rope_theta", default=10_000.0)
    defaults = {"rope_type": "axial", "rope_theta": stated}
    rope = Fields(v.mapping("rope_parameters"), defaults, where)
    if rope.get("rope_type") not in ("axial", "default"):
        raise rope.error("rope_type", '"axial"', repr(rope.get("rope_type"))[:60])
    return rope.number("rope_theta")


def _sizes(f: Fields, d_model: int) -> dict[str, Any]:
    """Returns the fields of `PatchTower` that Qwen's towers share.

    ``d_model`` is the decoder's width.
    """
    width = f.integer("hidden_size")
    heads = f.integer("num_heads", high=2**16)
    if width % (4 * heads):
        raise f.error("hidden_size", f"a multiple of 4 num_heads ({4 * heads})", width)
    if f.integer("out_hidden_size", default=d_model) != d_model:
        found = f.get("out_hidden_size")
        raise f.error("out_hidden_size", f"the decoder's width ({d_model})", found)
    return {
        "d_model": width,
        "n_layers": f.integer("depth", high=2**10),
        "n_heads": heads,
        "d_ff": f.integer("intermediate_size"),
        "activation": activation_name(f, "hidden_act"),
        "norm_eps": _EPS,
        "patch_size": f.integer("patch_size", high=2**10),
        "channels": f.integer("in_channels", high=64),
        "frames": f.integer("temporal_patch_size", high=64),
        "rope_theta": _theta(f),
    }


def _layers_of(f: Fields, name: str, depth: int) -> tuple[int, ...]:
    """Returns a list of the tower's layers, ascending."""
    value = f.get(name)
    if not isinstance(value, list):
        raise f.error(name, "a list of layers", repr(value)[:60])
    for layer in value:
        if type(layer) is not int or not 0 <= layer < depth:
            raise f.error(name, f"layers below {depth}", repr(layer)[:60])
    return tuple(sorted(value))


def _qwen2_5_vl(f: Fields, d_model: int) -> PatchSpec:
    """Returns the image input of Qwen2.5-VL: a SwiGLU tower with attention windows."""
    v = tower_fields(f, _QWEN2_5, _SHARED_FIELDS)
    traits = _sizes(v, d_model)
    merge = v.integer("spatial_merge_size", high=2**5)
    square = traits["patch_size"] * merge
    tower = PatchTower(
        "qwen2_5_vl_vision",
        **traits,
        rms_norm=True,
        gated=True,
        window=max(v.integer("window_size") // square, 1),
        whole_layers=_layers_of(v, "fullatt_block_indexes", traits["n_layers"]),
    )
    token = f.integer("image_token_id", low=0)
    return PatchSpec("qwen2_5_vl", tower, d_model, token, merge)


def _qwen3_vl(f: Fields, d_model: int) -> PatchSpec:
    """Returns the image input of Qwen3-VL, some of whose layers have projectors of their own
    (DeepStack)."""
    v = tower_fields(f, _QWEN3_VL, _SHARED_FIELDS)
    depth = v.integer("depth", high=2**10)
    taps = _layers_of(v, "deepstack_visual_indexes", depth)
    return _with_corners(f, v, d_model, taps)


def _qwen3_5(f: Fields, d_model: int) -> PatchSpec:
    """Returns the image input of Qwen3.5: Qwen3-VL's without DeepStack."""
    return _with_corners(f, tower_fields(f, _QWEN3, _SHARED_FIELDS), d_model, ())


def _with_corners(
    f: Fields, v: Fields, d_model: int, taps: tuple[int, ...]
) -> PatchSpec:
    """Returns an image input with a table of positions, whose corners are the image's.

    Args:
      f: the file's fields.
      v: those of the tower.
      d_model: the decoder's width.
      taps: layers of the tower with projectors of their own.
    """
    traits = _sizes(v, d_model)
    positions = v.integer("num_position_embeddings")
    side = round(positions**0.5)
    if side * side != positions:
        raise v.error("num_position_embeddings", "a square number", positions)
    name = f.text("model_type")
    tower = PatchTower(
        f"{name}_vision",
        **traits,
        patch_bias=True,
        table="corners",
        side=side,
    )
    token = f.integer("image_token_id", low=0)
    merge = v.integer("spatial_merge_size", high=2**5)
    return PatchSpec(name, tower, d_model, token, merge, taps=taps)


def _mistral3(f: Fields, d_model: int) -> PatchSpec:
    """Returns the image input of Mistral 3: Pixtral's SwiGLU tower, and a matmul of squares of
    patches before the projector."""
    v = tower_fields(f, _PIXTRAL, _PIXTRAL_UNREAD)
    width = v.integer("hidden_size")
    heads = v.integer("num_attention_heads", high=2**16)
    if width % (4 * heads):
        expected = f"a multiple of 4 num_attention_heads ({4 * heads})"
        raise v.error("hidden_size", expected, width)
    if v.integer("head_dim", default=width // heads) != width // heads:
        expected = f"hidden_size / num_attention_heads ({width // heads})"
        raise v.error("head_dim", expected, v.get("head_dim"))
    depth = v.integer("num_hidden_layers", high=2**10)
    layer = f.get("vision_feature_layer")
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if layer not in (-1, depth):
        raise f.error("vision_feature_layer", "-1: the last layer", repr(layer)[:60])
    tower = PatchTower(
        "pixtral",
        d_model=width,
        n_layers=depth,
        n_heads=heads,
        d_ff=v.integer("intermediate_size"),
        activation=activation_name(v, "hidden_act"),
        norm_eps=1e-5,  # which no file states
        patch_size=v.integer("patch_size", high=2**10),
        channels=v.integer("num_channels", high=64),
        bias=False,
        embed_norm=True,
        rms_norm=True,
        gated=True,
        rope_theta=_theta(v),
        alternates=True,
    )
    text = Fields(f.mapping("text_config"), {"rms_norm_eps": 1e-5}, f.where)
    return PatchSpec(
        "mistral3",
        tower,
        d_model,
        image_token_of(f),
        f.integer("spatial_merge_size", high=2**5),
        activation_name(f, "projector_hidden_act"),
        hidden=d_model,
        norm_eps=text.number("rms_norm_eps"),
        narrows=True,
        bias=f.flag("multimodal_projector_bias"),
    )


def _lfm2_vl(f: Fields, d_model: int) -> PatchSpec:
    """Returns the image input of LFM2-VL: SigLIP 2's tower for images of any shape."""
    v = tower_fields(f, _SIGLIP2, ("attention_dropout", "image_size"))
    if v.get("vision_use_head") is not False:
        expected = "false: the pooling of the whole image is not used"
        raise v.error("vision_use_head", expected, repr(v.get("vision_use_head")))
    positions = v.integer("num_patches")
    side = math.isqrt(positions)
    if side * side != positions:
        raise v.error("num_patches", "a square number", positions)
    width = v.integer("hidden_size")
    heads = v.integer("num_attention_heads", high=2**16)
    if width % heads:
        raise v.error("hidden_size", f"a multiple of {heads} heads", width)
    tower = PatchTower(
        "siglip2_vision_model",
        d_model=width,
        n_layers=v.integer("num_hidden_layers", high=2**10),
        n_heads=heads,
        d_ff=v.integer("intermediate_size"),
        activation=activation_name(v, "hidden_act"),
        norm_eps=v.number("layer_norm_eps"),
        patch_size=v.integer("patch_size", high=2**10),
        channels=v.integer("num_channels", high=64),
        patch_bias=True,
        final_norm=True,
        table="resized",
        side=side,
    )
    norm: ProjectorNorm = "none"
    if f.flag("projector_use_layernorm"):
        norm = "merged"
    return PatchSpec(
        "lfm2_vl",
        tower,
        d_model,
        f.integer("image_token_id", low=0),
        f.integer("downsample_factor", high=2**5),
        activation_name(f, "projector_hidden_act"),
        hidden=f.integer("projector_hidden_size"),
        norm=norm,
        norm_eps=1e-5,  # which no file states
        bias=f.flag("projector_bias"),
    )


_SIGLIP2: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_patches": 256,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
_LFM2_VL = {
    "image_token_id": 396,
    "projector_hidden_act": "gelu",
    "projector_hidden_size": 2560,
    "projector_bias": True,
    "projector_use_layernorm": True,
    "downsample_factor": 2,
}
_PIXTRAL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 14,
    "hidden_act": "gelu",
}
_PIXTRAL_UNREAD = (
    "attention_dropout",
    "head_dim",
    "image_size",
    "rope_parameters",
    "rope_theta",
    "vocab_size",
)
_MISTRAL3 = {
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
}
_TOKENS = {
    "image_token_id": 151_655,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
_TOKENS_3_5 = {
    "image_token_id": 248_056,
    "vision_start_token_id": 248_053,
    "vision_end_token_id": 248_054,
}
# By ``model_type``: the reader, and transformers' defaults of missing fields.
_READERS: dict[str, tuple[VisionReader, dict[str, Any]]] = {
    "qwen2_5_vl": (_qwen2_5_vl, _TOKENS),
    "qwen3_vl": (_qwen3_vl, _TOKENS),
    "qwen3_vl_moe": (_qwen3_vl, _TOKENS),
    "qwen3_5": (_qwen3_5, _TOKENS_3_5),
    "qwen3_5_moe": (_qwen3_5, _TOKENS_3_5),
}
# By ``model_type``: the reader, the defaults, and those of the text model's fields.
PATCH_FAMILIES: dict[str, tuple[VisionReader, dict[str, Any], dict[str, Any]]] = {
    name: (
        reader,
        defaults,
        hf_defaults(model_type=f"{name}_text", tie_embeddings=False),
    )
    for name, (reader, defaults) in _READERS.items()
}
PATCH_FAMILIES["mistral3"] = (_mistral3, _MISTRAL3, {})
PATCH_FAMILIES["lfm2_vl"] = (
    _lfm2_vl,
    _LFM2_VL,
    hf_defaults(model_type="lfm2", tie_embeddings=True),
)
