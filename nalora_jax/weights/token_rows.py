"""Single trained rows of the embedding and head: PEFT's ``trainable_token_indices``.

    model.embed_tokens.token_adapter.trainable_tokens_delta [ids, d_model]  ->  embed/rows
    lm_head.token_adapter.trainable_tokens_delta [ids, d_model]             ->  lm_head/rows

In spite of its name the delta contains the trained rows themselves, not their difference to the
base. A tied head shares the embedding's rows and has no separate tensor, unless it is named with
other indices.

An embedding that was resized before training is also written in full
(``token_adapter.base_layer``), because no base has the rows of the other new tokens. Such tables
are read like ``modules_to_save``, with the trained rows inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import check_token_indices
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import ROWS, AdapterSpec
from nalora_jax.weights.peft_config import PeftConfig
from nalora_jax.weights.saved_modules import RESIZED, tensor_names

_ROWS = "token_adapter.trainable_tokens_delta"


def take_token_rows(
    config: ModelConfig, tensors: dict[str, np.ndarray], peft: PeftConfig, where: str
) -> tuple[dict[str, np.ndarray], tuple[tuple[str, tuple[int, ...]], ...]]:
    """Removes the trained rows from an adapter's tensors and returns them.

    If the tables were resized, their full table stays in ``tensors``.

    Args:
      config: the base model, resized for the adapter.
      tensors: by PEFT's key; entries of rows are removed, and resized tables are moved to the key
        of a trained table.
      peft: ``adapter_config.json``.
      where: the tensor file, for error messages.

    Returns:
      Leaves of the ``lora`` tree by path, and the tables with their ids in the order of the rows.

    Raises:
      NaloraError: an id has no row in the base, a table is also named by ``modules_to_save``, or
        rows are missing or have the wrong shape.
    """
    spec = AdapterSpec(token_indices=peft.token_indices, saved=_names(peft.modules_to_save))
    remedy = "use its own base; if tokens were added, their tokenizer must be in the adapter's folder"
    check_token_indices(spec, config, f"{peft.where}: trainable_token_indices", remedy)
    trained = spec.own_rows(tied=config.tie_embeddings)
    leaves: dict[str, np.ndarray] = {}
    taken_rows: set[str] = set()
    for name, tensor in tensor_names(config).items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        # A tied head's rows, if they are in the file at all, are a copy of the embedding's.
        ids = trained.get(name, trained.get("embed_tokens", ()) if config.tie_embeddings else ())
        rows, table = (tensors.pop(f"{module}.{name}", None) for name in (_ROWS, RESIZED))
        if rows is None and name in trained:
            expected = f"the trained rows of {name}"
            raise NaloraError(f"{where}: {module}.{_ROWS}", expected=expected, found="nothing")
        if rows is not None and rows.shape != (len(ids), config.d_model):
            raise NaloraError(
                f"{where}: {module}.{_ROWS}",
                expected=f"shape {(len(ids), config.d_model)}, a row for each of trainable_token_indices",
                found=f"shape {rows.shape}",
            )
        if table is not None:
            # take_saved raises an error for a table with another shape.
            if rows is not None and table.shape == (config.vocab_size, config.d_model):
                table[list(ids)] = rows
            tensors[f"{module}.weight"] = table
        elif rows is not None and name in trained:
            leaves[ROWS[name]] = rows
            taken_rows.add(name)
    if "embed_tokens" in taken_rows and "lm_head" not in trained:  # the head has the embedding's rows
        taken_rows.add("lm_head")
    return leaves, tuple((name, ids) for name, ids in peft.token_indices if name in taken_rows)


def _names(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in modules)


def token_row_tensors(
    lora: Mapping[str, Any], spec: AdapterSpec, config: ModelConfig
) -> dict[str, np.ndarray]:
    """Returns the trained rows by PEFT's key, in the layout of its files."""
    leaves, names = trees.flatten(lora), tensor_names(config)
    return {
        f"base_model.model.{names[name].removesuffix('.weight')}.{_ROWS}": np.asarray(
            leaves[ROWS[name]], np.float32
        )
        for name in spec.own_rows(tied=config.tie_embeddings)
    }


def token_settings(spec: AdapterSpec) -> dict[str, Any]:
    """Returns the field of ``adapter_config.json``; empty if no rows are trained.

    Example: ``{"trainable_token_indices": [5, 6]}`` for the embedding alone, otherwise
    ``{"embed_tokens": [5, 6], ...}``.
    """
    listed = {name: list(ids) for name, ids in spec.token_indices}
    if set(listed) == {"embed_tokens"}:
        return {"trainable_token_indices": listed["embed_tokens"]}
    return {"trainable_token_indices": listed} if listed else {}
