"""The image tower, image tokens and projector of a vision-language model.

`MULTIMODAL` has one reader per ``model_type``. The text model within such a ``config.json`` is read
like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import activation_name
from nalora_jax.models.vision.config import EncoderConfig
from nalora_jax.models.vision.families import read_encoder

if TYPE_CHECKING:
    from nalora_jax.models.config import ModelConfig

# Prefix of weights that are in the files but never used; they are kept so that a merged model is
# complete.
UNUSED = "unused"


@dataclass(frozen=True)
class Sight:
    """The image tower and projector of a decoder; each image becomes ``tokens`` embeddings."""

    model_type: str  # of the multimodal model: "llava", "gemma3"
    tower: EncoderConfig  # as stored in the files
    used_layers: int  # number of the tower's layers that are used, starting at the first
    final_norm: bool  # True if the tower's last norm is applied
    drop_first: bool  # leave out the class token's features
    d_model: int  # of the decoder
    tokens: int  # tokens per image
    image_token: int  # id of the token that image features replace
    # "mlp": phi(x W_in) W_out; "pooled": means over squares of patches, a norm and one matmul.
    projector: Literal["mlp", "pooled"]
    activation: str = "gelu"  # of the projector
    bias: bool = True
    mutual: bool = False  # tokens of one image attend to each other in both directions

    @property
    def running(self) -> EncoderConfig:
        """The tower as it is used: without layers after the features and without pooling."""
        return replace(self.tower, n_layers=self.used_layers, final_norm=self.final_norm, pooling="none")

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter by path.

        Paths are ``image/...``, ``projector/...`` and, for weights that are not used,
        ``unused/...``.
        """
        run, of_tower = self.running.param_shapes(), self.tower.param_shapes()
        shapes = {f"image/{path}": shape for path, shape in run.items()} | self._projector_shapes()
        for path, shape in of_tower.items():
            if path not in run:
                shapes[f"{UNUSED}/{path}"] = shape
            elif shape != run[path]:
                shapes[f"{UNUSED}/{path}"] = (shape[0] - self.used_layers, *shape[1:])
        return shapes

    def _projector_shapes(self) -> dict[str, tuple[int, ...]]:
        wide, d = self.tower.d_model, self.d_model
        if self.projector == "pooled":
            return {"projector/norm/scale": (wide,), "projector/projection/kernel": (wide, d)}
        shapes: dict[str, tuple[int, ...]] = {}
        for path, shape in self._mlp().items():
            shapes[f"{path}/kernel"] = (1, *shape)
            if self.bias:
                shapes[f"{path}/bias"] = (1, d)
        return shapes

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        if self.projector != "mlp":
            return {}
        wide, d = self.tower.d_model, self.d_model
        return {"projector/ffn/in_proj": (wide, d), "projector/ffn/out_proj": (d, d)}

    def projection_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns per-layer kernel shapes of all adaptable projections, by stacked path."""
        return {
            f"image/{path}": shape for path, shape in self.running.projection_shapes().items()
        } | self._mlp()

    def depths(self) -> dict[str, int]:
        """Returns the number of stacked layers by path of `projection_shapes`."""
        of_tower = dict.fromkeys(self.projection_shapes(), self.used_layers)
        return of_tower | dict.fromkeys(self._mlp(), 1)

    def gate_blocks(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the FFN blocks; see `nalora_jax.models.stacks.gate_blocks`."""
        blocks: dict[str, tuple[tuple[int, ...], str]] = {
            "image/layers/ffn": ((self.used_layers, self.tower.d_ff), self.tower.activation)
        }
        if self.projector == "mlp":
            blocks["projector/ffn"] = ((1, self.d_model), self.activation)
        return blocks


# ---------------------------------------------------------------- families


def read_sight(raw: Mapping[str, Any], text: ModelConfig, where: str) -> Sight:
    """Returns the image tower and projector that a multimodal ``config.json`` describes.

    Raises:
      NaloraError: a missing or ill-typed field, or a feature that is not implemented.
    """
    name = raw["model_type"]
    reader, defaults = MULTIMODAL[name][:2]
    f = Fields(raw, defaults, where)
    sight = reader(f, text)
    if not 0 <= sight.image_token < text.vocab_size:
        raise f.error(
            "image_token_index", f"a token below {text.vocab_size}, the rows of the embedding", "another"
        )
    return sight


def _tower(f: Fields, defaults: Mapping[str, Any]) -> EncoderConfig:
    settings = {**defaults, **f.mapping("vision_config")}
    headless = settings.pop("vision_use_head", None) is False
    tower = read_encoder(settings, f"{f.where}: vision_config")
    if headless:
        tower = replace(tower, pooling="none")
    if tower.kind != "image" or tower.any_shape:
        raise f.error("vision_config: model_type", "a tower of images of one size", tower.model_type)
    return tower


def _image_token(f: Fields) -> int:
    name = "image_token_index"
    if f.raw.get("image_token_id") is not None:
        name = "image_token_id"
    return f.integer(name, low=0)


def _llava(f: Fields, text: ModelConfig) -> Sight:
    tower = _tower(f, _CLIP_LARGE)
    layer = f.get("vision_feature_layer")
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int or not -tower.n_layers - 1 <= layer <= tower.n_layers:
        expected = f"one layer of the {tower.n_layers} (several are not implemented)"
        raise f.error("vision_feature_layer", expected, repr(layer)[:60])
    used = layer % (tower.n_layers + 1)  # a negative number counts from the last layer
    if used < 1:
        raise f.error("vision_feature_layer", "a layer's output, not the tower's input", layer)
    strategy = f.get("vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise f.error("vision_feature_select_strategy", "'default' or 'full'", repr(strategy))
    drop = strategy == "default"
    if drop and not tower.class_token:
        expected = "'full' for a tower without a class token"
        raise f.error("vision_feature_select_strategy", expected, repr(strategy))
    bias = f.get("multimodal_projector_bias")
    if not isinstance(bias, bool):
        raise f.error("multimodal_projector_bias", "true or false", repr(bias)[:60])
    return Sight(
        "llava",
        tower,
        used_layers=used,
        final_norm=False,
        drop_first=drop,
        d_model=text.d_model,
        tokens=tower.grid**2 + (tower.class_token and not drop),
        image_token=_image_token(f),
        projector="mlp",
        activation=activation_name(f, "projector_hidden_act"),
        bias=bias,
    )


def _gemma3(f: Fields, text: ModelConfig) -> Sight:
    tower = _tower(f, _SIGLIP_SO400M)
    tokens = f.integer("mm_tokens_per_image", high=2**20)
    side = math.isqrt(tokens)
    if side * side != tokens or tower.grid % side:
        raise f.error(
            "mm_tokens_per_image", f"the square of a divisor of {tower.grid} patches a side", tokens
        )
    return Sight(
        "gemma3",
        tower,
        used_layers=tower.n_layers,
        final_norm=True,
        drop_first=False,
        d_model=text.d_model,
        tokens=tokens,
        image_token=_image_token(f),
        projector="pooled",
        bias=False,
        mutual=True,
    )


_CLIP_LARGE: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP_SO400M: dict[str, Any] = {"model_type": "siglip_vision_model"}
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
_LLAVA = {
    "image_token_index": 32_000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}

Reader = Callable[[Fields, "ModelConfig"], Sight]
# By ``model_type``: the reader, transformers' defaults of missing fields, and the text model's.
MULTIMODAL: dict[str, tuple[Reader, dict[str, Any], dict[str, Any]]] = {
    "llava": (_llava, _LLAVA, _LLAMA),
    "gemma3": (
        _gemma3,
        {"mm_tokens_per_image": 256, "image_token_index": 262_144},
        {"model_type": "gemma3_text", "tie_word_embeddings": True},
    ),
}
