"""Loads a base model by name: weights, config, tokenizer and image processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from jax.sharding import Mesh

from nalora_jax.common.fields import Fields
from nalora_jax.config import VisionConfig
from nalora_jax.data.chat_templates import ImageTokens, SizedImageTokens
from nalora_jax.data.images.image_files import read_processor, read_sized_processor
from nalora_jax.data.images.patches import LongestSideProcessor, PatchProcessor
from nalora_jax.data.images.tiles import (
    AnyresProcessor,
    SplitProcessor,
    TileProcessor,
)
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.models import families  # noqa: F401  (enters the families that can be loaded)
from nalora_jax.models.vision.patch_config import PatchSpec
from nalora_jax.models.vision.vision_config import VisionSpec
from nalora_jax.ops.quantize import QuantizedFormat
from nalora_jax.weights import gguf, hub  # noqa: F401  (the first enters GGUF files)
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.model_files import (
    LoadedModel,
    ModelFiles,
    load_weights,
    open_files,
)
from nalora_jax.weights.tensors import require_dtype

log = logging.getLogger(__name__)


def load_model(
    source: str | ResolvedSource,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    quantized: QuantizedFormat | None = None,
    images: bool = False,
) -> LoadedModel:
    """Loads a model by name.

    Args:
      source: an alias, a Hugging Face folder, a GGUF file or a hub id (see
        `weights.hub.resolve_source`), or the result of `resolve_source`.
      dtype: of the parameters, "bfloat16" or "float32".
      mesh: devices that share the parameters, by the rules of `nalora_jax.mesh.distributed`; the
        first device by default.
      quantized: store the projections' kernels as "int8", "nf4" or "mxfp4"
        (`nalora_jax.ops.quantize`) instead of ``dtype``.
      images: load a multimodal model with its vision tower and projector; by default its text
        model alone.

    Raises:
      NaloraError: the model cannot be found, read or understood; the message names the file and
        the field.
    """
    require_dtype(dtype)  # before the download
    if isinstance(source, str):
        source = hub.resolve_source(source)
    files = open_files(source, images=images)
    if files.config.vision is not None:
        files = vision_files(files)
    return load_weights(files, dtype=dtype, mesh=mesh, quantized=quantized)


def vision_files(files: ModelFiles) -> ModelFiles:
    """Adds image tokens, image processor and the tower's tensors to the files of a model with a
    tower.

    Raises:
      NaloraError: the processor or an image token is missing, or fits another model.
    """
    vision = files.config.vision
    folder = files.resolved.path
    assert vision is not None, "the files were opened with images"
    if isinstance(vision, PatchSpec):
        return _patch_files(files, vision)
    if vision.tiled:
        return _tile_files(files, vision)
    tokens = image_tokens(vision, files.raw, files.tokenizer, str(folder))
    processor = read_sized_processor(folder)
    side = vision.tower.image_size
    if processor.output != (side, side):
        raise NaloraError(
            f"{folder}: image processor",
            expected=f"images of {side} x {side}, the size that the tower was trained with",
            found=processor.output,
            remedy="set size (and crop_size) to config.json's image_size",
        )
    return replace(
        files, tokenizer=replace(files.tokenizer, images=tokens), processor=processor
    )


def _patch_files(files: ModelFiles, vision: PatchSpec) -> ModelFiles:
    """Adds image tokens and image processor to the files of a model with a tower of patches."""
    folder = files.resolved.path
    processor = read_processor(folder)
    where = f"{folder}: image processor"
    tower = vision.tower
    if not isinstance(processor, PatchProcessor):
        raise NaloraError(where, expected="a processor of patches", found="another")
    if isinstance(processor, LongestSideProcessor):
        # Its file has no squares, which the processor of texts and images adds.
        processor = replace(processor, merge=vision.merge)
    sizes = {"patch_size": tower.patch_size, "merge_size": vision.merge}
    found = {"patch_size": processor.patch_size, "merge_size": processor.merge}
    if found != sizes:
        raise NaloraError(
            where,
            expected=f"{sizes}, as in config.json",
            found=found,
            remedy="copy the processor's file from the model that the weights are from",
        )
    return _with_texts(files, vision, processor)


_FAKE = "<fake_token_around_image>"
_OF_TILES = {
    "tile": f"{_FAKE}<row_{{row}}_col_{{column}}>",
    "row_end": "\n",
    "between": "\n",
    "before": f"{_FAKE}<global-img>",
    "after": _FAKE,
}
# By ``model_type``: the texts of an image around its tokens; see `SizedImageTokens`.
IMAGE_TEXTS: dict[str, dict[str, str]] = {
    "idefics3": _OF_TILES,
    "smolvlm": _OF_TILES,
    "llava_next": {},
    "llava_onevision": {},
    "lfm2_vl": {
        "first": "<|image_start|>",
        "tile": "<|img_row_{row}_col_{column}|>",
        "between": "<|img_thumbnail|>",
        "after": "<|image_end|>",
    },
    "mistral3": {"row_end": "[IMG_BREAK]", "after": "[IMG_END]"},
}
# Fields of config.json: the tokens before and after an image of the other families, whose templates
# write them.
_AROUND = {"before": "vision_start_token_id", "after": "vision_end_token_id"}


def _with_texts(
    files: ModelFiles,
    vision: VisionSpec | PatchSpec,
    processor: PatchProcessor | TileProcessor,
) -> ModelFiles:
    """Returns files with their image processor, and with the texts of images of any size.

    Raises:
      NaloraError: the tokenizer has no such token.
    """
    where = str(files.resolved.path)
    number = vision.image_token
    token = special_text(files.tokenizer, number, "image_token_id", where)
    placeholder = token
    texts = IMAGE_TEXTS.get(vision.model_type)
    if texts is None:
        texts = {}
        fields = Fields(files.raw, {}, f"{where}: config.json")
        for name, field in _AROUND.items():
            token_id = fields.integer(field, low=0)
            texts[name] = special_text(files.tokenizer, token_id, field, where)
        placeholder = texts["before"] + token + texts["after"]
    tokens = SizedImageTokens(
        token, number, 0, placeholder, processor=processor, **texts
    )
    either: Any = processor  # the fields' type is the processor of images of one size
    return replace(
        files, tokenizer=replace(files.tokenizer, images=tokens), processor=either
    )


def _tile_files(files: ModelFiles, vision: VisionSpec) -> ModelFiles:
    """Adds image tokens and image processor to the files of a model whose images are in tiles."""
    folder = files.resolved.path
    where = f"{folder}: image processor"
    remedy = "copy the processor's file from the model that the weights are from"
    processor = read_processor(folder)
    kind: type[TileProcessor] = SplitProcessor
    if vision.line_breaks:
        kind = AnyresProcessor
    if not isinstance(processor, kind):
        expected = "a processor of tiles of the model's family"
        raise NaloraError(where, expected=expected, found="another", remedy=remedy)
    side = vision.tower.image_size
    if processor.side != side:
        raise NaloraError(
            where,
            expected=f"tiles of {side} x {side}, as in config.json",
            found=processor.side,
            remedy=remedy,
        )
    processor = replace(processor, tokens=vision.tokens)
    if isinstance(processor, AnyresProcessor):
        if processor.sizes != vision.sizes:
            raise NaloraError(
                f"{where}: image_grid_pinpoints",
                expected="the sizes of config.json",
                found=str(processor.sizes)[:60],
                remedy=remedy,
            )
        grid = vision.tower.grid
        processor = replace(processor, grid=grid, most_tiles=vision.most_tiles)
    return _with_texts(files, vision, processor)


Opened = TypeVar("Opened", ModelFiles, LoadedModel)


def limit_pixels(model: Opened, vision: VisionConfig) -> Opened:
    """Returns files or a model whose images have between ``vision.min_pixels`` and
    ``vision.max_pixels`` pixels.

    Raises:
      NaloraError: a lower limit above the upper one, or for a model whose images have one size.
    """
    processor: Any = model.processor
    if not isinstance(processor, PatchProcessor | TileProcessor):
        if vision.min_pixels:
            raise NaloraError(
                "--vision.min-pixels",
                expected="0: images of this model have one size",
                found=vision.min_pixels,
            )
        return model
    limited: Any = processor.with_limits(vision.min_pixels, vision.max_pixels)
    if limited == processor:
        return model
    log.info(
        "images have %s; the processor's file has %s",
        limited.describe(),
        processor.describe(),
    )
    tokens = model.tokenizer.images
    assert isinstance(tokens, SizedImageTokens)
    tokenizer = replace(model.tokenizer, images=replace(tokens, processor=limited))
    return replace(model, tokenizer=tokenizer, processor=limited)


def special_text(tokenizer: Tokenizer, token_id: int, field: str, where: str) -> str:
    """Returns the text of a special token, whose id is in ``field`` of config.json.

    Raises:
      NaloraError: the tokenizer has no such token.
    """
    text = tokenizer.backend.id_to_token(token_id)
    if text is None or tokenizer.encode(text, special=False) != [token_id]:
        expected = (
            f"a special token with the id {token_id}, as config.json's {field} states"
        )
        raise NaloraError(
            f"{where}: tokenizer.json", expected=expected, found=repr(text)
        )
    return text


def image_tokens(
    vision: VisionSpec, raw: Mapping[str, Any], tokenizer: Tokenizer, where: str
) -> ImageTokens:
    """Returns the format in which a model writes an image into its text.

    Raises:
      NaloraError: a token that its config.json names is not in its tokenizer.
    """

    token = special_text(tokenizer, vision.image_token, "image_token_index", where)
    if vision.model_type != "gemma3":
        return ImageTokens(token, vision.image_token, vision.tokens, token)
    # transformers' defaults, which a config.json of Gemma 3 may leave out
    defaults = {"boi_token_index": 255_999, "eoi_token_index": 256_000}
    fields = Fields(raw, defaults, f"{where}: config.json")
    first, last = (
        special_text(tokenizer, fields.integer(name, low=0), name, where)
        for name in defaults
    )
    return ImageTokens(
        token, vision.image_token, vision.tokens, first, f"\n\n{first}", f"{last}\n\n"
    )
