"""Trained tables (PEFT's ``modules_to_save``) and single trained rows
(``trainable_token_indices``).

Trained tables are stored in the collection ``lora``, in float32, and replace the base's tables:

    lora: {"embed": {"embedding": [vocab, d_model]},
           "lm_head": {"kernel": [d_model, vocab]},
           "layers": ...}

A model with tied embeddings has one table for both. PEFT keeps a separate trained copy for each
module that is named, which unties them: with ``embed_tokens`` alone the head stays the base's.
This library does the same. With PEFT's ``ensure_weight_tying`` the head is the trained embedding
instead. Rows:

    model.embed_tokens.token_adapter.trainable_tokens_delta [ids, d_model]  ->  embed/rows
    lm_head.token_adapter.trainable_tokens_delta [ids, d_model]             ->  lm_head/rows

In spite of its name the delta contains the trained rows themselves, not their difference to the
base. A tied head shares the embedding's rows and has no separate tensor, unless it is named with
other indices.

An embedding that was resized before training is also written in full
(``token_adapter.base_layer``), because no base has the rows of the other new tokens. Such tables
are read like ``modules_to_save``, with the trained rows inserted.

Parameters of dual encoders that are trained as a whole (projections between separately trained
towers, the temperature) have no place in PEFT's files. They are written to ``trained.safetensors``,
under transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import check_token_indices
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import family_of
from nalora_jax.models.targets import SCORE, TOKEN_ROWS, TOKEN_TABLES, AdapterSpec
from nalora_jax.weights.peft_config import TENSORS_NAME, PeftConfig, read_peft_config
from nalora_jax.weights.shards import read_header, read_tensors

if TYPE_CHECKING:
    from nalora_jax.models.vision.vision_config import DualConfig

PREFIX = "base_model.model."
_HEAD = TOKEN_TABLES["lm_head"]
_EMBEDDING = TOKEN_TABLES["embed_tokens"]
# Suffixes of a module with trained rows: its rows, and its table, which PEFT writes if it was
# resized.
_ROWS = "token_adapter.trainable_tokens_delta"
_RESIZED = "token_adapter.base_layer.weight"
# The head of transformers' ``...ForSequenceClassification``.
_SCORE_MODULE = "score"
# PEFT names all heads that it knows, whichever of them the model has.
_HEADS_OF_PEFT = ("classifier", _SCORE_MODULE, "pre_classifier")
_SCORE_KEY = f"{PREFIX}{_SCORE_MODULE}.weight"


def table_modules(config: ModelConfig) -> dict[str, str]:
    """Returns each table's module in the keys of PEFT's tensors, e.g.
    ``base_model.model.lm_head``."""
    names = {row.paths[0]: row.name for row in family_of(config.model_type).tensors}
    modules = {
        name: names.get(path, f"{name}.weight").removesuffix(".weight")
        for name, path in TOKEN_TABLES.items()
    }
    return {name: f"{PREFIX}{module}" for name, module in modules.items()}


def table_rows(folder: Path, config: ModelConfig) -> int | None:
    """Returns the row count of an adapter's trained tables; None if it has none or is unreadable.

    Args:
      folder: adapter in PEFT's format.
      config: the base model; its number of rows is not used.

    Raises:
      NaloraError: the embedding and the head have different numbers of rows.
    """
    try:
        stored, _ = read_header(folder / TENSORS_NAME)
    except NaloraError:
        return None  # the error is reported when the adapter is read
    modules = table_modules(config).values()
    keys = [f"{module}.weight" for module in modules]
    keys += [f"{module}.{_RESIZED}" for module in modules]
    counts = {}
    for key in keys:
        if key in stored and stored[key].shape:  # scalars are refused later
            counts[key] = stored[key].shape[0]
    if len(set(counts.values())) > 1:
        raise NaloraError(
            f"{folder / TENSORS_NAME}",
            expected="as many rows of the head as of the embedding",
            found=", ".join(f"{count} of {key}" for key, count in counts.items()),
        )
    return next(iter(counts.values()), None)


def rows_of_indices(folder: Path, config: ModelConfig) -> int | None:
    """Returns the row count that an adapter's trained token ids need; None if the base's is
    enough."""
    try:
        indices = read_peft_config(folder).token_indices
    except NaloraError:
        return None  # the error is reported when the adapter is read
    last = max([max(ids) for _, ids in indices], default=-1)
    if last < config.vocab_size:
        return None
    return last + 1


def take_tables(
    config: ModelConfig, tensors: dict[str, np.ndarray], peft: PeftConfig, where: str
) -> tuple[dict[str, np.ndarray], AdapterSpec]:
    """Removes the trained tables and rows from an adapter's tensors and returns them.

    Args:
      config: the base model, resized for the adapter.
      tensors: by PEFT's key.
      peft: ``adapter_config.json``.
      where: the tensor file, for error messages.

    Returns:
      Leaves of the ``lora`` tree by path, and a spec of them alone.

    Raises:
      NaloraError: an id has no row in the base, a module is not supported, or named twice, or a
        table or rows are missing or have the wrong shape.
    """
    named = tuple(name.rpartition(".")[2] for name in peft.modules_to_save)
    head = {}
    if _SCORE_MODULE in named:
        named = tuple(name for name in named if name not in _HEADS_OF_PEFT)
        head[SCORE] = _take_score(config, tensors, where)
    spec = AdapterSpec(saved=named, token_indices=peft.token_indices)
    remedy = (
        "use its own base; if tokens were added, their tokenizer must be in the adapter's "
        "folder"
    )
    check_token_indices(spec, config, f"{peft.where}: trainable_token_indices", remedy)
    trained = spec.own_rows(tied=config.tie_embeddings)
    shape = (config.vocab_size, config.d_model)
    modules = table_modules(config)
    leaves = {}
    for name, module in modules.items():
        # A trained table is written a second time under its inner name, together with its original
        # values.
        for inner in ("modules_to_save", "original_module"):
            tensors.pop(f"{module}.{inner}.weight", None)
        ids = trained.get(name, ())
        # A tied head's rows, if they are in the file at all, are a copy of the embedding's.
        if config.tie_embeddings and name not in trained:
            ids = trained.get("embed_tokens", ())
        rows = tensors.pop(f"{module}.{_ROWS}", None)
        table = tensors.pop(f"{module}.{_RESIZED}", None)
        if rows is None and name in trained:
            raise NaloraError(
                f"{where}: {module}.{_ROWS}",
                expected=f"the trained rows of {name}",
                found="nothing",
            )
        if rows is not None and rows.shape != (len(ids), config.d_model):
            raise NaloraError(
                f"{where}: {module}.{_ROWS}",
                expected=f"shape {(len(ids), config.d_model)}, a row for each of "
                "trainable_token_indices",
                found=f"shape {rows.shape}",
            )
        if table is not None:  # whose shape is checked below
            if rows is not None and table.shape == shape:
                table[list(ids)] = rows
            tensors[f"{module}.weight"] = table
        elif rows is not None and name in trained:
            leaves[TOKEN_ROWS[name]] = rows
    # PEFT also writes a head that it keeps tied and, if the embedding was resized, both tables,
    # even if they are not named.
    present = [
        name for name, module in modules.items() if f"{module}.weight" in tensors
    ]
    for name in dict.fromkeys([*named, *present]):
        if name not in TOKEN_TABLES:
            raise NaloraError(
                f"{where}: modules_to_save",
                expected=f"some of {', '.join(TOKEN_TABLES)} (other modules are not supported)",
                found=name,
            )
        key = f"{modules[name]}.weight"
        table = tensors.pop(key, None)
        if table is None:
            if name == "lm_head" and peft.tied and _EMBEDDING in leaves:
                continue
            raise NaloraError(
                f"{where}: {key}",
                expected=f"the trained {name} of modules_to_save",
                found="nothing",
            )
        if table.shape != shape:
            raise NaloraError(
                f"{where}: {key}",
                expected=f"shape {shape}, as the base has it",
                found=f"shape {table.shape}",
                remedy="an adapter with new tokens needs a base that is resized for them, as "
                "`nalora_jax.load` does",
            )
        leaves[TOKEN_TABLES[name]] = _flip(name, table)
    tied = peft.tied and config.tie_embeddings
    if tied and _EMBEDDING in leaves and _HEAD not in leaves:
        leaves[_HEAD] = np.ascontiguousarray(leaves[_EMBEDDING].T)
    with_rows = {name for name, path in TOKEN_ROWS.items() if path in leaves}
    # the head has the embedding's rows
    if "embed_tokens" in with_rows and "lm_head" not in trained:
        with_rows.add("lm_head")
    indices = tuple(
        (name, ids) for name, ids in peft.token_indices if name in with_rows
    )
    saved = tuple(name for name in TOKEN_TABLES if TOKEN_TABLES[name] in leaves)
    outputs = head[SCORE].shape[1] if head else 0
    taken = AdapterSpec(saved=saved, token_indices=indices, score=outputs)
    return leaves | head, taken


def _take_score(
    config: ModelConfig, tensors: dict[str, np.ndarray], where: str
) -> np.ndarray:
    """Removes the head from an adapter's tensors and returns it, ``[d_model, outputs]``.

    Raises:
      NaloraError: it is missing, or reads vectors of another size.
    """
    # PEFT may write it a second time under its inner name.
    tensors.pop(f"{PREFIX}{_SCORE_MODULE}.modules_to_save.weight", None)
    stored = tensors.pop(_SCORE_KEY, None)
    if stored is None or stored.ndim != 2 or stored.shape[1] != config.d_model:
        found = "nothing"
        if stored is not None:
            found = f"shape {stored.shape}"
        raise NaloraError(
            f"{where}: {_SCORE_KEY}",
            expected=f"the head of modules_to_save, shape (outputs, {config.d_model})",
            found=found,
        )
    return np.ascontiguousarray(stored.T)


def table_tensors(
    lora: Mapping[str, Any], spec: AdapterSpec, config: ModelConfig
) -> dict[str, np.ndarray]:
    """Returns the trained tables and rows by PEFT's key, in the layout of its files."""
    leaves = trees.flatten(lora)
    modules = table_modules(config)
    tensors = {}
    for name in spec.saved:
        table = np.asarray(leaves[TOKEN_TABLES[name]], np.float32)
        tensors[f"{modules[name]}.weight"] = _flip(name, table)
    for name in spec.own_rows(tied=config.tie_embeddings):
        rows = np.asarray(leaves[TOKEN_ROWS[name]], np.float32)
        tensors[f"{modules[name]}.{_ROWS}"] = rows
    if spec.score:
        kernel = np.asarray(leaves[SCORE], np.float32)
        tensors[_SCORE_KEY] = np.ascontiguousarray(kernel.T)
    return tensors


def _flip(name: str, table: np.ndarray) -> np.ndarray:
    """Converts a table between PEFT's layout, ``[rows, d_model]``, and ours: the head is
    transposed."""
    if name == "embed_tokens":
        return table
    return np.ascontiguousarray(table.T)


def saved_modules(spec: AdapterSpec) -> list[str]:
    """Returns the value of ``modules_to_save``: names of modules that are trained entirely."""
    if spec.score:
        return [*spec.saved, _SCORE_MODULE]
    return list(spec.saved)


def fold_saved(
    config: ModelConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    spec: AdapterSpec,
) -> tuple[ModelConfig, dict[str, Any], AdapterSpec]:
    """Replaces the base's tables by the trained tables and trained rows.

    The embedding and head of a tied model become separate tables if only one of them is trained.

    Args:
      config: the base model.
      params: its parameters.
      lora: the adapter's tree.
      spec: of the adapter.

    Returns: Config, parameters, and the spec of the remaining adapter.

    Raises:
      NaloraError: the adapter has a head, for which a language model has no place.
    """
    refuse_head(spec, "merge")
    if not spec.saved and not spec.token_indices:
        return config, dict(params), spec
    leaves = trees.flatten(params)
    trained = trees.flatten(lora)
    rows = spec.own_rows(tied=config.tie_embeddings)
    # The tables stay tied if only rows that both share were trained.
    tied = config.tie_embeddings and not spec.saved and "lm_head" not in rows
    if config.tie_embeddings and not tied:
        leaves[_HEAD] = jnp.asarray(leaves[_EMBEDDING]).T
    for name in spec.saved:
        leaves[TOKEN_TABLES[name]] = jnp.asarray(trained[TOKEN_TABLES[name]])
    for name, ids in rows.items():
        table = jnp.asarray(leaves[TOKEN_TABLES[name]])
        new = jnp.asarray(trained[TOKEN_ROWS[name]])
        # The embedding is [vocab, d_model], the head [d_model, vocab]; new rows are [ids, d_model].
        rows_of_table = table.at[np.array(ids)]
        new = new.astype(table.dtype)
        if name == "lm_head":
            rows_of_table = table.at[:, np.array(ids)]
            new = new.T
        leaves[TOKEN_TABLES[name]] = rows_of_table.set(new)
    remaining = replace(spec, saved=(), token_indices=())
    return replace(config, tie_embeddings=tied), trees.unflatten(leaves), remaining


def refuse_saved(spec: AdapterSpec, where: str, remedy: str) -> None:
    """Raises a NaloraError if an adapter has trained tables or rows, which a target format cannot
    store.

    Args:
      spec: of the adapter.
      where: the setting that names the format, for the message.
      remedy: for the message.
    """
    trained = saved_modules(spec)
    trained += [f"rows of {name}" for name, _ in spec.token_indices]
    if trained:
        raise NaloraError(
            where,
            expected="an adapter of projections alone",
            found=f"trained {' and '.join(trained)}",
            remedy=remedy,
        )


def refuse_head(spec: AdapterSpec, where: str) -> None:
    """Raises a NaloraError if an adapter has a head on one vector of each text.

    Args:
      spec: of the adapter.
      where: what needs a language model, for the message.
    """
    if spec.score:
        raise NaloraError(
            where,
            expected="an adapter of a language model",
            found=f"one with a head of {spec.score} outputs",
            remedy="load it in transformers' AutoModelForSequenceClassification with PEFT",
        )


def token_settings(spec: AdapterSpec) -> dict[str, Any]:
    """Returns the field of ``adapter_config.json``; empty if no rows are trained.

    Example: ``{"trainable_token_indices": [5, 6]}`` for the embedding alone, otherwise
    ``{"embed_tokens": [5, 6], ...}``.
    """
    listed = {name: list(ids) for name, ids in spec.token_indices}
    if not listed:
        return {}
    if set(listed) == {"embed_tokens"}:
        return {"trainable_token_indices": listed["embed_tokens"]}
    return {"trainable_token_indices": listed}


# ---------------------------------------------------------------- dual encoders


TRAINED = "trained.safetensors"
# Leaves that may be fully trained, with transformers' names; kernels are transposed there.
_WHOLE = {
    "image/projection/kernel": "visual_projection.weight",
    "text/projection/kernel": "text_projection.weight",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}


def trained_tensors(
    lora: Mapping[str, Any], config: DualConfig
) -> dict[str, np.ndarray]:
    """Returns the fully trained parameters by transformers' names, in the layout of its files."""
    leaves = trees.flatten(lora)
    tensors = {}
    for path in config.trained_shapes():
        leaf = np.asarray(leaves[path], np.float32)
        tensors[_WHOLE[path]] = np.array(leaf.T, order="C")
    return tensors


def read_trained(folder: Path, config: DualConfig) -> dict[str, np.ndarray]:
    """Reads the leaves that were fully trained.

    Raises:
      NaloraError: the file is missing or damaged, or has other tensors.
    """
    shapes = config.trained_shapes()
    path = folder / TRAINED
    leaves: dict[str, np.ndarray] = {}
    if not shapes:
        return leaves
    tensors, _ = read_tensors(path)
    for name, shape in shapes.items():
        stored = tensors.get(_WHOLE[name])
        # Kernels are transposed in the file; the temperature is a scalar.
        if stored is None or stored.shape != shape[::-1]:
            actual = "nothing"
            if stored is not None:
                actual = f"shape {stored.shape}"
            raise NaloraError(
                f"{path}: {_WHOLE[name]}",
                expected=f"a tensor for {name} {shape}",
                found=actual,
            )
        leaves[name] = np.array(stored.T, order="C")
    return leaves
