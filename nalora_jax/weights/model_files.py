"""A base model's files, opened once, and the weights that are read from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from nalora_jax.common.devices import WEIGHT_AXES
from nalora_jax.data.tokenizer import NO_TOKENS, AddedTokens, Tokenizer, read_json
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import contains_text_model
from nalora_jax.models.rope_scaling import rope_settings, with_rope_scaling
from nalora_jax.models.stacks import param_shapes
from nalora_jax.ops.quantize import Kind, gathered
from nalora_jax.weights.expert_tensors import with_experts
from nalora_jax.weights.hf import ResolvedSource, SafetensorsFolder, StreamedFolder
from nalora_jax.weights.keymaps import KeyMap, keymap_for
from nalora_jax.weights.origin import Origin, origin
from nalora_jax.weights.tensors import TensorSource, load_params, param_shardings

if TYPE_CHECKING:
    from nalora_jax.data.images.files import ImageProcessor

log = logging.getLogger(__name__)


# Opens a model in a single file, by `ResolvedSource.kind`: its tensors, what its config.json would be, and its
# tokenizer. `nalora_jax.weights.gguf_tokenizer` enters its function.
SINGLE_FILES: dict[str, Callable[[Path], tuple[TensorSource, dict[str, Any], Tokenizer]]] = {}


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


@dataclass(frozen=True)
class ModelFiles:
    """A base model's files, opened once: description and tokenizer, but no weights yet."""

    resolved: ResolvedSource
    raw: dict[str, Any]  # the config.json, or its equivalent for a GGUF file
    config: ModelConfig  # as stored
    tokenizer: Tokenizer  # as stored; with image tokens for a model that is loaded with images
    file: TensorSource | None = None  # the tensors of a model in a single file
    processor: ImageProcessor | None = None  # for a model that is loaded with images
    keymap: KeyMap | None = None  # names of the tensors, if they are not those of the text model alone

    def described(self, added: AddedTokens = NO_TOKENS) -> ModelConfig:
        """Returns the architecture, with embedding rows for the added tokens."""
        if not added:
            return self.config
        tokenizer = self.tokenizer.with_tokens(added)
        return replace(self.config, vocab_size=tokenizer.rows_for(added, self.config.vocab_size))

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
        held = {token.content for token in self.tokenizer.backend.get_added_tokens_decoder().values()}
        ids = self.tokenizer.with_tokens(added).backend.get_vocab(with_added_tokens=True)
        return {text: ids[text] for text in added.texts if text not in held}


def open_files(resolved: ResolvedSource, *, images: bool = False) -> ModelFiles:
    """Reads the description and the tokenizer of a model.

    Args:
      resolved: its files.
      images: include the vision tower and the projector in the architecture; see
        `ModelConfig.from_hf`. `nalora_jax.weights.base.seeing_files` reads their files.

    Raises:
      NaloraError: the files are missing or damaged, or cannot be understood.
    """
    file = None
    where = resolved.path
    if resolved.kind in SINGLE_FILES:
        file, raw, tokenizer = SINGLE_FILES[resolved.kind](resolved.path)
    else:
        where = resolved.path / "config.json"
        raw = read_json(where)
    raw = with_rope_scaling(raw, resolved.rope_scaling, str(where))
    config = ModelConfig.from_hf(raw, str(where), images=images)
    if file is None:
        tokenizer = Tokenizer.from_folder(resolved.path)
    return ModelFiles(resolved, raw, config, tokenizer, file)


def load_weights(
    files: ModelFiles, *, dtype: str, mesh: Mesh | None = None, quantized: Kind | None = None
) -> LoadedModel:
    """Loads the weights of a model whose files are open.

    Args:
      files: its files.
      dtype, mesh, quantized: see `nalora_jax.weights.base.load_model`.

    Raises:
      NaloraError: a tensor is missing or damaged, or has another shape.
    """
    resolved, config = files.resolved, files.config
    tensors: TensorSource
    if files.file is not None:
        tensors = files.file
    elif resolved.streamed:
        tensors = StreamedFolder(resolved.path, resolved.streamed)
    else:
        tensors = SafetensorsFolder(resolved.path)
    keymap = files.keymap or keymap_for(config, resolved.kind)
    shapes = param_shapes(config)
    shardings = param_shardings(shapes, mesh)
    named = with_experts(tensors, keymap)
    params = load_params(shapes, named, keymap, dtype=dtype, shardings=shardings, quantized=quantized)
    params = gathered(params, WEIGHT_AXES)
    source_of = origin(config, resolved, tensors, together=mesh is not None)
    log.info("base model: %s", source_of.describe())
    if resolved.rope_scaling:
        log.info("RoPE scaling %s: a context of %d tokens", resolved.rope_scaling, config.max_positions)
    if config.sight is None and contains_text_model(files.raw.get("model_type"), images=False):
        log.info(
            "%s: the text model of %s, without its image tower", resolved.path, files.raw["model_type"]
        )
    return LoadedModel(
        config,
        params,
        files.tokenizer_with(),
        source_of.name,
        source_of.fingerprint,
        files.raw,
        source_of,
        files.processor,
        tokenizer_folder=resolved.path if resolved.kind == "hf" else None,
        rope_scaling=resolved.rope_scaling,
    )


def rope_of(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the RoPE fields of a model's ``config.json`` if a run changed them; otherwise {}."""
    if not loaded.rope_scaling:
        return {}
    return rope_settings(loaded.hf_config or {})
