"""Loads a dual encoder or one tower by name, with tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from nalora_jax.common import trees
from nalora_jax.common.digests import digest_of
from nalora_jax.data.images.image_files import (
    ImageProcessor,
    TextTokenizer,
    read_sized_processor,
    read_text_tokenizer,
)
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.vision import families
from nalora_jax.models.vision.dual_encoder import init_params
from nalora_jax.models.vision.vision_config import DualConfig, EncoderConfig, Loss
from nalora_jax.weights import hub
from nalora_jax.weights.hf import ResolvedSource, open_tensors
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.origin import Origin, fingerprint, origin
from nalora_jax.weights.tensors import (
    TensorSource,
    load_params,
    param_shardings,
    require_dtype,
)

# Separates the names of two towers that were trained separately.
JOIN = "+"
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedDual:
    """An image tower and a text tower, ready to run."""

    config: DualConfig
    params: dict[str, Any]
    tokenizer: TextTokenizer
    processor: ImageProcessor
    source: str  # the base's name in its adapters
    fingerprint: str
    origin: Origin | None = None  # source of the weights, if they come from one folder


@dataclass(frozen=True)
class LoadedEncoder:
    """One tower, with the tokenizer or image processor for its inputs."""

    config: EncoderConfig
    params: dict[str, Any]
    tokenizer: TextTokenizer | None
    processor: ImageProcessor | None
    source: str
    fingerprint: str


def load_dual(
    source: str,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    d_out: int = 0,
    loss: Loss = "softmax",
    seed: int = 0,
    image_size: int = 0,
) -> LoadedDual:
    """Loads a dual encoder.

    Args:
      source: a Hugging Face folder or hub id of CLIP, SigLIP, SigLIP 2 or a VisionTextDualEncoder;
        or two towers, ``image+text``, each a folder, a hub id or an alias of
        `hub.ENCODER_FOLDERS`, which get fresh projections.
      dtype: of the parameters, "bfloat16" or "float32".
      mesh: devices that share the parameters; the first device by default.
      d_out: features of two towers' projections; 0: the smaller tower's width.
      loss: training loss of two towers, "softmax" or "sigmoid".
      seed: of the projections.
      image_size: side of the images in pixels; 0: the model's size.

    Raises:
      NaloraError: the model cannot be found, read or understood; the message names the file and
        the field.
    """
    require_dtype(dtype)  # before the download
    names = _towers(source)
    if names:
        image, text = (
            load_encoder(name, dtype=dtype, mesh=mesh, prefix=path)
            for path, name in names.items()
        )
        return join(
            image,
            text,
            mesh=mesh,
            d_out=d_out,
            loss=loss,
            seed=seed,
            image_size=image_size,
        )
    config, resolved = _read_description(source, families.read_dual)
    tensors, params = _weights(config, resolved, dtype, mesh)
    base = origin(config, resolved, tensors, together=mesh is not None)
    tokenizer = _tokenizer(resolved.path, config.text)
    processor = _set_side(read_sized_processor(resolved.path), config.image, image_size)
    return LoadedDual(
        config, params, tokenizer, processor, base.name, base.fingerprint, base
    )


def describe_dual(source: str, *, d_out: int = 0, loss: Loss = "softmax") -> DualConfig:
    """Returns a dual encoder's description, without weights; arguments as in `load_dual`."""
    names = _towers(source)
    if names:
        image, text = (_tower(name)[0] for name in names.values())
        width = d_out or min(image.d_model, text.d_model)
        return families.compose(image, text, width, loss)
    return _read_description(source, families.read_dual)[0]


def _towers(source: str) -> dict[str, str]:
    """Returns the names of two separately trained towers in ``image+text``, by their path in the
    tree.

    {} for the name of one model.
    """
    image, plus, text = source.partition(JOIN)
    if not plus or Path(source).exists():
        return {}
    return {"image/": image.strip(), "text/": text.strip()}


def _read_description(source: str, read: Callable[..., T]) -> tuple[T, ResolvedSource]:
    """Returns the architecture of an encoder or a pair, as ``read`` returns it, and its files."""
    resolved = hub.resolve_encoder(source)
    where = resolved.path / "config.json"
    return read(read_json(where), str(where)), resolved


def _tower(source: str) -> tuple[EncoderConfig, ResolvedSource]:
    """Returns a tower's architecture and files, with the pooling that sentence-transformers records
    for a BERT."""
    config, resolved = _read_description(source, families.read_encoder)
    settings = read_json(resolved.path / "1_Pooling" / "config.json", missing={})
    if config.model_type == "bert" and settings.get("pooling_mode_cls_token"):
        config = replace(config, pooling="first")
    return config, resolved


def _weights(
    config: DualConfig | EncoderConfig,
    resolved: ResolvedSource,
    dtype: str,
    mesh: Mesh | None,
    prefix: str = "",
) -> tuple[TensorSource, dict[str, Any]]:
    """Returns the tensors of a model's files, and its parameters."""
    tensors = open_tensors(resolved)
    shapes = config.param_shapes()
    shardings = param_shardings(shapes, mesh, prefix)
    params = load_params(
        shapes, tensors, keymap_for(config), dtype=dtype, shardings=shardings
    )
    return tensors, params


def load_encoder(
    source: str, *, dtype: str, mesh: Mesh | None = None, prefix: str = ""
) -> LoadedEncoder:
    """Loads one tower: an encoder's folder or hub id, or an alias of `hub.ENCODER_FOLDERS`.

    Args:
      source, dtype, mesh: as in `load_dual`.
      prefix: path of the tower in the tree that it will be part of, for the layout on the mesh.

    Raises:
      NaloraError: see `load_dual`.
    """
    require_dtype(dtype)  # before the download
    config, resolved = _tower(source)
    tokenizer = None
    processor = None
    if config.kind == "text":
        tokenizer = _tokenizer(resolved.path, config)
    elif config.kind == "image":
        processor = read_sized_processor(resolved.path)
    tensors, params = _weights(config, resolved, dtype, mesh, prefix)
    return LoadedEncoder(
        config,
        params,
        tokenizer,
        processor,
        resolved.name,
        fingerprint(config, tensors),
    )


def join(
    image: LoadedEncoder,
    text: LoadedEncoder,
    *,
    mesh: Mesh | None = None,
    d_out: int = 0,
    loss: Loss = "softmax",
    seed: int = 0,
    image_size: int = 0,
) -> LoadedDual:
    """Combines two separately trained towers with fresh projections; arguments as in `load_dual`.

    Raises:
      NaloraError: a tower is of the other kind, or its images cannot be resized to that size.
    """
    width = d_out or min(image.config.d_model, text.config.d_model)
    config = families.compose(image.config, text.config, width, loss)
    assert image.processor is not None
    assert text.tokenizer is not None
    projections = _init_projections(config, seed, mesh)
    params = {
        "image": image.params | projections.pop("image"),
        "text": text.params | projections.pop("text"),
    }
    digest = digest_of(f"{image.fingerprint} {text.fingerprint} {width} {loss} {seed}")
    name = f"{image.source}{JOIN}{text.source}"
    processor = _set_side(image.processor, image.config, image_size)
    return LoadedDual(
        config, params | projections, text.tokenizer, processor, name, digest
    )


def _set_side(
    processor: ImageProcessor, config: EncoderConfig, side: int
) -> ImageProcessor:
    """Returns the processor for squares of ``side`` pixels; unchanged if ``side`` is 0."""
    if not side:
        return processor
    if config.any_shape:
        raise NaloraError(
            "--vision.image-size",
            expected="0 for a model that takes images of any shape",
            found=side,
            remedy="set max_num_patches in its preprocessor_config.json instead",
        )
    if side % config.patch_size:
        raise NaloraError(
            "--vision.image-size",
            expected=f"a multiple of the patch size, {config.patch_size}",
            found=side,
        )
    if not (processor.shortest or processor.resize):
        raise NaloraError(
            "preprocessor_config.json: do_resize",
            expected="true, with --vision.image-size",
            found="false",
        )
    return processor.of_side(side)


def _init_projections(
    config: DualConfig, seed: int, mesh: Mesh | None
) -> dict[str, Any]:
    """Initializes projections and temperature of separately trained towers.

    They are float32 because they are trained.
    """
    projections = (
        "image/projection/kernel",
        "text/projection/kernel",
        "logit_scale",
        "logit_bias",
    )
    leaves = trees.flatten(init_params(config, jax.random.key(seed)))
    shardings = param_shardings(config.param_shapes(), mesh)
    fresh = {path: leaf for path, leaf in leaves.items() if path in projections}
    if shardings is not None:
        for path, leaf in fresh.items():
            fresh[path] = jax.device_put(leaf, shardings[path])
    return trees.unflatten(fresh)


def _tokenizer(folder: Path, config: EncoderConfig) -> TextTokenizer:
    """Returns the tokenizer of the text tower ``config`` in a model's ``folder``.

    It pads all texts to the tower's full length if the tower pools the last position, as SigLIP's
    does: such a tower was trained on rows of that length.
    """
    pads_to_full_length = config.pooling == "last"
    return read_text_tokenizer(
        folder,
        max_length=config.max_positions,
        vocab_size=config.vocab_size,
        fixed=pads_to_full_length,
    )
