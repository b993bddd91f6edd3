"""Readers of the ``config.json`` of encoders, dual encoders and decoders with an image tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nalora_jax.common.fields import Fields
from nalora_jax.errors import NaloraError
from nalora_jax.models.family import VisionReader, hf_defaults
from nalora_jax.models.readers import activation_name
from nalora_jax.models.vision.tower_fields import (
    NEXT_SIZES,
    ONEVISION_SIZES,
    image_token_of,
    read_sizes,
    tower_fields,
)
from nalora_jax.models.vision.vision_config import (
    DualConfig,
    EncoderConfig,
    Loss,
    VisionSpec,
)

_COMPOSED = "vision-text-dual-encoder"  # of separately trained towers


def read_dual(raw: Mapping[str, Any], where: str = "config.json") -> DualConfig:
    """Returns the config that a parsed ``config.json`` of a dual encoder describes.

    Raises:
      NaloraError: an unknown ``model_type``, a missing or ill-typed field, or a feature that is not
        implemented.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in DUAL:
        raise NaloraError(
            f"{where}: model_type",
            expected=f"one of {', '.join(DUAL)}",
            found=repr(name),
        )
    f = Fields(raw, {"projection_dim": 512}, where)  # transformers' default
    image = _member(f, name, "vision", "image")
    text = _member(f, name, "text", "text")
    if name in ("clip", _COMPOSED):
        width = f.integer("projection_dim")
        return DualConfig(name, _projected(image, width), _projected(text, width))
    # SigLIP's features are the towers' own, compared without a projection to one width.
    if image.features != text.features:
        expected = f"{image.features}, as of images"
        raise f.error("text_config: projection_size", expected, text.features)
    return DualConfig(name, image, text, loss="sigmoid")


def _member(f: Fields, pair: str, field: str, kind: str) -> EncoderConfig:
    """Returns the tower that the part ``<field>_config`` of a pair's ``config.json`` describes.

    Args:
      f: fields of the pair.
      pair: its ``model_type``, from which the tower's follows unless the towers are unrelated.
      field: "vision" or "text".
      kind: the tower's kind of input, "image" or "text".
    """
    settings = f.mapping(f"{field}_config")
    if pair != _COMPOSED:
        settings |= {"model_type": f"{pair}_{field}_model"}
    tower = read_encoder(settings, f"{f.where}: {field}_config")
    if tower.kind != kind:
        raise f.error(
            f"{field}_config: model_type", f"an {kind} encoder", tower.model_type
        )
    return tower


def _projected(tower: EncoderConfig, width: int) -> EncoderConfig:
    """Returns the tower with a projection of its pooled output to ``width`` features."""
    if tower.model_type in ("bert", "vit"):
        # transformers' VisionTextDualEncoderModel projects their pooled output after its dense
        # layer with tanh.
        tower = replace(tower, pooling="first", pooler="tanh")
    return replace(tower, d_out=width)


def compose(
    image: EncoderConfig, text: EncoderConfig, d_out: int, loss: Loss = "softmax"
) -> DualConfig:
    """Returns a pair of unrelated towers with new projections to ``d_out`` features.

    The projections are trained with the adapters.

    Raises:
      NaloraError: a tower of the wrong kind.
    """
    for name, tower in (("image", image), ("text", text)):
        if tower.kind != name:
            raise NaloraError(
                f"{name} tower",
                expected=f"an encoder of {name}",
                found=tower.model_type,
            )
    image, text = (
        replace(tower, d_out=d_out, projection_bias=False) for tower in (image, text)
    )
    biases = ("logit_bias",) if loss == "sigmoid" else ()
    trained = ("image/projection", "text/projection", "logit_scale", *biases)
    return DualConfig(_COMPOSED, image, text, loss, trained)


def read_encoder(raw: Mapping[str, Any], where: str = "config.json") -> EncoderConfig:
    """Returns the tower that a parsed ``config.json``, or a part of one, describes.

    Raises:
      NaloraError: see `read_dual`.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in _ENCODERS:
        raise NaloraError(
            f"{where}: model_type",
            expected=f"one of {', '.join(_ENCODERS)}",
            found=repr(name),
        )
    features, defaults = _ENCODERS[name]
    f = Fields(raw, defaults, where)
    f.refuse("quantization_config", "load the unquantized model")
    values = features(f)
    config = EncoderConfig(
        model_type=name,
        d_model=f.integer("hidden_size"),
        n_layers=f.integer("num_hidden_layers", high=2**10),
        n_heads=f.integer("num_attention_heads", high=2**16),
        norm_eps=f.number("layer_norm_eps", zero=True),
        d_ff=values.pop("d_ff", 0) or f.integer("intermediate_size"),
        activation=values.pop("activation", "") or activation_name(f, "hidden_act"),
        **values,
    )
    if config.d_model % config.n_heads:
        raise f.error(
            "hidden_size",
            f"a multiple of num_attention_heads ({config.n_heads})",
            config.d_model,
        )
    return config


# ---------------------------------------------------------------- families


def _text(f: Fields) -> dict[str, Any]:
    """Returns the fields of a tower of texts."""
    return {
        "vocab_size": f.integer("vocab_size"),
        "max_positions": f.integer("max_position_embeddings"),
        "pad_id": f.integer("pad_token_id", low=0),
    }


def _image(f: Fields) -> dict[str, Any]:
    """Returns the fields of a tower of square images, in pixels."""
    size = _side(f, "image_size")
    patch = _side(f, "patch_size")
    if size % patch:
        raise f.error("image_size", f"a multiple of patch_size ({patch})", size)
    return {
        "image_size": size,
        "patch_size": patch,
        "channels": f.integer("num_channels", high=64),
    }


def _side(f: Fields, name: str) -> int:
    """Returns the side of a square, given as a number or as a pair of height and width."""
    pair = f.get(name)
    if isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]:
        f = Fields({name: pair[0]}, {}, f.where)
    return f.integer(name, high=2**14)


def _clip_text(f: Fields) -> dict[str, Any]:
    """Returns the fields of CLIP's text tower, which pools the first end token."""
    eos = f.integer("eos_token_id", low=0)
    return {"pooling": "eos", "eos_id": eos, "causal": True, **_text(f)}


def _siglip_text(f: Fields) -> dict[str, Any]:
    """Returns the fields of SigLIP's text tower, which pools the last position, padding or not."""
    width = f.integer("projection_size", default=f.integer("hidden_size"))
    return {"pooling": "last", "d_out": width, "projection_bias": True, **_text(f)}


def _siglip_vision(f: Fields) -> dict[str, Any]:
    """Returns the fields of SigLIP's image tower, which pools by attention."""
    if f.get("vision_use_head") is False:
        raise f.error(
            "vision_use_head", "true: its pooling head makes the features", "false"
        )
    return {"pooling": "attention", "patch_bias": True, **_image(f)}


def _siglip2_vision(f: Fields) -> dict[str, Any]:
    """Returns the fields of SigLIP 2 NaFlex; ``num_patches`` is the size of the position table."""
    patches = f.integer("num_patches")
    patch = _side(f, "patch_size")
    side = math.isqrt(patches)
    if side * side != patches:
        raise f.error("num_patches", "a square number", patches)
    size = {
        "image_size": side * patch,
        "patch_size": patch,
        "channels": f.integer("num_channels", high=64),
    }
    return {"pooling": "attention", "patch_bias": True, "any_shape": True, **size}


def _vit(f: Fields) -> dict[str, Any]:
    """Returns the fields of a ViT, which pools its class token."""
    traits = {"pooling": "first", "class_token": True, "patch_bias": True}
    return {**traits, "qkv_bias": f.get("qkv_bias") is not False, **_image(f)}


def _dinov2(f: Fields) -> dict[str, Any]:
    """Returns the fields of DINOv2, whose block is gated in the giant model."""
    d_model = f.integer("hidden_size")
    d_ff = int(d_model * f.number("mlp_ratio"))
    gated = f.flag("use_swiglu_ffn")
    features = _vit(f) | {"layer_scale": True, "gated": gated, "d_ff": d_ff}
    if gated:
        # Two thirds, rounded up to a multiple of 8: as many parameters as an ungated block.
        features |= {"d_ff": (int(d_ff * 2 / 3) + 7) // 8 * 8, "activation": "silu"}
    return features


def _bert(f: Fields) -> dict[str, Any]:
    """Returns the fields of a BERT encoder; features are means over tokens."""
    for feature in ("is_decoder", "add_cross_attention"):
        f.refuse(feature)
    kind = f.get("position_embedding_type")
    if kind not in (None, "absolute"):
        raise f.error("position_embedding_type", "'absolute'", repr(kind))
    norms = {"embed_norm": True, "pre_norm": False, "final_norm": False}
    return {
        "token_types": f.integer("type_vocab_size"),
        "pooling": "mean",
        **norms,
        **_text(f),
    }


# transformers' defaults of fields that a file leaves out.
_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_PIXELS = {"num_channels": 3, "image_size": 224, "patch_size": 16}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT = hf_defaults(d_model=512, d_ff=2048, n_heads=8, max_positions=77)
_CLIP_IDS = {"vocab_size": 49408, "pad_token_id": 1, "eos_token_id": 49407}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1}
_GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_BERT = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}

# By ``model_type``: the fields that differ, and transformers' defaults of missing fields.
_ENCODERS: dict[str, tuple[Callable[[Fields], dict[str, Any]], dict[str, Any]]] = {
    "clip_vision_model": (
        lambda f: {
            "pooling": "first",
            "class_token": True,
            "embed_norm": True,
            **_image(f),
        },
        _SIZES | _PIXELS | _CLIP | {"patch_size": 32},
    ),
    "clip_text_model": (_clip_text, _SIZES | _CLIP | _CLIP_TEXT | _CLIP_IDS),
    "siglip_vision_model": (_siglip_vision, _SIZES | _PIXELS | _SIGLIP),
    "siglip_text_model": (_siglip_text, _SIZES | _SIGLIP | _SIGLIP_TEXT),
    "siglip2_vision_model": (
        _siglip2_vision,
        _SIZES | _PIXELS | _SIGLIP | {"num_patches": 256},
    ),
    "siglip2_text_model": (_siglip_text, _SIZES | _SIGLIP | _SIGLIP_TEXT),
    "vit": (_vit, _SIZES | _PIXELS | _GELU),
    "dinov2": (
        _dinov2,
        _SIZES
        | _PIXELS
        | _GELU
        | {"layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4},
    ),
    "bert": (_bert, _SIZES | _GELU | _BERT),
}
DUAL = ("clip", "siglip", "siglip2", _COMPOSED)


# ---------------------------------------------------------------- image towers of decoders


def _tower(f: Fields, defaults: Mapping[str, Any]) -> EncoderConfig:
    """Returns the image tower in ``vision_config``; it has no pooling if the file leaves out its
    head."""
    settings = {**defaults, **f.mapping("vision_config")}
    headless = settings.pop("vision_use_head", None) is False
    size: Any = settings.get("image_size")
    patch: Any = settings.get("patch_size")
    sides = type(size) is int and type(patch) is int and 0 < patch <= size
    if sides:  # what is left of a side is cut off, as of 384 pixels in patches of 14
        settings["image_size"] = size - size % patch
    tower = read_encoder(settings, f"{f.where}: vision_config")
    if sides and tower.kind == "image" and not tower.any_shape:
        tower = replace(tower, image_size=size)
    if headless:
        tower = replace(tower, pooling="none")
    if tower.kind != "image" or tower.any_shape:
        raise f.error(
            "vision_config: model_type",
            "a tower of images of one size",
            tower.model_type,
        )
    return tower


def _llava(f: Fields, d_model: int) -> VisionSpec:
    """Returns the image input of LLaVA: which layer's features are read, and their projector."""
    return _one_layer(f, d_model, _tower(f, _CLIP_LARGE))


def _one_layer(f: Fields, d_model: int, tower: EncoderConfig) -> VisionSpec:
    """Returns an image input that reads the features of one layer of the tower.

    Args:
      f: the file's fields.
      d_model: the decoder's width.
      tower: the image tower.
    """
    layer = f.get("vision_feature_layer")
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int or not -tower.n_layers - 1 <= layer <= tower.n_layers:
        expected = f"one layer of the {tower.n_layers} (several are not implemented)"
        raise f.error("vision_feature_layer", expected, repr(layer)[:60])
    used = layer % (tower.n_layers + 1)  # a negative number counts from the last layer
    if used < 1:
        raise f.error(
            "vision_feature_layer", "a layer's output, not the tower's input", layer
        )
    strategy = f.get("vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise f.error(
            "vision_feature_select_strategy", "'default' or 'full'", repr(strategy)
        )
    drop = strategy == "default"
    if drop and not tower.class_token:
        expected = "'full' for a tower without a class token"
        raise f.error("vision_feature_select_strategy", expected, repr(strategy))
    bias = f.get("multimodal_projector_bias")
    if not isinstance(bias, bool):
        raise f.error("multimodal_projector_bias", "true or false", repr(bias)[:60])
    return VisionSpec(
        f.text("model_type"),
        tower,
        used_layers=used,
        final_norm=False,
        drop_first=drop,
        d_model=d_model,
        tokens=tower.grid**2 + (tower.class_token and not drop),
        image_token=image_token_of(f),
        projector="mlp",
        activation=activation_name(f, "projector_hidden_act"),
        bias=bias,
    )


def _gemma3(f: Fields, d_model: int) -> VisionSpec:
    """Returns the image input of Gemma 3: all features of the tower, pooled to squares.

    The text model caps its logits (``final_logit_softcapping``) with images too, unlike
    ``Gemma3ForConditionalGeneration`` of transformers 5.24 (docs/parity.md).
    """
    tower = _tower(f, _SIGLIP_SO400M)
    tokens = f.integer("mm_tokens_per_image", high=2**20)
    side = math.isqrt(tokens)
    if side * side != tokens or tower.grid % side:
        raise f.error(
            "mm_tokens_per_image",
            f"the square of a divisor of {tower.grid} patches a side",
            tokens,
        )
    return VisionSpec(
        "gemma3",
        tower,
        used_layers=tower.n_layers,
        final_norm=True,
        drop_first=False,
        d_model=d_model,
        tokens=tokens,
        image_token=image_token_of(f),
        projector="pooled",
        bias=False,
        mutual=True,
    )


def _llava_next(f: Fields, d_model: int) -> VisionSpec:
    """Returns the image input of LLaVA-NeXT: LLaVA's for images in tiles."""
    tower_fields(f, _CLIP_LARGE, _CLIP_UNREAD)
    return _in_tiles(f, _one_layer(f, d_model, _tower(f, _CLIP_LARGE)))


def _llava_onevision(f: Fields, d_model: int) -> VisionSpec:
    """Returns the image input of LLaVA-OneVision, which interpolates the features of large
    images."""
    tower_fields(f, _ONEVISION_TOWER, _CLIP_UNREAD)
    spec = _in_tiles(f, _one_layer(f, d_model, _tower(f, _ONEVISION_TOWER)))
    limit = f.text("vision_aspect_ratio")
    number = limit.removeprefix("anyres_max_")
    if number == limit or not number.isdecimal() or not 0 < int(number) < 2**10:
        raise f.error("vision_aspect_ratio", '"anyres_max_" and a number', repr(limit))
    return replace(spec, most_tiles=int(number))


def _in_tiles(f: Fields, spec: VisionSpec) -> VisionSpec:
    """Returns an image input for images in tiles, with a feature for line breaks."""
    tower = spec.tower
    if spec.tokens != tower.grid**2:
        expected = "'default' for a tower with a class token"
        raise f.error("vision_feature_select_strategy", expected, "'full'")
    sizes = read_sizes(f, tower.image_size)
    return replace(spec, tiled=True, line_breaks=True, sizes=sizes)


def _idefics3(f: Fields, d_model: int) -> VisionSpec:
    """Returns the image input of Idefics 3 and SmolVLM: SigLIP's tower, and squares of patches that
    one matmul projects."""
    tower_fields(f, _IDEFICS3_TOWER, ("attention_dropout",))
    settings = dict(f.mapping("vision_config"))
    settings |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    as_siglip = Fields({"vision_config": settings}, {}, f.where)
    tower = _tower(as_siglip, _IDEFICS3_TOWER)
    if not _has_exact_places(tower.grid):
        expected = "another number of patches: transformers' rounding moves positions of this one"
        found = f"{tower.grid} patches a side"
        raise f.error("vision_config: image_size", expected, found)
    merge = f.integer("scale_factor", high=2**5)
    if tower.grid % merge:
        expected = f"a divisor of {tower.grid} patches a side"
        raise f.error("scale_factor", expected, merge)
    return VisionSpec(
        f.text("model_type"),
        tower,
        used_layers=tower.n_layers,
        final_norm=True,
        drop_first=False,
        d_model=d_model,
        tokens=(tower.grid // merge) ** 2,
        image_token=image_token_of(f),
        projector="merged",
        bias=False,
        tiled=True,
        merge=merge,
    )


def _has_exact_places(side: int) -> bool:
    """Returns True if each patch of a square has its own row of the table of positions.

    Idefics 3 compares shares of a side in float32, whose rounding moves patches of some squares, as
    of 25 by 25.
    """
    limits = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    shares = np.arange(side, dtype=np.float32) * np.float32(1 / side)
    places = np.searchsorted(limits, shares, side="right")
    return bool((places == np.arange(side)).all())


# transformers' defaults of the parts of multimodal files.
_CLIP_LARGE: dict[str, Any] = hf_defaults(
    model_type="clip_vision_model",
    d_model=1024,
    d_ff=4096,
    n_layers=24,
    n_heads=16,
    image_size=336,
    patch_size=14,
)
_SIGLIP_SO400M: dict[str, Any] = {"model_type": "siglip_vision_model"}
_ONEVISION_TOWER: dict[str, Any] = hf_defaults(
    model_type="siglip_vision_model",
    d_model=1152,
    d_ff=4304,
    n_layers=26,
    n_heads=16,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
)
# Fields of SigLIP's and CLIP's towers that `_tower` reads, or that only training from scratch or
# pooled features use.
_CLIP_UNREAD = (
    "attention_dropout",
    "dropout",
    "hidden_act",
    "initializer_factor",
    "layer_norm_eps",
    "num_channels",
    "projection_dim",
    "vocab_size",
)
_IDEFICS3_TOWER: dict[str, Any] = hf_defaults(
    d_model=1152,
    d_ff=3072,
    n_layers=12,
    n_heads=16,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
_LLAMA: dict[str, Any] = hf_defaults(
    model_type="llama",
    vocab_size=32_000,
    d_model=4096,
    d_ff=11_008,
    n_layers=32,
    n_heads=32,
    tie_embeddings=False,
)
_LLAVA = {
    "image_token_index": 32_000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
_LLAVA_ONEVISION = _LLAVA | {
    "image_token_index": 151_646,
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "image_grid_pinpoints": ONEVISION_SIZES,
    "vision_aspect_ratio": "anyres_max_9",
}
_QWEN2 = hf_defaults(model_type="qwen2", tie_embeddings=False)
_LLAMA3 = hf_defaults(model_type="llama", norm_eps=1e-5, tie_embeddings=False)
_IDEFICS3 = {"image_token_id": 128_257, "scale_factor": 2}

# By ``model_type``: the reader, transformers' defaults of missing fields, and the text model's.
VISION_FAMILIES: dict[str, tuple[VisionReader, dict[str, Any], dict[str, Any]]] = {
    "llava": (_llava, _LLAVA, _LLAMA),
    "llava_next": (
        _llava_next,
        _LLAVA | {"image_grid_pinpoints": NEXT_SIZES},
        _LLAMA,
    ),
    "llava_onevision": (_llava_onevision, _LLAVA_ONEVISION, _QWEN2),
    "idefics3": (_idefics3, _IDEFICS3, _LLAMA3),
    "smolvlm": (_idefics3, _IDEFICS3, _LLAMA3),
    "gemma3": (
        _gemma3,
        {"mm_tokens_per_image": 256, "image_token_index": 262_144},
        {"model_type": "gemma3_text", "tie_word_embeddings": True},
    ),
}
