"""A model's name in, everything that a run needs of it out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nalora_jax import distributed, trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig, param_shapes
from nalora_jax.nn.quantize import Kind, gathered
from nalora_jax.tokenizer import Tokenizer, read_json
from nalora_jax.weights import hub
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.gguf_config import hf_config
from nalora_jax.weights.gguf_tokenizer import read_tokenizer
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.load import DTYPES, TensorSource, load_params
from nalora_jax.weights.origin import Origin, origin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to run."""

    config: ModelConfig
    params: dict[str, Any]  # the frozen tree of the contract: embed, layers (stacked), final_norm, lm_head
    tokenizer: Tokenizer
    source: str  # what its adapters call their base, and what loads it again: see `Origin.name`
    fingerprint: str  # of all weights; see `weights.origin.fingerprint`
    hf_config: dict[str, Any] | None  # the config.json, or its equivalent for a GGUF file
    origin: Origin | None = None  # where the weights come from, where they come from files


def read_config(found: hub.ResolvedSource) -> ModelConfig:
    """The architecture of a model, read from its description alone: no weight is.

    Raises:
      NaloraError: the description cannot be read or understood.
    """
    where = found.path if found.kind == "gguf" else found.path / "config.json"
    raw = hf_config(GGUFFile(found.path)) if found.kind == "gguf" else read_json(where)
    return ModelConfig.from_hf(raw, str(where))


def read_tokenizer_of(found: hub.ResolvedSource, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model, beside its embedding; no weight is read.

    Raises:
      NaloraError: its files are missing or damaged.
    """
    tokenizer = read_tokenizer(GGUFFile(found.path)) if found.kind == "gguf" else Tokenizer.from_folder(found.path)
    return tokenizer.for_embedding(config.vocab_size, f"{found.path}: tokenizer")


def load_model(
    source: str | hub.ResolvedSource,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    cache: Path | None = None,
    quantized: Kind | None = None,
) -> LoadedModel:
    """Loads a model by name.

    Args:
      source: an alias, a Hugging Face folder, a GGUF file or a hub id; see `weights.hub.resolve`. Or what that found.
      dtype: of the parameters, "bfloat16" or "float32".
      mesh: devices that share the parameters, by the rules of `nalora_jax.distributed`; the first device by default.
      cache: where packages are kept.
      quantized: hold the projections' kernels as "int8" or "nf4" (`nalora_jax.nn.quantize`) instead of ``dtype``.

    Raises:
      NaloraError: the model cannot be found, read or understood; the message names the file and the field.
    """
    if dtype not in DTYPES:  # before anything is downloaded
        raise NaloraError("dtype", expected=" or ".join(DTYPES), found=repr(dtype))
    found = hub.resolve(source, cache) if isinstance(source, str) else source
    raw, config, tensors, tokenizer = _opened(found)
    tokenizer = tokenizer.for_embedding(config.vocab_size, f"{found.path}: tokenizer")
    keymap = keymap_for(config, found.kind)
    shardings = None if mesh is None else _shardings(config, mesh)
    params = load_params(config, tensors, keymap, dtype=dtype, shardings=shardings, quantized=quantized)
    params = gathered(params, "fsdp")
    known = origin(config, found, tensors, together=mesh is not None)
    log.info("base model: %s", known.describe())
    return LoadedModel(config, params, tokenizer, known.name, known.fingerprint, raw, known)


def _opened(found: hub.ResolvedSource) -> tuple[dict[str, Any], ModelConfig, TensorSource, Tokenizer]:
    """Description, tensors (not read yet) and tokenizer of either kind of source."""
    if found.kind == "gguf":
        file = GGUFFile(found.path)
        raw = hf_config(file)
        return raw, ModelConfig.from_hf(raw, str(found.path)), file, read_tokenizer(file)
    where = found.path / "config.json"
    raw = read_json(where)
    config = ModelConfig.from_hf(raw, str(where))
    return raw, config, SafetensorsFolder(found.path), Tokenizer.from_folder(found.path)


def _shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in param_shapes(config).items()}
    return trees.flatten(distributed.shardings(trees.unflatten(shapes), mesh, distributed.PARAM_RULES))
