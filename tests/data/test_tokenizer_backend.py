"""Tokenizers that lengthen texts without end are refused; those of real models are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError


def folder(path: Path, **parts: Any) -> Path:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    for name, part in parts.items():
        if not isinstance(part, dict):
            setattr(backend, name, part)
    raw = json.loads(backend.to_str()) | {
        name: part for name, part in parts.items() if isinstance(part, dict)
    }
    (path / "tokenizer.json").write_text(json.dumps(raw))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def test_doubling_replacements(tmp_path: Path) -> None:
    doubling = normalizers.Sequence([normalizers.Replace("a", "aa")] * 11)
    with pytest.raises(
        NaloraError, match=r"normalizer: expected rules that make a text at most 1024 .* found .* 2.05e\+03"
    ):
        Tokenizer.from_folder(folder(tmp_path, normalizer=doubling))
    ten = normalizers.Sequence([normalizers.Replace("a", "aa")] * 10)
    found = Tokenizer.from_folder(folder(tmp_path, normalizer=ten)).backend
    assert len(found.normalizer.normalize_str("a")) == 1024


def test_an_expression_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(NaloraError, match="normalizer"):
        Tokenizer.from_folder(
            folder(tmp_path, normalizer=normalizers.Replace(tokenizers.Regex("x*"), "long text" * 120))
        )


def test_the_decoder_and_the_post_processor(tmp_path: Path) -> None:
    with pytest.raises(NaloraError, match="decoder"):
        Tokenizer.from_folder(
            folder(tmp_path, decoder=decoders.Sequence([decoders.Replace("a", "aaa")] * 7))
        )
    template = processors.TemplateProcessing(single="</s> " * 5000 + "$A", special_tokens=[("</s>", 1)])
    with pytest.raises(NaloraError, match="post_processor: expected at most 4096 tokens .* found 5000"):
        Tokenizer.from_folder(folder(tmp_path, post_processor=template))


def test_a_table_of_sentencepiece(tmp_path: Path) -> None:
    table = (8).to_bytes(4, "little") + bytes(8) + b"x" * 1100 + b"\0"
    rule = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    with pytest.raises(NaloraError, match="normalizer"):
        Tokenizer.from_folder(folder(tmp_path, normalizer=rule))


def test_what_real_models_have(tmp_path: Path) -> None:
    """T5's, Llama's, CLIP's and BERT's rules, each alone."""
    for normalizer in (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " ")]),
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        normalizers.BertNormalizer(),
    ):
        assert Tokenizer.from_folder(folder(tmp_path, normalizer=normalizer)).eos_id == 1
