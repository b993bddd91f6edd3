"""Loads a base model by name: weights, config, tokenizer and image processor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nalora_jax import distributed, trees
from nalora_jax.data.images.processor import ImageProcessor, read_processor
from nalora_jax.distributed.mesh import WEIGHT_AXES
from nalora_jax.errors import NaloraError
from nalora_jax.fields import Fields
from nalora_jax.image_tokens import ImageTokens
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import contains_text_model
from nalora_jax.models.rope_scaling import rope_settings, with_rope_scaling
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.vision.sight import Sight
from nalora_jax.ops.quantize import Kind, gathered
from nalora_jax.tokenizer import NO_TOKENS, AddedTokens, Tokenizer, read_json
from nalora_jax.weights import hub
from nalora_jax.weights.fused_experts import with_experts
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.gguf_config import hf_config
from nalora_jax.weights.gguf_tokenizer import read_tokenizer
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.mxfp4 import with_floats
from nalora_jax.weights.origin import Origin, origin
from nalora_jax.weights.streamed import StreamedFolder
from nalora_jax.weights.tensors import DTYPES, TensorSource, load_params
from nalora_jax.weights.vision.sight import model_keymap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to run."""

    config: ModelConfig
    params: dict[str, Any]  # the frozen tree: embed, layers (stacked), final_norm, lm_head
    tokenizer: Tokenizer
    source: str  # the base's name in its adapters, which also loads it again: see `Origin.name`
    fingerprint: str  # of all weights; see `weights.origin.fingerprint`
    hf_config: dict[str, Any] | None  # the config.json, or its equivalent for a GGUF file
    origin: Origin | None = None  # source of the weights, if they were read from files
    processor: ImageProcessor | None = None  # for a model that was loaded with images
    added: tuple[str, ...] = ()  # tokens that its tokenizer has and the base's files lack
    tokenizer_folder: Path | None = None  # of the tokenizer's files; None if it is in a GGUF file
    resized: int = 0  # number of table rows if it differs from the files'; otherwise 0
    rope_scaling: str = ""  # in place of the files', see `ResolvedSource.rope_scaling`


def read_config(
    resolved: hub.ResolvedSource, *, images: bool = False, added: AddedTokens = NO_TOKENS
) -> ModelConfig:
    """Reads the architecture of a model from its description, without any weights.

    Args:
      resolved: its files.
      images: include the vision tower and projector; see `ModelConfig.from_hf`.
      added: tokens for which the embedding gets rows.

    Raises:
      NaloraError: the description cannot be read or understood.
    """
    if resolved.kind == "gguf":
        where, raw = resolved.path, hf_config(GGUFFile(resolved.path))
    else:
        where = resolved.path / "config.json"
        raw = read_json(where)
    raw = with_rope_scaling(raw, resolved.rope_scaling, str(where))
    config = ModelConfig.from_hf(raw, str(where), images=images)
    if not added:
        return config
    return replace(
        config, vocab_size=_files_tokenizer(resolved).with_tokens(added).rows_for(added, config.vocab_size)
    )


def added_ids(resolved: hub.ResolvedSource, added: AddedTokens) -> dict[str, int]:
    """Returns the ids of added tokens, without the tokens that the model's tokenizer has already.

    Args:
      resolved: the model's files.
      added: the tokens.

    Raises:
      NaloraError: the tokenizer cannot be read, or cannot encode one of the texts as a single
        token.
    """
    if not added:
        return {}
    before = _files_tokenizer(resolved)
    held = {token.content for token in before.backend.get_added_tokens_decoder().values()}
    ids = before.with_tokens(added).backend.get_vocab(with_added_tokens=True)
    return {text: ids[text] for text in added.texts if text not in held}


def _files_tokenizer(resolved: hub.ResolvedSource) -> Tokenizer:
    if resolved.kind == "gguf":
        return read_tokenizer(GGUFFile(resolved.path))
    return Tokenizer.from_folder(resolved.path)


def read_tokenizer_of(
    resolved: hub.ResolvedSource, config: ModelConfig, added: AddedTokens = NO_TOKENS
) -> Tokenizer:
    """Returns a model's tokenizer with added tokens, checked against its embedding.

    No weight is read.

    Raises:
      NaloraError: its files are missing or damaged.
    """
    tokenizer = _files_tokenizer(resolved).with_tokens(added)
    tokenizer = tokenizer.for_embedding(config.vocab_size, f"{resolved.path}: tokenizer")
    if config.sight is None:
        return tokenizer
    return _seeing(tokenizer, config.sight, resolved.path)


def load_model(
    source: str | hub.ResolvedSource,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    cache: Path | None = None,
    quantized: Kind | None = None,
    images: bool = False,
) -> LoadedModel:
    """Loads a model by name.

    Args:
      source: an alias, a Hugging Face folder, a GGUF file or a hub id (see `weights.hub.resolve`),
        or the result of `resolve`.
      dtype: of the parameters, "bfloat16" or "float32".
      mesh: devices that share the parameters, by the rules of `nalora_jax.distributed`; the first
        device by default.
      cache: folder for downloaded packages.
      quantized: store the projections' kernels as "int8", "nf4" or "mxfp4"
        (`nalora_jax.ops.quantize`) instead of ``dtype``.
      images: load a multimodal model with its vision tower and projector; by default its text
        model alone.

    Raises:
      NaloraError: the model cannot be found, read or understood; the message names the file and
        the field.
    """
    if dtype not in DTYPES:  # checked before the download
        raise NaloraError("dtype", expected=" or ".join(DTYPES), found=repr(dtype))
    resolved = hub.resolve(source, cache) if isinstance(source, str) else source
    raw, config, tensors, tokenizer = _opened(resolved, images)
    tokenizer = tokenizer.for_embedding(config.vocab_size, f"{resolved.path}: tokenizer")
    processor = None
    if config.sight is not None:
        tokenizer = _seeing(tokenizer, config.sight, resolved.path)
        processor = _processor(resolved.path, config.sight)
    keymap = model_keymap(config, resolved.kind)
    shardings = None if mesh is None else _shardings(config, mesh)
    floats = with_experts(with_floats(tensors), keymap)
    params = load_params(config, floats, keymap, dtype=dtype, shardings=shardings, quantized=quantized)
    params = gathered(params, WEIGHT_AXES)
    source_of = origin(config, resolved, tensors, together=mesh is not None)
    log.info("base model: %s", source_of.describe())
    if resolved.rope_scaling:
        log.info("RoPE scaling %s: a context of %d tokens", resolved.rope_scaling, config.max_positions)
    if config.sight is None and contains_text_model(raw.get("model_type"), images=False):
        log.info("%s: the text model of %s, without its image tower", resolved.path, raw["model_type"])
    folder = resolved.path if resolved.kind == "hf" else None
    return LoadedModel(
        config,
        params,
        tokenizer,
        source_of.name,
        source_of.fingerprint,
        raw,
        source_of,
        processor,
        tokenizer_folder=folder,
        rope_scaling=resolved.rope_scaling,
    )


def _opened(
    resolved: hub.ResolvedSource, images: bool
) -> tuple[dict[str, Any], ModelConfig, TensorSource, Tokenizer]:
    """Returns the description, tensors (not read yet) and tokenizer of either kind of source."""
    if resolved.kind == "gguf":
        file = GGUFFile(resolved.path)
        raw = with_rope_scaling(hf_config(file), resolved.rope_scaling, str(resolved.path))
        return raw, ModelConfig.from_hf(raw, str(resolved.path), images=images), file, read_tokenizer(file)
    where = resolved.path / "config.json"
    raw = with_rope_scaling(read_json(where), resolved.rope_scaling, str(where))
    config = ModelConfig.from_hf(raw, str(where), images=images)
    tensors = (
        StreamedFolder(resolved.path, resolved.streamed)
        if resolved.streamed
        else SafetensorsFolder(resolved.path)
    )
    return raw, config, tensors, Tokenizer.from_folder(resolved.path)


def rope_of(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the RoPE fields of a model's ``config.json`` if a run changed them; otherwise {}."""
    if not loaded.rope_scaling:
        return {}
    return rope_settings(loaded.hf_config or {})


def image_tokens(sight: Sight, raw: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> ImageTokens:
    """Returns the format in which a model writes an image into its text.

    Raises:
      NaloraError: a token that its config.json names is not in its tokenizer.
    """

    def named(token_id: int, field: str) -> str:
        text = tokenizer.backend.id_to_token(token_id)
        if text is None or tokenizer.encode(text, special=False) != [token_id]:
            expected = f"a special token with the id {token_id}, as config.json's {field} says"
            raise NaloraError(f"{where}: tokenizer.json", expected=expected, found=repr(text))
        return text

    token = named(sight.image_token, "image_token_index")
    if sight.model_type != "gemma3":
        return ImageTokens(token, sight.image_token, sight.tokens, token)
    f = Fields(raw, {"boi_token_index": 255_999, "eoi_token_index": 256_000}, f"{where}: config.json")
    first, last = (named(f.integer(name, low=0), name) for name in ("boi_token_index", "eoi_token_index"))
    return ImageTokens(token, sight.image_token, sight.tokens, first, f"\n\n{first}", f"{last}\n\n")


def _seeing(tokenizer: Tokenizer, sight: Sight, folder: Path) -> Tokenizer:
    raw = read_json(folder / "config.json")
    return replace(tokenizer, images=image_tokens(sight, raw, tokenizer, str(folder)))


def _processor(folder: Path, sight: Sight) -> ImageProcessor:
    processor, side = read_processor(folder), sight.tower.image_size
    if processor.output != (side, side):
        raise NaloraError(
            f"{folder}: image processor",
            expected=f"images of {side} x {side}, which the tower was made for",
            found=processor.output,
            remedy="set size (and crop_size) to config.json's image_size",
        )
    return processor


def _shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(config).items()}
    return trees.flatten(distributed.shardings(trees.unflatten(shapes), mesh, distributed.PARAM_RULES))
