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
# its corners aligned (Qwen3-VL).
PatchTable = Literal["none", "corners"]


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
    rms_norm: bool = False  # norms without mean and bias; False: layer norms
    gated: bool = False  # phi(x W_gate) * (x W_up); False: phi(x W_in)
    table: PatchTable = "none"
    side: int = 0  # rows and columns of the table of positions
    rope_theta: float = 0.0  # of rows and columns; 0: no rotary embedding
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
        layer: VisionShapes = {}
        for name in ("attn_norm", "ffn_norm"):
            layer |= norm_shapes(name, d, self.rms_norm)
        for path, shape in self.projection_shapes().items():
            layer |= dense_shapes(path.removeprefix("layers/"), shape)
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
    concatenated and passed through ``phi(x W_in) W_out``. With ``taps``, the outputs of these
    layers of the tower have projectors of their own, whose results are added to the outputs of the
    decoder's first layers (DeepStack).
    """

    packed: ClassVar[bool] = True
    # fields of config.json: the tokens before and after an image
    around: ClassVar[tuple[str, str]] = (
        "vision_start_token_id",
        "vision_end_token_id",
    )
    mutual: ClassVar[bool] = False  # tokens of an image see each other causally

    model_type: str  # of the multimodal model: "qwen3_vl"
    tower: PatchTower
    d_model: int  # of the decoder
    image_token: int  # id of the token that image features replace
    merge: int  # patches along a side of the square that becomes one token
    activation: str = "gelu"  # of the projector
    taps: tuple[int, ...] = ()  # layers of the tower

    @property
    def patch_tokens(self) -> int:
        """Patches of one token."""
        return self.merge**2

    @property
    def merged(self) -> int:
        """Width of the features of a token's patches."""
        return self.patch_tokens * self.tower.d_model

    def param_shapes(self) -> VisionShapes:
        """Returns the shape of every parameter by path: ``image/...``, ``projector/...`` and
        ``deepstack/...``."""
        tower = self.tower
        shapes = {
            f"image/{path}": shape for path, shape in tower.param_shapes().items()
        }
        shapes |= norm_shapes("projector/norm", tower.d_model, tower.rms_norm)
        if self.taps:
            norms = norm_shapes("deepstack/norm", self.merged)
            shapes |= {path: (len(self.taps), *shape) for path, shape in norms.items()}
        for path, shape in self._projectors().items():
            depth = self.depths()[path]
            shapes |= dense_shapes(path, (depth, *shape))
        return shapes

    def _projectors(self) -> VisionShapes:
        """Returns the kernel shapes of the projectors."""
        shapes: VisionShapes = {}
        names = ["projector"]
        if self.taps:
            names.append("deepstack")
        for name in names:
            shapes[f"{name}/ffn/in_proj"] = (self.merged, self.merged)
            shapes[f"{name}/ffn/out_proj"] = (self.merged, self.d_model)
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
