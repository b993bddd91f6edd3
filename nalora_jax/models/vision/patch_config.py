"""The architecture of image towers that read packed patches of images of any shape.

The patches of all images of a row follow each other like packed texts: `PatchTower` attends within
an image, or within a window of it. `PatchSpec` adds the projector, which merges squares of patches
to one token. `patch_families.py` fills both in from a ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nalora_jax.models.vision.vision_config import VisionShapes, dense_shapes

# Positions that are added to the patches: none, or a square table resized to the image's grid with
# its corners aligned (Qwen3-VL), or with antialiasing as images are (SigLIP 2).
PositionTable = Literal["none", "corners", "resized"]
# Norms of the projectors' inputs: of each patch, of all patches of a token together, or none.
ProjectorNorm = Literal["patches", "merged", "none"]


@dataclass(frozen=True)
class PatchTower:
    """A tower of patches. Every default means "the feature is absent"."""

    model_type: str  # of the tower, e.g. "qwen3_vl_vision"
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    activation: str  # a name of nalora_jax.method.activations
    norm_eps: float
    patch_size: int
    channels: int = 3
    frames: int = 1  # frames that a patch spans; an image is repeated for them
    patch_bias: bool = False
    bias: bool = True  # of all projections
    embed_norm: bool = False  # a norm between the embeddings and the layers
    final_norm: bool = False
    rms_norm: bool = False  # norms without mean and bias; False: layer norms
    gated: bool = False  # phi(x W_gate) * (x W_up); False: phi(x W_in)
    table: PositionTable = "none"
    side: int = 0  # rows and columns of the table of positions
    rope_theta: float = 0.0  # of rows and columns; 0: no rotary embedding
    # True if frequencies are those of rows and of columns in turn; False: both have the same.
    alternates: bool = False
    # Sides of an attention window in merged patches; 0: every layer attends to whole images.
    window: int = 0
    whole_layers: tuple[int, ...] = ()  # layers without windows

    @property
    def kind(self) -> str:
        """The kind of input."""
        return "image"

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.d_model // self.n_heads

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every base parameter by path, layers stacked."""
        d = self.d_model
        inputs = self.frames * self.patch_size**2 * self.channels
        shapes = dense_shapes("patches", (inputs, d), self.patch_bias)
        if self.table != "none":
            shapes["positions/embedding"] = (self.side**2, d)
        if self.embed_norm:
            shapes |= norm_shapes("embed_norm", d, self.rms_norm)
        if self.final_norm:
            shapes |= norm_shapes("final_norm", d, self.rms_norm)
        layer: VisionShapes = {}
        for name in ("attn_norm", "ffn_norm"):
            layer |= norm_shapes(name, d, self.rms_norm)
        for path, shape in self.projection_shapes().items():
            layer |= dense_shapes(path.removeprefix("layers/"), shape, self.bias)
        return shapes | {
            f"layers/{path}": (self.n_layers, *shape) for path, shape in layer.items()
        }

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


def norm_shapes(name: str, width: int, rms_norm: bool = False) -> VisionShapes:
    """Returns the shapes of a norm's parameters."""
    if rms_norm:
        return {f"{name}/scale": (width,)}
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


@dataclass(frozen=True)
class PatchSpec:
    """A tower of patches and the projector of a decoder.

    Squares of ``merge`` by ``merge`` patches become one token: their features are normed,
    concatenated and passed through ``phi(x W_in) W_out``, with ``narrows`` after a matmul to the
    tower's width. With ``taps``, the outputs of these
    layers of the tower have projectors of their own, whose results are added to the outputs of the
    decoder's first layers (DeepStack).
    """

    packed: ClassVar[bool] = True
    mutual: ClassVar[bool] = False  # tokens of an image see each other causally

    model_type: str  # of the multimodal model: "qwen3_vl"
    tower: PatchTower
    d_model: int  # of the decoder
    image_token: int  # id of the token that image features replace
    merge: int  # patches along a side of the square that becomes one token
    activation: str = "gelu"  # of the projector
    hidden: int = 0  # width of its activations; 0: of the merged features
    norm: ProjectorNorm = "patches"
    norm_eps: float = 1e-6
    narrows: bool = False
    bias: bool = True  # of the projector
    taps: tuple[int, ...] = ()  # layers of the tower

    @property
    def patch_tokens(self) -> int:
        """Patches of one token."""
        return self.merge**2

    @property
    def merged(self) -> int:
        """Width of the features of a token's patches."""
        return self.patch_tokens * self.tower.d_model

    @property
    def hidden_width(self) -> int:
        """Width of the projector's activations."""
        return self.hidden or self.merged

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every parameter by path: ``image/...``, ``projector/...`` and
        ``deepstack/...``."""
        tower = self.tower
        shapes = {
            f"image/{path}": shape for path, shape in tower.param_shapes().items()
        }
        if self.norm != "none":
            width = self.merged if self.norm == "merged" else tower.d_model
            shapes |= norm_shapes("projector/norm", width, tower.rms_norm)
        if self.taps:
            norms = norm_shapes("deepstack/norm", self.merged)
            shapes |= {path: (len(self.taps), *shape) for path, shape in norms.items()}
        for path, shape in self._projectors().items():
            depth = self.depths()[path]
            bias = self.bias and not path.startswith("projector/merged/")
            shapes |= dense_shapes(path, (depth, *shape), bias)
        return shapes

    def _projectors(self) -> VisionShapes:
        """Returns the kernel shapes of the projectors."""
        shapes: VisionShapes = {}
        names = ["projector"]
        if self.taps:
            names.append("deepstack")
        width = self.merged
        if self.narrows:
            width = self.tower.d_model
            shapes["projector/merged/out_proj"] = (self.merged, width)
        for name in names:
            shapes[f"{name}/ffn/in_proj"] = (width, self.hidden_width)
            shapes[f"{name}/ffn/out_proj"] = (self.hidden_width, self.d_model)
        return shapes

    def projection_shapes(self) -> VisionShapes:
        """Returns per-layer kernel shapes of all adaptable projections, by stacked path."""
        of_tower = self.tower.projection_shapes()
        shapes = {f"image/{path}": shape for path, shape in of_tower.items()}
        return shapes | self._projectors()

    def depths(self) -> dict[str, int]:
        """Returns the number of stacked layers by path of `projection_shapes`."""
        depths = {}
        for path in self.projection_shapes():
            depths[path] = 1
            if path.startswith("image/"):
                depths[path] = self.tower.n_layers
            elif path.startswith("deepstack/"):
                depths[path] = len(self.taps)
        return depths

    def gate_blocks(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the FFN blocks; see `nalora_jax.models.stacks.gate_blocks`."""
        tower = self.tower
        blocks: dict[str, tuple[tuple[int, ...], str]] = {
            "image/layers/ffn": ((tower.n_layers, tower.d_ff), tower.activation)
        }
        for path, (_, width) in self._projectors().items():
            if path.endswith("in_proj"):
                block = path.removesuffix("/in_proj")
                blocks[block] = ((self.depths()[path], width), self.activation)
        return blocks
