"""Files by which sentence-transformers reads an adapter's folder as a model of vectors.

modules.json                          transformer, pooling, normalization
sentence_bert_config.json             longest text
config_sentence_transformers.json     similarity: the cosine
1_Pooling/config.json                 how tokens become a vector
2_Normalize/config.json
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nalora_jax.common.folders import write_json
from nalora_jax.weights.tokenizer_files import TEXT_FILES

_MODULES = "modules.json"
_POOLING = "1_Pooling/config.json"
_NORMALIZE = "2_Normalize/config.json"
_LENGTH = "sentence_bert_config.json"
_SIMILARITY = "config_sentence_transformers.json"
EMBEDDING_FILES = (_MODULES, _POOLING, _NORMALIZE, _LENGTH, _SIMILARITY)
# Our name of a pooling -> the flag of sentence-transformers' files that is true.
_FLAGS = {
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def write_embedding_files(
    folder: Path, *, d_model: int, pooling: str, max_length: int
) -> None:
    """Writes the files into an adapter's folder, in the form that all releases since 2.3 read.

    Args:
      folder: of the adapter, with the tokenizer.
      d_model: size of the vectors.
      pooling: "first", "mean" or "last".
      max_length: tokens at which a text is cut.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = []
    for number, (path, kind) in enumerate(kinds.items()):
        name = f"sentence_transformers.models.{kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": name})
    settings: dict[str, object] = {"word_embedding_dimension": d_model}
    for name, flag in _FLAGS.items():
        settings[flag] = name == pooling
    contents: dict[str, object] = {
        _MODULES: modules,
        _POOLING: settings,
        _NORMALIZE: {},
        _LENGTH: {"max_seq_length": max_length, "do_lower_case": False},
        _SIMILARITY: {"similarity_fn_name": "cosine"},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)


def copier_of(folder: Path) -> Callable[[Path], None] | None:
    """Returns a function that copies an adapter's files for sentence-transformers, with its
    tokenizer, to another folder; None if the adapter has none."""
    if not (folder / _MODULES).is_file():
        return None
    return partial(_copy_files, folder)


def _copy_files(source: Path, folder: Path) -> None:
    """Copies the files that exist."""
    for name in (*EMBEDDING_FILES, *TEXT_FILES):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
