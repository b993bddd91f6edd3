"""Texts as the tokens that an encoder takes: special tokens by the tokenizer's own rule, one length for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from nalora_jax.errors import NaloraError
from nalora_jax.tokenizer import read_backend, read_json

_MULTIPLE = 8  # lengths are multiples, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """The tokenizer of a text encoder.

    Args:
      backend: with the post-processor that puts begin and end around a text.
      max_length: tokens of the longest text; longer ones are cut, their end token kept.
      pad_id: fills rows.
      fixed: every row has ``max_length`` tokens (SigLIP was trained so).
      left: padding comes first.
      lowercase: texts are lowered first (SigLIP 2).
    """

    backend: tokenizers.Tokenizer
    max_length: int
    pad_id: int
    fixed: bool = False
    left: bool = False
    lowercase: bool = False

    def __call__(self, texts: Sequence[str], *, length: int = 0) -> dict[str, np.ndarray]:
        """``tokens`` int32 and ``token_weights`` float32 (1 for what is no padding), ``[texts, length]``.

        Args:
          texts: any number of them.
          length: of every row; by default what the longest needs, in eights, up to ``max_length``.
        """
        texts = [text.lower() for text in texts] if self.lowercase else list(texts)
        self.backend.enable_truncation(length or self.max_length)
        rows = [encoding.ids for encoding in self.backend.encode_batch(texts)]
        longest = max((len(row) for row in rows), default=1)
        if not length:
            length = self.max_length if self.fixed else min(self.max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
        tokens = np.full((len(rows), length), self.pad_id, np.int32)
        weights = np.zeros((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if self.left else slice(0, len(row))
            tokens[i, place], weights[i, place] = row, 1.0
        return {"tokens": tokens, "token_weights": weights}


def read_text_tokenizer(folder: Path, *, max_length: int, vocab_size: int, fixed: bool = False) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
      NaloraError: no tokenizer.json, a damaged one, one that is too large for the model, or no padding token.
    """
    path = folder / "tokenizer.json"
    backend = read_backend(path)
    if backend.get_vocab_size() > vocab_size:
        raise NaloraError(
            str(path),
            expected=f"at most {vocab_size} tokens, the rows of the embedding",
            found=backend.get_vocab_size(),
        )
    settings = read_json(folder / "special_tokens_map.json", missing={})
    settings |= read_json(folder / "tokenizer_config.json", missing={})
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    pad_id = backend.token_to_id(pad) if isinstance(pad, str) else None
    if pad_id is None:
        remedy = "set pad_token to a token of the vocabulary"
        raise NaloraError(str(folder / "tokenizer_config.json"), expected="pad_token", found=repr(pad), remedy=remedy)
    return TextTokenizer(
        backend,
        max_length,
        pad_id,
        fixed=fixed,
        left=settings.get("padding_side") == "left",
        lowercase=settings.get("tokenizer_class") == "Siglip2Tokenizer",
    )
