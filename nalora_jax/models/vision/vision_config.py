"""The architectures of encoders: one frozen dataclass for a tower, for a pair, and for a decoder's
image tower.

`families.py` fills them in from a Hugging Face ``config.json``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

VisionShapes = dict[str, tuple[int, ...]]
# How one feature vector is computed from a tower's sequence.
Pooling = Literal["first", "last", "eos", "mean", "attention", "none"]
Loss = Literal["softmax", "sigmoid"]  # that a pair was trained with
TOWERS = ("image", "text")


@dataclass(frozen=True)
class EncoderConfig:
    """One tower. Every default means "the feature is absent"."""

    model_type: str  # the family, e.g. "clip_text_model", "dinov2", "bert"
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    activation: str  # a name of nalora_jax.method.activations
    norm_eps: float
    pooling: Pooling
    # ---- inputs: text ...
    vocab_size: int = 0
    max_positions: int = 0
    token_types: int = (
        0  # rows of a table whose row 0 is added to every token (BERT's segments)
    )
    # The token whose first occurrence is pooled; 2: the largest id (CLIP's first files).
    eos_id: int = -1
    pad_id: int = 0
    # ---- ... or images
    image_size: int = 0  # pixels of the square that the position embeddings cover
    patch_size: int = 0
    channels: int = 3
    any_shape: bool = (
        False  # accepts patches of images of any shape, padded (SigLIP 2's NaFlex)
    )
    class_token: bool = False
    patch_bias: bool = False
    # ---- layers
    embed_norm: bool = False  # a norm between the embeddings and the layers
    causal: bool = False
    # Norms of the inputs of attention and FFN; False: of the residual sums after them (BERT).
    pre_norm: bool = True
    gated: bool = False  # phi(x W_gate) * (x W_up); False: phi(x W_in)
    qkv_bias: bool = True
    layer_scale: bool = (
        False  # a factor per channel on the outputs of attention and FFN
    )
    # ---- outputs
    final_norm: bool = True
    pooler: str = ""  # activation of a dense layer after the pooling: "tanh"
    d_out: int = 0  # features after a projection; 0: no projection
    projection_bias: bool = False

    @property
    def kind(self) -> str:
        """The kind of input, "text" or "image"."""
        if self.vocab_size:
            return "text"
        return "image"

    @property
    def features(self) -> int:
        """The length of the tower's feature vector."""
        return self.d_out or self.d_model

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.d_model // self.n_heads

    @property
    def grid(self) -> int:
        """Patches along one side of the square that the position embeddings cover."""
        return self.image_size // self.patch_size

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every base parameter by path, layers stacked.

        Example (ViT): ``{"patches/kernel": (3 p p, D), "class_token": (D,), ...,
        "layers/ffn/in_proj/kernel": ...}``
        """
        d = self.d_model
        if self.kind == "text":
            rows = {
                "tokens": self.vocab_size,
                "positions": self.max_positions,
                "types": self.token_types,
            }
            shapes: VisionShapes = {
                f"{name}/embedding": (n, d) for name, n in rows.items() if n
            }
        else:
            shapes = dense_shapes(
                "patches", (self.channels * self.patch_size**2, d), self.patch_bias
            )
            if self.class_token:
                shapes["class_token"] = (d,)
            shapes["positions/embedding"] = (self.grid**2 + self.class_token, d)
        layer = _norm("attn_norm", d) | _norm("ffn_norm", d)
        if self.layer_scale:
            layer |= {"attn_scale": (d,), "ffn_scale": (d,)}
        for path, shape in self.projection_shapes().items():
            path = path.removeprefix("layers/")
            # Only q, k and v can be without a bias.
            reads_input = path in ("attn/q_proj", "attn/k_proj", "attn/v_proj")
            layer |= dense_shapes(path, shape, self.qkv_bias or not reads_input)
        if self.embed_norm:
            shapes |= _norm("embed_norm", d)
        shapes |= {
            f"layers/{path}": (self.n_layers, *shape) for path, shape in layer.items()
        }
        if self.final_norm:
            shapes |= _norm("final_norm", d)
        if self.pooling == "attention":
            shapes |= {"pool/probe": (d,)} | _norm("pool/norm", d)
            for name in "qkvo":
                shapes |= dense_shapes(f"pool/attn/{name}_proj", (d, d))
            shapes |= dense_shapes("pool/ffn/in_proj", (d, self.d_ff))
            shapes |= dense_shapes("pool/ffn/out_proj", (self.d_ff, d))
        if self.pooler:
            shapes |= dense_shapes("pooler", (d, d))
        if self.d_out:
            shapes |= dense_shapes("projection", (d, self.d_out), self.projection_bias)
        return shapes

    def projection_shapes(self) -> VisionShapes:
        """Returns per-layer kernel shapes of all adaptable projections, by stacked path."""
        d = self.d_model
        f = self.d_ff
        if self.gated:
            *wide, last = ("gate_proj", "up_proj", "down_proj")
        else:
            *wide, last = ("in_proj", "out_proj")
        shapes: VisionShapes = {f"layers/attn/{name}_proj": (d, d) for name in "qkvo"}
        shapes |= {f"layers/ffn/{name}": (d, f) for name in wide}
        return shapes | {f"layers/ffn/{last}": (f, d)}


def _norm(name: str, width: int) -> VisionShapes:
    """Returns the shapes of a layer norm's parameters."""
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def dense_shapes(name: str, shape: tuple[int, ...], bias: bool = True) -> VisionShapes:
    """Returns the shapes of a dense layer's kernel ``(..., d_in, d_out)`` and bias."""
    shapes = {f"{name}/kernel": shape}
    if bias:
        shapes[f"{name}/bias"] = (*shape[:-2], shape[-1])
    return shapes


@dataclass(frozen=True)
class DualConfig:
    """An image tower and a text tower whose features are compared."""

    model_type: str  # "clip", "siglip", "siglip2", "vision-text-dual-encoder"
    image: EncoderConfig
    text: EncoderConfig
    loss: Loss = "softmax"
    # Base parameters that are trained with the adapters, e.g. new, untrained projections.
    trained: tuple[str, ...] = ()

    @property
    def towers(self) -> dict[str, EncoderConfig]:
        """Both towers by the prefix of their parameters."""
        return {"image": self.image, "text": self.text}

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every base parameter by path.

        Paths are ``image/...``, ``text/...``, ``logit_scale`` and ``logit_bias``.
        """
        shapes: VisionShapes = {}
        for name, tower in self.towers.items():
            shapes |= {
                f"{name}/{path}": shape for path, shape in tower.param_shapes().items()
            }
        shapes["logit_scale"] = ()
        if self.loss == "sigmoid":
            shapes["logit_bias"] = ()
        return shapes

    def projection_shapes(self) -> VisionShapes:
        """Returns per-layer kernel shapes of all adaptable projections, by stacked path."""
        return {
            f"{name}/{path}": shape
            for name, tower in self.towers.items()
            for path, shape in tower.projection_shapes().items()
        }

    def depths(self) -> dict[str, int]:
        """Returns the number of stacked layers by path of `projection_shapes`."""
        return {
            path: self.towers[path.partition("/")[0]].n_layers
            for path in self.projection_shapes()
        }

    def trained_shapes(self) -> VisionShapes:
        """Returns the shape of every base parameter that is trained entirely, by path."""
        return {
            path: shape
            for path, shape in self.param_shapes().items()
            if path in self.trained or path.rpartition("/")[0] in self.trained
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, for JSON and fingerprints."""
        return dataclasses.asdict(self)


# Prefix of weights that are in the files but never used; they are kept so that a merged model is
# complete.
UNUSED = "unused"


@dataclass(frozen=True)
class VisionSpec:
    """The image tower and projector of a decoder; each image becomes ``tokens`` embeddings."""

    packed: ClassVar[bool] = (
        False  # images have one size; `PatchSpec`: patches of any shape
    )
    taps: ClassVar[tuple[int, ...]] = ()

    model_type: str  # of the multimodal model: "llava", "gemma3", "idefics3"
    tower: EncoderConfig  # as stored in the files
    used_layers: (
        int  # number of the tower's layers that are used, starting at the first
    )
    final_norm: bool  # True if the tower's last norm is applied
    drop_first: bool  # leave out the class token's features
    d_model: int  # of the decoder
    tokens: int  # tokens per image, or per tile
    image_token: int  # id of the token that image features replace
    # "mlp": phi(x W_in) W_out; "pooled": means over squares of patches, a norm and one matmul;
    # "merged": squares of `merge` by `merge` patches and one matmul.
    projector: Literal["mlp", "pooled", "merged"]
    activation: str = "gelu"  # of the projector
    bias: bool = True
    mutual: bool = False  # tokens of one image attend to each other in both directions
    # Images are in several tiles (`nalora_jax.data.images.tiles`), each with `tokens` features.
    tiled: bool = False
    # Tokens are features in another order, with a learnt one for line breaks (LLaVA-NeXT).
    line_breaks: bool = False
    # The file's sizes of images in tiles, and the tiles above which features are interpolated.
    sizes: tuple[tuple[int, int], ...] = ()
    most_tiles: int = 0
    merge: int = 1  # patches along a side of the square that becomes one token

    @property
    def running(self) -> EncoderConfig:
        """The tower as it is used: without layers after the features and without pooling."""
        return replace(
            self.tower,
            n_layers=self.used_layers,
            final_norm=self.final_norm,
            pooling="none",
        )

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every parameter by path.

        Paths are ``image/...``, ``projector/...`` and, for weights that are not used,
        ``unused/...``.
        """
        run = self.running.param_shapes()
        wide = self.tower.d_model
        shapes = {f"image/{path}": shape for path, shape in run.items()}
        if self.projector == "pooled":
            shapes |= {
                "projector/norm/scale": (wide,),
                "projector/projection/kernel": (wide, self.d_model),
            }
        for path, shape in self._dense().items():
            shapes |= dense_shapes(path, (1, *shape), self.bias)
        if self.line_breaks:
            shapes["line_break/feature"] = (self.d_model,)
        for path, shape in self.tower.param_shapes().items():
            if path not in run:
                shapes[f"{UNUSED}/{path}"] = shape
            elif shape != run[path]:
                shapes[f"{UNUSED}/{path}"] = (shape[0] - self.used_layers, *shape[1:])
        return shapes

    def _dense(self) -> VisionShapes:
        """Returns the kernel shapes of the projector's adaptable matmuls."""
        wide = self.tower.d_model * self.merge**2
        d = self.d_model
        if self.projector == "pooled":
            return {}
        if self.projector == "merged":
            return {"projector/merged/out_proj": (wide, d)}
        return {"projector/ffn/in_proj": (wide, d), "projector/ffn/out_proj": (d, d)}

    def projection_shapes(self) -> VisionShapes:
        """Returns per-layer kernel shapes of all adaptable projections, by stacked path."""
        of_tower = self.running.projection_shapes()
        return {
            f"image/{path}": shape for path, shape in of_tower.items()
        } | self._dense()

    def depths(self) -> dict[str, int]:
        """Returns the number of stacked layers by path of `projection_shapes`."""
        return dict.fromkeys(
            self.projection_shapes(), self.used_layers
        ) | dict.fromkeys(self._dense(), 1)

    def gate_blocks(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the FFN blocks; see `nalora_jax.models.stacks.gate_blocks`."""
        blocks = {
            "image/layers/ffn": (
                (self.used_layers, self.tower.d_ff),
                self.tower.activation,
            )
        }
        if self.projector == "mlp":
            blocks["projector/ffn"] = ((1, self.d_model), self.activation)
        return {**blocks}
