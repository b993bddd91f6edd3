"""A base model's files, opened once, and the weights that are read from them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.common.devices import WEIGHT_AXES
from nalora_jax.data.tokenizer import NO_TOKENS, AddedTokens, Tokenizer, read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import contains_text_model
from nalora_jax.models.scaled_ropes import rope_settings, set_rope_scaling
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import MXFP4_BLOCK as BLOCK
from nalora_jax.ops.quantize import MXFP4_LEVELS as LEVELS
from nalora_jax.ops.quantize import QuantizedFormat, mark_gathered
from nalora_jax.weights.hf import ResolvedSource, open_tensors
from nalora_jax.weights.keymaps import KeyMap, ParamSlot, exchange_axes, keymap_for
from nalora_jax.weights.origin import Origin, number_formats, origin
from nalora_jax.weights.quantization_config import (
    Quantization,
    quantization_of,
    with_modelopt,
)
from nalora_jax.weights.quantized import QuantizedTensors, stored_bits
from nalora_jax.weights.shards import FileTensor
from nalora_jax.weights.tensors import Index, TensorSource, load_params, param_shardings

if TYPE_CHECKING:
    from nalora_jax.data.images.image_files import ImageProcessor
    from nalora_jax.data.images.patches import PatchProcessor
    from nalora_jax.data.images.tiles import TileProcessor

log = logging.getLogger(__name__)


# Opens a model in a single file, by `ResolvedSource.kind`: its tensors, what its config.json would
# be, and its tokenizer. `nalora_jax.weights.gguf` enters its function.
SINGLE_FILES: dict[
    str, Callable[[Path], tuple[TensorSource, dict[str, Any], Tokenizer]]
] = {}


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to run."""

    config: ModelConfig
    # the frozen tree: embed, layers (stacked), final_norm, lm_head
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: str  # the base's name in its adapters, which also loads it again: see `Origin.name`
    fingerprint: str  # of all weights; see `weights.origin.fingerprint`
    # the config.json, or its equivalent for a GGUF file
    hf_config: dict[str, Any]
    origin: Origin | None = None  # source of the weights, if they were read from files
    # for a model that was loaded with images
    processor: ImageProcessor | PatchProcessor | TileProcessor | None = None
    # tokens that its tokenizer has and the base's files lack
    added: tuple[str, ...] = ()
    # of the tokenizer's files; None if it is in a GGUF file
    tokenizer_folder: Path | None = None
    resized: int = 0  # number of table rows if it differs from the files'; otherwise 0
    rope_scaling: str = ""  # in place of the files', see `ResolvedSource.rope_scaling`


@dataclass(frozen=True)
class ModelFiles:
    """A base model's files, opened once: description and tokenizer, but no weights yet."""

    resolved: ResolvedSource
    raw: dict[str, Any]  # the config.json, or its equivalent for a GGUF file
    config: ModelConfig  # as stored
    # as stored; with image tokens for a model that is loaded with images
    tokenizer: Tokenizer
    file: TensorSource | None = None  # the tensors of a model in a single file
    quantization: Quantization | None = None  # of a folder with quantized weights
    # for a model that is loaded with images
    processor: ImageProcessor | PatchProcessor | TileProcessor | None = None

    def described(self, added: AddedTokens = NO_TOKENS) -> ModelConfig:
        """Returns the architecture, with embedding rows for the added tokens."""
        if not added:
            return self.config
        tokenizer = self.tokenizer.with_tokens(added)
        rows = tokenizer.rows_for(added, self.config.vocab_size)
        return replace(self.config, vocab_size=rows)

    def tokenizer_with(self, added: AddedTokens = NO_TOKENS) -> Tokenizer:
        """Returns the tokenizer with added tokens, checked against the embedding.

        Raises:
          NaloraError: it has more tokens than the embedding has rows.
        """
        tokenizer = self.tokenizer.with_tokens(added)
        where = f"{self.resolved.path}: tokenizer"
        return tokenizer.for_embedding(self.described(added).vocab_size, where)

    def added_ids(self, added: AddedTokens) -> dict[str, int]:
        """Returns the ids of added tokens, without the tokens that the tokenizer has already.

        Raises:
          NaloraError: the tokenizer cannot encode one of the texts as a single token.
        """
        if not added:
            return {}
        present = self.tokenizer.backend.get_added_tokens_decoder().values()
        contents = {token.content for token in present}
        extended = self.tokenizer.with_tokens(added).backend
        ids = extended.get_vocab(with_added_tokens=True)
        return {text: ids[text] for text in added.texts if text not in contents}


def open_files(resolved: ResolvedSource, *, images: bool = False) -> ModelFiles:
    """Reads the description and the tokenizer of a model.

    Args:
      resolved: its files.
      images: include the vision tower and the projector in the architecture; see
        `ModelConfig.from_hf`. `nalora_jax.weights.base.vision_files` reads their files.

    Raises:
      NaloraError: the files are missing or damaged, or cannot be understood.
    """
    file = None
    where = resolved.path
    if resolved.kind in SINGLE_FILES:
        file, raw, tokenizer = SINGLE_FILES[resolved.kind](resolved.path)
    else:
        where = resolved.path / "config.json"
        raw = with_modelopt(read_json(where), resolved.path)
    quantization = quantization_of(raw, str(where))
    raw = set_rope_scaling(raw, resolved.rope_scaling, str(where))
    config = ModelConfig.from_hf(raw, str(where), images=images)
    if quantization is not None:
        config = replace(config, stored_bits=stored_bits(quantization, config))
    if file is None:
        tokenizer = Tokenizer.from_folder(resolved.path)
    return ModelFiles(resolved, raw, config, tokenizer, file, quantization)


def quantized_tensors(resolved: ResolvedSource) -> QuantizedTensors | None:
    """Returns the tensors of a folder with quantized weights; None for other models."""
    if resolved.kind in SINGLE_FILES:
        return None
    where = resolved.path / "config.json"
    raw = with_modelopt(read_json(where), resolved.path)
    quantization = quantization_of(raw, str(where))
    if quantization is None:
        return None
    return QuantizedTensors(open_tensors(resolved), quantization)


def load_weights(
    files: ModelFiles,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    quantized: QuantizedFormat | None = None,
) -> LoadedModel:
    """Loads the weights of a model whose files are open.

    Args:
      files: its files.
      dtype, mesh, quantized: see `nalora_jax.weights.base.load_model`.

    Raises:
      NaloraError: a tensor is missing or damaged, or has another shape.
    """
    resolved = files.resolved
    config = files.config
    tensors = files.file or open_tensors(resolved)
    named: TensorSource = JoinedLatents(Unpacked(tensors))
    if files.quantization is not None:
        named = QuantizedTensors(tensors, files.quantization)
    keymap = map_fused_experts(keymap_for(config, resolved.kind), named.shapes())
    shapes = param_shapes(config)
    shardings = param_shardings(shapes, mesh)
    loaders = None
    if isinstance(named, QuantizedTensors) and quantized is None:
        loaders = named.loaders(keymap, shapes, dtype)
    params = load_params(
        shapes,
        named,
        keymap,
        dtype=dtype,
        shardings=shardings,
        quantized=quantized,
        loaders=loaders,
    )
    params = mark_gathered(params, WEIGHT_AXES)
    described = replace(config, stored_bits=())  # the fingerprint covers the files
    source_of = origin(described, resolved, tensors, together=mesh is not None)
    if files.quantization is not None:
        # Of the weights: most tensors are scales.
        numbers = f"{files.quantization.describe()} in {number_formats(named)}"
        source_of = replace(source_of, numbers=numbers)
    log.info("base model: %s", source_of.describe())
    after = f"model.layers.{config.n_layers}."
    names = map(keymap.canonical, tensors.shapes())
    if any(name.startswith(after) for name in names):
        log.info(
            "%s: without layer %d, which predicts further tokens (num_nextn_predict_layers)",
            resolved.path,
            config.n_layers,
        )
    if resolved.rope_scaling:
        log.info(
            "RoPE scaling %s: a context of %d tokens",
            resolved.rope_scaling,
            config.max_positions,
        )
    model_type = files.raw.get("model_type")
    if config.vision is None and contains_text_model(model_type, images=False):
        log.info(
            "%s: the text model of %s, without its image tower",
            resolved.path,
            model_type,
        )
    folder = None
    if resolved.kind == "hf":
        folder = resolved.path
    return LoadedModel(
        config,
        params,
        files.tokenizer_with(),
        source_of.name,
        source_of.fingerprint,
        files.raw,
        source_of,
        files.processor,
        tokenizer_folder=folder,
        rope_scaling=resolved.rope_scaling,
    )


def rope_of(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the RoPE fields of a model's ``config.json`` if a run changed them; otherwise {}."""
    if not loaded.rope_scaling:
        return {}
    return rope_settings(loaded.hf_config)


# ---------------------------------------------------------------- experts in other forms
#
# MXFP4, as gpt-oss is released:
#
#     X_blocks uint8 [E, d_out, d_in / 32, 16]     two codes per byte, the lower bits first
#     X_scales uint8 [E, d_out, d_in / 32]         exponents, see `nalora_jax.ops.quantize`
#         -> X float32 [E, d_in, d_out]            as in a file of floats; a slice reads its blocks
#
# Two stacks a layer, as transformers 5 holds mixtures and some releases are stored; a key map with
# one tensor per expert reads both forms:
#
#     X.experts.gate_up_proj [E, 2 d_ff, d_model]
#         -> X.experts.<e>.gate_proj.weight [d_ff, d_model], X.experts.<e>.up_proj.weight
#     X.experts.down_proj [E, d_model, d_ff]
#         -> X.experts.<e>.down_proj.weight [d_model, d_ff]

_BLOCKS = "_blocks"
_SCALES = "_scales"
# The two float32 levels of a byte, as one number that is looked up at once.
_PAIRS = np.array(
    [(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)], np.float32
).view(np.uint64)[:, 0]
with np.errstate(over="ignore"):
    _POWERS = np.ldexp(np.float32(1), np.arange(256) - 127)
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# By fused tensor: the projections along its axis of outputs.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Unpacked(TensorSource):
    """The tensors of a source, those in MXFP4 as floats, which are exact in float32.

    Raises:
      NaloraError: blocks and scales do not belong together.
    """

    def __init__(self, source: TensorSource) -> None:
        """Pairs blocks with scales and replaces both by one tensor ``[experts, d_in, d_out]``."""
        self.where = source.where
        self._source = source
        self._shapes = dict(source.shapes())
        self._packed = {
            name.removesuffix(_BLOCKS)
            for name in self._shapes
            if name.endswith(_BLOCKS)
        }
        for stem in self._packed:
            shape = self._shapes.pop(stem + _BLOCKS)
            scales = self._shapes.pop(stem + _SCALES, None)
            if len(shape) != 4 or shape[-1] * 2 != BLOCK or scales != shape[:-1]:
                raise NaloraError(
                    f"{source.where}: {stem}{_BLOCKS}",
                    expected=f"[experts, outputs, inputs / {BLOCK}, {BLOCK // 2}], and scales "
                    "without the last axis",
                    found=f"{shape} and {scales or 'no scales'}",
                )
            self._shapes[stem] = (shape[0], shape[2] * BLOCK, shape[1])

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        if name not in self._packed:
            self._source.check_readable(name)
            return
        for stored in (name + _BLOCKS, name + _SCALES):
            if (found := self._source.stored(stored).format) != "U8":
                raise NaloraError(f"{self.where}: {stored}", expected="U8", found=found)

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of one in MXFP4, of its blocks."""
        if name in self._packed:
            name += _BLOCKS
        return self._source.stored(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor as floats; of one in MXFP4, from the blocks that it
        overlaps."""
        if name not in self._packed:
            return self._source.read(name, index)
        experts, inputs, outputs = index
        first = inputs.start // BLOCK
        place = (experts, outputs, slice(first, -(-inputs.stop // BLOCK)))
        codes = slice(0, BLOCK // 2)
        blocks = self._source.read(name + _BLOCKS, (*place, codes)).view(np.uint8)
        scales = self._source.read(name + _SCALES, place).view(np.uint8)
        # [experts, outputs, blocks, 16] -> [experts, outputs, blocks, 32]
        values = np.take(_PAIRS, blocks).view(np.float32)
        values *= np.take(_POWERS, scales)[..., None]
        # [experts, outputs, inputs of all blocks read] -> [experts, inputs, outputs]
        flat = values.reshape(*values.shape[:2], -1)
        start = inputs.start - first * BLOCK
        stop = inputs.stop - first * BLOCK
        return flat[..., start:stop].swapaxes(-1, -2)


class JoinedLatents(TensorSource):
    """The tensors of a source, with the projection of latents to keys and values as one tensor.

    llama.cpp stores it by heads, the keys' part with exchanged axes, since its products are
    absorbed::

        X_k_b [heads, kv_rank, nope_dim], X_v_b [heads, value_dim, kv_rank]
            -> X_kv_b [heads * (nope_dim + value_dim), kv_rank]
    """

    def __init__(self, source: TensorSource) -> None:
        self.where = source.where
        self._source = source
        self._shapes = dict(source.shapes())
        self._joined: dict[str, tuple[str, str]] = {}
        for name, shape in source.shapes().items():
            keys = name.endswith(".attn_k_b.weight")
            values = name.replace("_k_b", "_v_b")
            if not keys or values not in self._shapes:
                continue
            of_values = self._shapes[values]
            if len(shape) != 3 or of_values[::2] != shape[:2]:
                raise NaloraError(
                    f"{source.where}: {values}",
                    expected=f"[heads, values, latents] of {name} {shape}",
                    found=of_values,
                )
            del self._shapes[name], self._shapes[values]
            joined = name.replace("_k_b", "_kv_b")
            heads, rank, nope_dim = shape
            self._shapes[joined] = (heads * (nope_dim + of_values[1]), rank)
            self._joined[joined] = (name, values)

    def check_readable(self, name: str) -> None:
        """Raises a NaloraError unless `read` supports the tensor's number format."""
        for part in self._joined.get(name, (name,)):
            self._source.check_readable(part)

    def stored(self, name: str) -> FileTensor:
        """Returns the location of a tensor's bytes; of a joined one, of the keys' part."""
        return self._source.stored(self._joined.get(name, (name,))[0])

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor; of a joined one, from the heads that it overlaps."""
        if name not in self._joined:
            return self._source.read(name, index)
        keys, values = self._joined[name]
        rows, columns = index
        shapes = self._source.shapes()
        nope_dim = shapes[keys][2]
        value_dim = shapes[values][1]
        width = nope_dim + value_dim
        heads = slice(rows.start // width, -(-rows.stop // width))
        k = self._source.read(keys, (heads, columns, slice(0, nope_dim)))
        v = self._source.read(values, (heads, slice(0, value_dim), columns))
        if k.dtype != v.dtype:
            k = k.astype(np.float32)
            v = v.astype(np.float32)
        # [heads, nope_dim + value_dim, columns]
        joined = np.concatenate([k.swapaxes(1, 2), v], axis=1)
        start = rows.start - heads.start * width
        stop = rows.stop - heads.start * width
        return joined.reshape(-1, joined.shape[-1])[start:stop]


def map_fused_experts(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> KeyMap:
    """Returns the key map of a file with tensors of these shapes, which may fuse the experts of a
    layer, or have stacks of them whose last two axes are exchanged.

    Each such tensor replaces the tensors of the single experts, or the stack, in the key map.
    """
    tensors = dict(keymap.by_name)
    for name_in_file, shape_in_file in shapes.items():
        name = keymap.canonical(name_in_file)
        if name in tensors and tensors[name].transform.halves:
            exchanged = exchange_axes(tensors[name])
            if exchanged.shape == tuple(shape_in_file):
                tensors[name] = exchanged
        match = _FUSED.fullmatch(name)
        if match is None or name in tensors:
            continue
        stems = [f"{match[1]}.{{}}.{part}.weight" for part in _PARTS[match[2]]]
        # Expert 0 has the shapes and slots of all; the loop below counts the experts.
        parts = [tensors[stem.format(0)] for stem in stems if stem.format(0) in tensors]
        count = 0
        while all(stem.format(count) in tensors for stem in stems):
            for stem in stems:
                del tensors[stem.format(count)]
            count += 1
        if count:  # [outputs, inputs] each -> [experts, outputs of all parts, inputs]
            rows = tuple(part.shape[0] for part in parts)
            slots: list[ParamSlot] = []
            for part in parts:
                slots += [ParamSlot(slot.path, slot.layer) for slot in part.slots]
            shape = (count, sum(rows), parts[0].shape[1])
            tensors[name] = replace(
                parts[0], name=name, shape=shape, slots=tuple(slots), rows=rows
            )
    return replace(keymap, tensors=tuple(tensors.values()))
