"""Writes tokenizer files for transformers: copies of the base's, or files from a `Tokenizer`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from nalora_jax.common.files import refuse_link_out
from nalora_jax.common.folders import write_json
from nalora_jax.data.chat_templates import (
    DEFAULT_FILE,
    PROCESSOR_FILE,
    TOOL_FILE,
    has_templates,
    write_templates,
)
from nalora_jax.data.tokenizer import Tokenizer, read_json
from nalora_jax.errors import NaloraError

# All files except the weights that a causal language model's folder may have for its text side.
TEXT_FILES = (
    "added_tokens.json",
    DEFAULT_FILE,
    TOOL_FILE,
    PROCESSOR_FILE,
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


# Further files of a multimodal model.
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def copy_tokenizer(source: Path, folder: Path, *, images: bool = False) -> None:
    """Copies ``source``'s files that are in `TEXT_FILES` or, with ``images``, in `IMAGE_FILES`.

    Raises:
      NaloraError: there is no tokenizer among them, or one of them is a link out of the folder.
    """
    _copy(source, folder, TEXT_FILES)
    if images:
        _copy(source, folder, IMAGE_FILES)
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).exists() for name in names):
        expected = "tokenizer.json"
        remedy = "give the base's folder"
        raise NaloraError(
            str(source),
            expected=expected,
            found="no tokenizer",
            remedy=remedy,
        )


def _copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copies the files that exist."""
    for name in names:
        if (source / name).is_file():
            refuse_link_out(source, name)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def write_extended(
    tokenizer: Tokenizer, source: Path, folder: Path, *, base: Path | None = None
) -> None:
    """Writes a tokenizer with added tokens: the files of ``source`` with its vocabulary.

    Args:
      tokenizer: with the tokens.
      source: folder with the files that it was built from, or with the files of its adapter.
      folder: an existing folder.
      base: folder of the base, whose generation_config.json and image settings are copied; None
        for an adapter.

    Raises:
      NaloraError: a file is a link out of its folder.
    """
    of_base = ("generation_config.json", *IMAGE_FILES)
    _copy(source, folder, (name for name in TEXT_FILES if name not in of_base))
    if base is not None:
        _copy(base, folder, of_base)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    added = tokenizer.backend.get_added_tokens_decoder()
    settings = read_json(folder / "tokenizer_config.json", missing={})
    slow = folder / "added_tokens.json"
    # transformers gives these precedence over tokenizer.json.
    if "added_tokens_decoder" in settings or slow.is_file():
        listed = {str(number): _flags(token) for number, token in added.items()}
        settings["added_tokens_decoder"] = listed
        write_json(folder / "tokenizer_config.json", settings)
    if not has_templates(folder, settings):
        write_templates(folder, tokenizer.chat_template, tokenizer.tool_template)
    if slow.is_file():
        ids = {token.content: number for number, token in added.items()}
        write_json(slow, read_json(slow) | ids)


def _flags(token: tokenizers.AddedToken) -> dict[str, Any]:
    """Returns an added token as transformers' ``added_tokens_decoder`` describes it."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and the chat templates.

    Args:
      tokenizer: the tokenizer; transformers will encode like its ``encode``.
      folder: an existing folder.
      max_length: the model's context.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        token = backend.id_to_token(tokenizer.bos_id)
        backend.post_processor = TemplateProcessing(
            single=[f"{token}:0", "$A:0"],
            pair=[f"{token}:0", "$A:0", f"{token}:1", "$B:1"],
            special_tokens=[(token, tokenizer.bos_id)],
        )
    backend.save(str(folder / "tokenizer.json"))
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
    }
    known = {name: number for name, number in ids.items() if number is not None}
    texts = {name: backend.id_to_token(number) for name, number in known.items()}
    settings = {
        **(tokenizer.special_tokens or {}),
        **texts,
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    generation: dict[str, Any] = {
        f"{name}_id": number for name, number in known.items()
    }
    if len(tokenizer.eos_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    write_json(folder / "generation_config.json", generation)
    write_templates(folder, tokenizer.chat_template, tokenizer.tool_template)
