"""Tokenization for text encoders: special tokens from the post-processor, rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from nalora_jax.data.tokenizer import read_json
from nalora_jax.data.tokenizer_backend import read_backend
from nalora_jax.errors import NaloraError

_MULTIPLE = 8  # lengths are rounded up to it, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """The tokenizer of a text encoder.

    Args:
      backend: its post-processor adds begin and end tokens.
      max_length: tokens of the longest text; longer texts are cut but keep their end token.
      pad_id: the padding token.
      fixed: pad every row to ``max_length`` tokens, as in the training of SigLIP.
      left: pad on the left.
      lowercase: convert texts to lower case first (SigLIP 2).
    """

    backend: tokenizers.Tokenizer
    max_length: int
    pad_id: int
    fixed: bool = False
    left: bool = False
    lowercase: bool = False

    def __call__(self, texts: Sequence[str], *, length: int = 0) -> dict[str, np.ndarray]:
        """Returns ``tokens`` int32 and ``token_weights`` float32, ``[texts, length]``.

        The weight of padding is 0.

        Args:
          texts: any number of texts.
          length: tokens per row; by default the longest text's, rounded up to a multiple of 8, at
            most ``max_length``.
        """
        if self.lowercase:
            texts = [text.lower() for text in texts]
        self.backend.enable_truncation(length or self.max_length)
        rows = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        longest = max((len(row) for row in rows), default=1)
        if self.fixed:
            longest = self.max_length
        length = length or min(self.max_length, -(-longest // _MULTIPLE) * _MULTIPLE)
        tokens = np.full((len(rows), length), self.pad_id, np.int32)
        weights = np.zeros((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if self.left else slice(0, len(row))
            tokens[i, place], weights[i, place] = row, 1.0
        return {"tokens": tokens, "token_weights": weights}


def read_text_tokenizer(
    folder: Path, *, max_length: int, vocab_size: int, fixed: bool = False
) -> TextTokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    Raises:
      NaloraError: tokenizer.json is missing or damaged, has more tokens than the embedding has
        rows, or defines no padding token.
    """
    path = folder / "tokenizer.json"
    backend = read_backend(path)
    if backend.get_vocab_size() > vocab_size:
        expected = f"at most {vocab_size} tokens, the rows of the embedding"
        raise NaloraError(str(path), expected=expected, found=backend.get_vocab_size())
    settings = read_json(folder / "special_tokens_map.json", missing={})
    settings |= read_json(folder / "tokenizer_config.json", missing={})
    pad = settings.get("pad_token")
    if isinstance(pad, dict):
        pad = pad.get("content")
    pad_id = backend.token_to_id(pad) if isinstance(pad, str) else None
    if pad_id is None:
        remedy = "set pad_token to a token of the vocabulary"
        raise NaloraError(
            str(folder / "tokenizer_config.json"), expected="pad_token", found=repr(pad), remedy=remedy
        )
    return TextTokenizer(
        backend,
        max_length,
        pad_id,
        fixed=fixed,
        left=settings.get("padding_side") == "left",
        lowercase=settings.get("tokenizer_class") == "Siglip2Tokenizer",
    )
