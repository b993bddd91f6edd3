"""Tokens that the base's files lack: added for a run, or required by an existing adapter.

A token needs an id in the tokenizer and a row in the embedding and in the output head. New ids
follow the tokenizer's last one. A table grows only if it is too small for them (Qwen's tables have
more rows than tokens).

    embed/embedding [vocab, d_model]   ->   [rows, d_model]     new rows: the mean of all others
    lm_head/kernel  [d_model, vocab]   ->   [d_model, rows]     new columns: the mean of all others

transformers' ``resize_token_embeddings`` draws new rows around the same mean, with a very small
spread. A model with such rows gives the new token a low probability in every context (Hewitt,
"Initializing new word embeddings", 2021).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from jax import lax
from jax.sharding import Mesh

from nalora_jax.data.tokenizer import AddedTokens, Tokenizer, read_backend
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import sharding
from nalora_jax.models.targets import TOKEN_TABLES
from nalora_jax.weights.model_files import LoadedModel
from nalora_jax.weights.peft_config import CONFIG_NAME, TENSORS_NAME, recorded_fact
from nalora_jax.weights.peft_tables import rows_of_indices, table_rows
from nalora_jax.weights.tokenizer_files import (
    copy_tokenizer,
    write_extended,
    write_tokenizer,
)

log = logging.getLogger(__name__)

_SAVE = "save the tokenizer that it was trained with there: tokenizer.save_pretrained(folder)"
# Names of rows without a token.
_UNUSED = re.compile(r"\[PAD\d+\]|<unused\d+>|<\|?reserved\w*\|?>")


def add_tokens(
    base: LoadedModel, added: AddedTokens, mesh: Mesh | None = None
) -> LoadedModel:
    """Adds tokens to a model's tokenizer and rows to its tables, and logs the additions.

    Args:
      base: the model as stored in its files.
      added: the tokens; tokens that the tokenizer has already are left unchanged.
      mesh: the mesh of the model's parameters, if they are on one.

    Raises:
      NaloraError: the tokenizer cannot encode one of the texts as a single token.
    """
    if not added:
        return base
    present = _added_tokens(base.tokenizer.backend)
    size = base.config.vocab_size
    tokenizer = base.tokenizer.with_tokens(added)
    rows = tokenizer.rows_for(added, size)
    if known := {text: present[text] for text in added.texts if text in present}:
        log.info("tokens that the tokenizer has already: %s", _format_tokens(known))
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    if new := {text: ids[text] for text in added.texts if text not in present}:
        change = "their rows are there"
        if rows > size:
            change = f"the embedding grows from {size:,} to {rows:,} rows"
        log.info("added tokens: %s; %s", _format_tokens(new), change)
    return replace(_resize_model(base, rows, tokenizer, mesh), added=tuple(new))


def take_adapter_tokens(
    base: LoadedModel, folder: Path, mesh: Mesh | None = None
) -> LoadedModel:
    """Returns the model with an adapter's tokens and rows; ``base`` if it needs no others.

    The tokenizer in the adapter's folder is used if it has tokens that the base's lacks. New rows
    that the adapter's tables do not contain (for example the head's, if only the embedding was
    saved) are initialized to the mean, as in a new run.

    Args:
      base: the model as stored in its files.
      folder: adapter in PEFT's format, including its tokenizer if tokens were added.
      mesh: the mesh of the model's parameters, if they are on one.

    Raises:
      NaloraError: the tables have fewer rows than the tokenizer has tokens; they have more rows
        than the base, and there is no tokenizer that lists the extra tokens; a row was trained for
        a token that is in none of the tokenizers; or the tokenizer belongs to another base.
    """
    size = base.config.vocab_size
    tables = table_rows(folder, base.config)
    needed = rows_of_indices(folder, base.config)
    adapter_rows = tables or needed
    rows = adapter_rows or size
    new = _new_tokens(base, folder, adapter_rows, strict=rows != size)
    last = max(new.values(), default=-1)
    if tables is None and needed is not None:
        # No table states the number of rows: it is the number of tokens, not of the file's ids.
        if needed > last + 1:
            where = f"{folder / CONFIG_NAME}: trainable_token_indices"
            expected = (
                f"ids below {max(size, last + 1)}: the base's, or of new tokens in the folder's "
                "tokenizer"
            )
            raise NaloraError(where, expected=expected, found=needed - 1, remedy=_SAVE)
        rows = last + 1
    # New tokens with ids beyond the tables have no trained row.
    if rows == size and all(token_id >= size for token_id in new.values()):
        if new:
            log.info(
                "%s: its tokenizer has tokens that no row was trained for; the base's is used",
                folder,
            )
        return base
    # Tables may be smaller than the base's only if they still cover its tokens.
    too_few = not new and rows < min(size, base.tokenizer.vocab_size)
    if rows != size and (last >= rows or too_few):
        tokens = max(last + 1, base.tokenizer.vocab_size)
        raise NaloraError(
            str(folder / TENSORS_NAME),
            expected=f"tables of at least {tokens} rows, one for each token",
            found=rows,
            remedy="the tokenizer is not the one that the adapter was trained with, or its tables "
            "were not saved",
        )
    if not new and rows > size and not (folder / "tokenizer.json").is_file():
        further = f"{rows - size} rows more than the base"
        expected = f"a tokenizer, since the adapter's tables have {further}"
        raise NaloraError(
            str(folder),
            expected=expected,
            found="no tokenizer.json",
            remedy=_SAVE,
        )
    if not new:
        return _resize_model(base, rows, base.tokenizer, mesh)
    log.info("%s: with its tokens %s", folder, _format_tokens(new))
    resized = _resize_model(
        base, rows, Tokenizer.from_folder(folder, base.tokenizer), mesh
    )
    return replace(resized, added=tuple(new), tokenizer_folder=folder)


def check_adapter(base: LoadedModel, folder: Path) -> None:
    """Raises an error if an adapter needs other tokens or another RoPE scaling than the loaded
    model has.

    Adapters of one loaded model share compiled programs and token ids.

    Raises:
      NaloraError: the adapter has further tokens, tables with another number of rows, or another
        RoPE scaling.
    """
    remedy = "load the model with that adapter from the start"
    if (scaling := recorded_fact(folder, "rope_scaling")) != base.rope_scaling:
        loaded = base.rope_scaling or "the unchanged one"
        expected = f"an adapter of the loaded model's RoPE scaling, {loaded}"
        raise NaloraError(
            str(folder),
            expected=expected,
            found=scaling or "none",
            remedy=remedy,
        )
    size = base.config.vocab_size
    rows = table_rows(folder, base.config) or rows_of_indices(folder, base.config)
    new = _new_tokens(base, folder, rows, strict=bool(base.added) or rows != size)
    trained = {
        text: token_id
        for text, token_id in new.items()
        if rows is not None or token_id < size
    }
    if trained or rows not in (None, size):
        expected = f"an adapter of the tokens and the {size} rows that the model was loaded with"
        if trained:
            found = f"one with the further tokens {_format_tokens(trained)}"
        else:
            found = f"tables of {rows} rows"
        raise NaloraError(str(folder), expected=expected, found=found, remedy=remedy)


def tokenizer_writer(
    base: LoadedModel, *, files: Path | None = None
) -> Callable[[Path], None]:
    """Returns a function that writes the tokenizer with its added tokens to a folder.

    Args:
      base: the model.
      files: the base's GGUF file or folder, for a merged model, which gets generation_config.json
        and image settings too; None for an adapter's folder.
    """
    if base.tokenizer_folder is None or (files is not None and files.is_file()):
        return partial(
            write_tokenizer, base.tokenizer, max_length=base.config.max_positions
        )
    if files is not None and not base.added:
        return partial(copy_tokenizer, files, images=base.config.vision is not None)
    return partial(write_extended, base.tokenizer, base.tokenizer_folder, base=files)


def _new_tokens(
    base: LoadedModel, folder: Path, rows: int | None, *, strict: bool
) -> dict[str, int]:
    """Returns the ids of tokens in ``folder``'s tokenizer that ``base`` lacks.

    The result is empty if there is no tokenizer file.

    Args:
      base: the model.
      folder: the adapter's folder.
      rows: number of rows of the adapter's tables; None if it has none, and then its tokenizer
        does not matter.
      strict: raise an error if an id has different tokens in the two tokenizers. Otherwise the
        base's tokenizer is used, with a warning (files in other formats may spell the same tokens
        differently).

    Raises:
      NaloraError: the tokenizer cannot be read, or with ``strict`` belongs to another base.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    backends = read_backend(path), base.tokenizer.backend
    theirs, ours = [backend.get_vocab(with_added_tokens=True) for backend in backends]
    by_id = {token_id: text for text, token_id in ours.items()}
    for text, token_id in theirs.items():
        # The base's id of this text and its text of this id; a missing one counts as equal.
        in_base = ours.get(text, token_id), by_id.get(token_id, text)
        unused = text not in ours and _UNUSED.fullmatch(in_base[1])
        if in_base != (token_id, text) and not unused:
            conflict = f"{text!r} as {token_id}, where the model has {in_base[1]!r} as {in_base[0]}"
            if rows is not None and strict:
                raise NaloraError(
                    str(path),
                    expected="the tokens of the base with the base's ids, and new tokens",
                    found=conflict,
                    remedy="give the base that the adapter was trained on, and no other adapter "
                    "that has other tokens",
                )
            if rows is not None:
                log.warning(
                    "%s has %s: the model's own tokenizer is used", path, conflict
                )
            return {}
    # A text that is an ordinary vocabulary entry of the base becomes a separate token once it is
    # added.
    matched, before = map(_added_tokens, backends)
    new = {text: token_id for text, token_id in theirs.items() if text not in ours}
    for text, token_id in matched.items():
        if text not in before:
            new[text] = token_id
    return dict(sorted(new.items(), key=lambda item: item[1]))


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Returns the ids of the tokens that are matched before a text is split."""
    return {
        token.content: token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
    }


def _resize_model(
    base: LoadedModel, rows: int, tokenizer: Tokenizer, mesh: Mesh | None
) -> LoadedModel:
    """Returns the model with tables of ``rows`` rows and with ``tokenizer``."""
    tokenizer = tokenizer.for_embedding(rows, f"{base.source}: tokenizer")
    if rows == base.config.vocab_size:
        return replace(base, tokenizer=tokenizer)
    params = dict(base.params)
    for axis, (group, name) in enumerate(
        path.split("/") for path in TOKEN_TABLES.values()
    ):
        if group in params:
            table = _resize_sharded(
                f"{group}/{name}", params[group][name], rows, axis, mesh
            )
            params[group] = {**params[group], name: table}
    raw = base.hf_config
    if isinstance(raw.get("text_config"), dict):  # multimodal
        raw = {**raw, "text_config": {**raw["text_config"], "vocab_size": rows}}
    else:
        raw = {**raw, "vocab_size": rows}
    config = replace(base.config, vocab_size=rows)
    return replace(
        base,
        config=config,
        params=params,
        tokenizer=tokenizer,
        resized=rows,
        hf_config=raw,
    )


def _resize_sharded(
    path: str, table: jax.Array, rows: int, axis: int, mesh: Mesh | None
) -> jax.Array:
    """Returns ``table`` with ``rows`` entries along ``axis``, sharded for its new shape."""
    shape = list(table.shape)
    shape[axis] = rows
    like = jax.ShapeDtypeStruct(tuple(shape), table.dtype)
    place = table.sharding
    if mesh is not None:
        place = sharding.shardings({path: like}, mesh, sharding.PARAM_RULES)[path]
    resize = partial(_resize_table, rows=rows, axis=axis)
    return jax.jit(resize, out_shardings=place)(table)


def _resize_table(table: jax.Array, *, rows: int, axis: int) -> jax.Array:
    """Cuts ``table`` to ``rows`` entries along ``axis``, or appends copies of the mean entry."""
    size = table.shape[axis]
    if rows <= size:
        return lax.slice_in_dim(table, 0, rows, axis=axis)
    mean = jnp.mean(table, axis=axis, keepdims=True, dtype=jnp.float32)
    new = jnp.repeat(mean.astype(table.dtype), rows - size, axis=axis)
    return jnp.concatenate([table, new], axis=axis)


def _format_tokens(tokens: Mapping[str, int], most: int = 5) -> str:
    """Formats the first ``most`` tokens with their ids."""
    first = list(tokens.items())[:most]
    listed = [f"{text!r} ({token_id})" for text, token_id in first]
    if len(tokens) > most:
        listed.append(f"and {len(tokens) - most} more")
    return ", ".join(listed)
