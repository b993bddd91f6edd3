"""Maps a file's tensors to leaves of the parameter tree, by the rows of a family's record.

A row names a tensor, the leaves that it fills (several for a fused projection), and the
transformation of each. Shapes follow from the model's config, so a `KeyMap` lists exactly the
tensors that a file must contain::

    HF    model.layers.3.mlp.gate_proj.weight [d_ff, d]
            -> layers/ffn/gate_proj/kernel [3]  (transposed)
    HF    model.layers.3.mlp.gate_up_proj.weight [2 d_ff, d]
            -> layers/ffn/gate_proj/kernel [3], layers/ffn/up_proj/kernel [3]
    HF    model.layers.3.mlp.experts.gate_up_proj [E, d, 2 d_ff]
            -> layers/ffn/gate_proj/kernel [3], layers/ffn/up_proj/kernel [3]  (columns alternate)
    GGUF  blk.3.attn_q.weight [heads * head_dim, d]
            -> layers/attn/q_proj/kernel [3]  (row pairs regrouped)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import BUILT_IN, GGUF, family_of
from nalora_jax.models.stacks import param_shapes, stacks
from nalora_jax.models.tensor_rows import TensorNames, TensorRow

if TYPE_CHECKING:
    from nalora_jax.models.vision.patch_config import PatchTower
    from nalora_jax.models.vision.vision_config import DualConfig, EncoderConfig

_Array = Any  # NumPy or JAX arrays: conversions use only methods that both have
T = TypeVar("T")


@dataclass(frozen=True)
class ParamSlot:
    """A position in the parameter tree.

    ``layer`` indexes a stacked leaf, ``expert`` the axis after it.
    """

    path: str  # e.g. "layers/ffn/gate_proj/kernel"
    layer: int | None = None
    expert: int | None = None  # None in a mixture: the tensor contains all experts

    @property
    def index(self) -> tuple[int, ...]:
        """The position on the leading axes of the leaf."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


@dataclass(frozen=True)
class Transform:
    """The conversion of a tensor when it is loaded, and its inverse."""

    into: Callable[[_Array], _Array]
    back: Callable[[_Array], _Array]
    swaps: bool = False  # exchanges the last two axes
    # a slice of the result needs more than the same slice of the tensor
    mixes_rows: bool = False
    alternates: bool = False  # the slots' columns alternate along the last axis
    halves: bool = False  # the slots follow each other along the last axis
    # of the file's tensor, if it is not a reordered leaf's
    shape: tuple[int, ...] | None = None

    def reordered(self, axes: tuple[T, ...]) -> tuple[T, ...]:
        """Converts a shape or an index between the file's order of axes and ours."""
        if not self.swaps:
            return axes
        return (*axes[:-2], axes[-1], axes[-2])


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a file and the slots that it fills."""

    name: str  # canonical name, see `KeyMap.canonical`
    shape: tuple[int, ...]
    slots: tuple[ParamSlot, ...]
    # of each slot along `axis`, which all share if columns alternate
    rows: tuple[int, ...]
    transform: Transform

    @property
    def axis(self) -> int:
        """The axis of outputs, along which slots follow each other; a stack of experts has it
        second, or last if it is stored as it is multiplied."""
        if self.transform.halves:
            return len(self.shape) - 1
        return max(len(self.shape) - 2, 0)

    def join(self, parts: Sequence[_Array]) -> np.ndarray:
        """Builds the file's tensor from its slots, each in our layout."""
        arrays = [np.asarray(self.transform.back(array)) for array in parts]
        if self.transform.alternates:
            # [..., width, slots] -> [..., width * slots]
            return np.stack(arrays, axis=-1).reshape(self.shape)
        if len(arrays) == 1:
            return arrays[0]
        return np.concatenate(arrays, axis=self.axis)


@dataclass(frozen=True)
class KeyMap:
    """The complete mapping between one family's files of one format and the parameter tree."""

    tensors: tuple[SourceTensor, ...]
    # regexes of canonical names whose tensors are not loaded
    ignored: tuple[str, ...] = ()
    # (name, other): optional, must equal `other`
    aliases: tuple[tuple[str, str], ...] = ()
    # (regex, replacement) to canonical names
    renames: tuple[tuple[str, str], ...] = ()

    @cached_property
    def by_name(self) -> dict[str, SourceTensor]:
        """Every tensor by its canonical name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def canonical(self, name: str) -> str:
        """Returns a tensor's name without wrappers' prefixes (e.g. a multimodal model's)."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Returns True if a file's tensor is known and not needed."""
        return any(re.search(pattern, self.canonical(name)) for pattern in self.ignored)

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> dict[str, str]:
        """Checks that a file has exactly the expected tensors with the expected shapes.

        Args:
          shapes: shape of every tensor of the file(s), by its name in the file.
          where: the file or folder, for the message.

        Returns:
          The file's name of every tensor, by canonical name.

        Raises:
          NaloraError: a tensor is missing, unknown, present twice, or has another shape.
        """

        def error(expected: object, found: object, at: str = where) -> NaloraError:
            return NaloraError(at, expected=expected, found=found)

        names: dict[str, str] = {}
        for name, shape in shapes.items():
            canonical = self.canonical(name)
            if canonical in dict(self.aliases) or self.is_ignored(name):
                continue
            tensor = self.by_name.get(canonical)
            if tensor is None:
                found = f"the unknown tensor {name} {shape}"
                raise error(self._nearest(canonical), found)
            if canonical in names:
                raise error(f"{canonical} once", f"{names[canonical]} and {name}")
            if tuple(shape) != tensor.shape:
                expected = f"the shape {tensor.shape}"
                raise error(expected, tuple(shape), f"{where}: {name}")
            names[canonical] = name
        missing = [name for name in self.by_name if name not in names]
        if missing:
            found = f"no {', '.join(missing[:3])}"
            if len(missing) > 3:
                found += f" and {len(missing) - 3} more"
            raise error(f"{len(self.by_name)} tensors", found)
        return names

    def _nearest(self, name: str) -> str:
        """Describes the expected tensors that are closest to an unknown name."""
        of_first_layer = re.sub(r"\d+", "0", name)
        # Without the last part of the name, then without the last two.
        for parts in (1, 2):
            stem, *_ = of_first_layer.rsplit(".", parts)
            near = [known for known in self.by_name if known.startswith(stem)]
            if near:
                listed = ", ".join(near[:4])
                return f"only tensors that config.json asks for (here {listed})"
        return "only tensors that config.json asks for"


_ROTARY = (r"rotary_emb\.inv_freq$", r"rotary_emb\.(cos|sin)_cached$")
# Vision tensors that a multimodal model has next to the text model.
VISION_TENSORS = (
    r"^(model\.)?vision_tower\.",
    r"^(model\.)?(multi_modal_projector|mm_projector)\.",
    r"^(model\.)?visual\.",
    r"^(model\.)?(vision_model|connector)\.",
    r"^(model\.)?image_newline$",
)
HF_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.text_model\.", "model."),
    (
        r"^(model\.)?language_model\.(model\.)?(?=(embed_tokens|embedding_norm|layers|norm)\.)",
        "model.",
    ),
)
# Frequency factors (llama3, LongRoPE) are tensors there: the loader reads them into the config,
# not into parameters.
GGUF_IGNORED = (
    r"^rope_freqs\.weight$",
    r"^(blk\.\d+\.)?rope_factors_(long|short)\.weight$",
)


# Functions of `nalora_jax.weights.encoders`, which enters them: "keymap" of an encoder, a pair, or
# a decoder with an image tower, and "modules" of their projections for PEFT.
OF_ENCODERS: dict[str, Callable[[Any], Any]] = {}


def keymap_for(
    config: ModelConfig | DualConfig | EncoderConfig, source: TensorNames = "hf"
) -> KeyMap:
    """Returns the key map of the files of a decoder, a dual encoder or one tower.

    Args:
      config: the model. llama.cpp's files have no image tower.
      source: "hf" (safetensors with transformers' names) or "gguf" (llama.cpp's names).

    Raises:
      NaloraError: llama.cpp's names of this family are not known here.
    """
    keymap: KeyMap
    if not isinstance(config, ModelConfig):
        keymap = OF_ENCODERS["keymap"](config)
        return keymap
    if config.vision is not None and source == "hf":
        keymap = OF_ENCODERS["keymap"](config)
        return keymap
    config = replace(config, vision=None)
    family = family_of(config.model_type)
    shapes = param_shapes(config)
    if source == "hf":
        rows = family.tensors
        alias = ("lm_head.weight", "model.embed_tokens.weight")
        n_layers = str(config.n_layers)
        of_family = [each.replace("{n_layers}", n_layers) for each in family.ignored]
        ignored = (*_ROTARY, *VISION_TENSORS, *of_family, *_unread_keys(config))
    else:
        rows = gguf_of(config).tensors
        alias = ("output.weight", "token_embd.weight")
        ignored = GGUF_IGNORED
    tensors: list[SourceTensor] = []
    for row in rows:
        tensors += _tensors(row, shapes, config)
    check_covered(tensors, shapes, config.model_type)
    keymap = KeyMap(tuple(tensors), ignored)
    if config.tie_embeddings:
        keymap = replace(keymap, aliases=(alias,))
    if source == "hf":
        keymap = replace(keymap, renames=HF_RENAMES)
    return keymap


def check_covered(
    tensors: Iterable[SourceTensor], shapes: Iterable[str], name: str
) -> None:
    """Fails if the tensors do not fill all leaves of a model, or fill others."""
    filled = set()
    for tensor in tensors:
        filled |= {slot.path for slot in tensor.slots}
    difference = filled ^ set(shapes)
    assert not difference, f"{name}: {difference}"


def gguf_of(config: ModelConfig) -> GGUF:
    """Returns llama.cpp's names of a model.

    Raises:
      NaloraError: they are not known here.
    """
    form = family_of(config.model_type).gguf
    if form is None:
        names = [name for name, family in BUILT_IN.items() if family.gguf]
        raise NaloraError(
            "GGUF",
            expected=f"one of {', '.join(names)}",
            found=config.model_type,
        )
    return form


def _unread_keys(config: ModelConfig) -> tuple[str, ...]:
    """Returns the pattern of keys and values of layers that read an earlier layer's."""
    layers: list[int] = []
    for stack in stacks(config):
        if stack.config.reads:
            layers += stack.layers
    if not layers:
        return ()
    either = "|".join(map(str, layers))
    return (rf"^model\.layers\.({either})\.self_attn\.[kv]_(proj|norm)\.",)


def _tensors(
    row: TensorRow, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> Iterator[SourceTensor]:
    """Yields the tensors of one row of a decoder."""
    if "{layer}" not in row.name:
        if row.paths[0] in shapes:
            yield from row_tensors(row, row.paths, shapes, config, ONCE)
        return
    for stack in stacks(config):
        paths = tuple(path.replace("layers", stack.prefix, 1) for path in row.paths)
        applies = row.experts in (None, stack.config.n_experts > 0)
        if applies and any(path in shapes for path in paths):
            layers: Layers = list(enumerate(stack.layers))
            yield from row_tensors(row, paths, shapes, stack.config, layers)


# Index on a stack, and number in the file, of each layer.
Layers = list[tuple[int | None, int | None]]
ONCE: Layers = [(None, None)]


def row_tensors(
    row: TensorRow,
    paths: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig | EncoderConfig | PatchTower,
    layers: Layers,
) -> Iterator[SourceTensor]:
    """Yields the tensors of a row in a stack: one per layer, or one per layer and expert.

    Args:
      row: the row.
      paths: its leaves in this stack.
      shapes: shape of every leaf by path.
      config: the decoder's stack, or the tower.
      layers: the stack's layers; `ONCE` for leaves without an axis of layers.
    """
    leading = int(layers[0][0] is not None)  # axes of layers and experts
    transform = _transform(row, shapes[paths[0]][leading:], config)
    experts: Sequence[int | None] = [None]
    if "{expert}" in row.name:
        assert isinstance(config, ModelConfig)
        experts = range(config.n_experts)
        leading += 1
    # shapes of the slots in the file, without layers and single experts
    theirs = [transform.reordered(shapes[path][leading:]) for path in paths]
    rows: tuple[int, ...] = (1,)
    shape = transform.shape
    if shape is None:
        first = theirs[0]
        axis = max(len(first) - 2, 0)  # of rows
        if transform.halves:
            axis += 1
        rows = tuple(slot[axis] for slot in theirs)
        if transform.alternates:  # the slots follow each other along the columns
            axis += 1
        total = sum(slot[axis] for slot in theirs)
        shape = (*first[:axis], total, *first[axis + 1 :])
    elif shape:  # not a scalar
        rows = shape[:1]
    for index, number in layers:
        for expert in experts:
            slots = tuple(ParamSlot(path, index, expert) for path in paths)
            name = row.name.format(layer=number, expert=expert)
            yield SourceTensor(name, shape, slots, rows, transform)


def _transform(
    row: TensorRow,
    leaf: tuple[int, ...],
    config: ModelConfig | EncoderConfig | PatchTower,
) -> Transform:
    """Returns the conversion of a row's tensors, whose leaf has the shape ``leaf`` in one layer."""
    if row.change == "transpose":
        return Transform(_swap, _swap, swaps=True)
    if row.change == "columns":
        return Transform(_same, _same, alternates=True)
    if row.change == "halves":
        return Transform(_same, _same, halves=True)
    if row.change == "minus_one":
        return Transform(lambda array: array - 1, lambda array: array + 1)
    if row.change in ("pairs", "pairs_transpose"):
        assert isinstance(config, ModelConfig)
        heads = config.n_kv_heads
        if "q_proj" in row.paths[0]:
            heads = config.n_heads
        if row.change == "pairs":
            return Transform(
                lambda x: halves_from_pairs(x, heads),
                lambda x: pairs_from_halves(x, heads),
                mixes_rows=True,
            )
        return Transform(
            lambda x: _swap(halves_from_pairs(x, heads)),
            lambda x: pairs_from_halves(_swap(x), heads),
            swaps=True,
            mixes_rows=True,
        )
    if row.change == "patches":
        # A convolution whose stride is its size is a matmul of patches:
        # [width, channels, p, p] -> [p, p, channels, width] -> [p * p * channels, width]
        assert not isinstance(config, ModelConfig)
        p = config.patch_size
        width = leaf[-1]
        return Transform(
            lambda x: x.transpose(2, 3, 1, 0).reshape(leaf),
            lambda x: x.reshape(p, p, -1, width).transpose(3, 2, 0, 1),
            mixes_rows=True,
            shape=(width, config.channels, p, p),
        )
    if row.change == "frames":
        # [width, channels, frames, p, p] -> [frames, p, p, channels, width] -> [..., width]
        assert not isinstance(config, ModelConfig)
        frames: int = config.frames  # type: ignore[union-attr]
        p = config.patch_size
        axes = (frames, p, p, config.channels, config.d_model)
        return Transform(
            lambda x: x.transpose(2, 3, 4, 1, 0).reshape(leaf),
            lambda x: x.reshape(axes).transpose(4, 3, 0, 1, 2),
            mixes_rows=True,
            shape=(config.d_model, config.channels, frames, p, p),
        )
    if leaf and row.change != "lead":
        return Transform(_same, _same)
    # Scalars, and tensors with further leading axes of length 1 in the file.
    shape = leaf
    if row.change == "lead":
        shape = (1, *leaf)
        if row.name.endswith(("cls_token", "probe")):
            shape = (1, 1, *leaf)
    return Transform(
        lambda x: x.reshape(leaf),
        lambda x: np.asarray(x).reshape(shape),
        mixes_rows=True,
        shape=shape,
    )


def exchange_axes(tensor: SourceTensor) -> SourceTensor:
    """Returns a tensor of "halves" as the releases write it that exchange its last two axes."""
    *experts, d_in, d_out = tensor.shape
    transform = Transform(_swap, _swap, swaps=True)
    return replace(tensor, shape=(*experts, d_out, d_in), transform=transform)


def _same(array: _Array) -> _Array:
    """Returns the array itself."""
    return array


def _swap(array: _Array) -> _Array:
    """Returns the array with its last two axes exchanged."""
    return array.swapaxes(-1, -2)


def halves_from_pairs(rows: _Array, heads: int) -> _Array:
    """Reorders each head's rows from llama.cpp's order to transformers'.

    Rotated partners are adjacent in llama.cpp and half a head apart in transformers.

    Example, one head of four rows: ``[0, 2, 1, 3] -> [0, 1, 2, 3]``.
    """
    half = rows.shape[0] // heads // 2
    # [heads, half, 2, ...] -> [heads, 2, half, ...]
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def pairs_from_halves(rows: _Array, heads: int) -> _Array:
    """Reorders rows to llama.cpp's order: the inverse of `halves_from_pairs`."""
    half = rows.shape[0] // heads // 2
    # [heads, 2, half, ...] -> [heads, half, 2, ...]
    halves = rows.reshape(heads, 2, half, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


TOWER = "vision_tower."  # before the names of an image tower
_IDEFICS = {
    "model.language_model.": "model.text_model.",
    f"model.{TOWER}": "model.vision_model.",
}
# By ``model_type``: prefixes of names in transformers 5 that replace most multimodal models'.
RENAMED_PARTS = {"idefics3": _IDEFICS, "smolvlm": _IDEFICS}


def file_name(config: ModelConfig | DualConfig, name: str) -> str:
    """Returns a tensor's name in the models' original repositories.

    Every transformers release can read these names.
    """
    if not isinstance(config, ModelConfig) or config.vision is None:
        return name
    parts = RENAMED_PARTS.get(config.vision.model_type)
    if parts is not None:
        name = re.sub(r"^model\.", "model.language_model.", name)
        name = re.sub(r"^(vision_tower|connector)\.", r"model.\1.", name)
        for usual, own in parts.items():
            name = name.replace(usual, own, 1)
        return name
    if config.vision.model_type == "mistral3":
        return re.sub(r"^(lm_head|model)\.", r"language_model.\1.", name)
    if config.vision.model_type == "lfm2_vl":
        name = re.sub(r"^model\.", "model.language_model.", name)
        name = re.sub(rf"^{TOWER}", f"model.{TOWER}vision_model.", name)
        return re.sub(r"^multi_modal", "model.multi_modal", name)
    if config.vision.packed:
        name = re.sub(r"^model\.", "model.language_model.", name)
        return re.sub(r"^visual\.", "model.visual.", name)
    name = re.sub(r"^(lm_head|model)\.", r"language_model.\1.", name)
    if name.startswith(TOWER):
        return name.replace(TOWER, f"{TOWER}vision_model.", 1)
    return name
