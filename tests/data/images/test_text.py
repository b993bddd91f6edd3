"""Texts become the tokens that transformers' tokenizers make of them."""

import json

import numpy as np
import pytest
import transformers

from nalora_jax.data.images.files import read_text_tokenizer
from nalora_jax.errors import NaloraError

TEXTS = ["a photo of a red square", "A Green circle", "", "dress " * 30]


def test_rows_are_those_of_transformers(dual_folder):
    for family, padding in (("clip", True), ("siglip", "max_length")):
        folder = dual_folder(family)
        ours = read_text_tokenizer(folder, max_length=12, vocab_size=40, fixed=family == "siglip")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs(TEXTS, padding=padding, truncation=True, max_length=12, return_tensors="np")
        found = ours(TEXTS)
        np.testing.assert_array_equal(found["tokens"], expected["input_ids"])
        np.testing.assert_array_equal(found["token_weights"], expected["attention_mask"])
        assert ours(["a"], length=8)["tokens"].shape == (1, 8)


def test_clip_and_bert_tokenizers_from_their_files(tmp_path):
    """Byte-level BPE that ends words, and WordPiece with its normaliser, as those families' files hold them."""
    letters = "abcdefghijklmnopqrstuvwxyz!,"
    ends = [f"{c}</w>" for c in letters]
    words = [*letters, *ends, "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    clip = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    special, inner = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], [f"##{c}" for c in letters]
    pieces = [*special, *letters, *inner, "cat", "##ty"]
    bert = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(pieces)})
    for name, theirs in (("clip", clip), ("bert", bert)):
        theirs.save_pretrained(tmp_path / name)
        ours = read_text_tokenizer(tmp_path / name, max_length=16, vocab_size=100)
        texts = ["Cat, catty!", "a CAT sat", "é cat"]
        expected = theirs(texts, padding=True, truncation=True, max_length=16, return_tensors="np")
        found = ours(texts, length=expected["input_ids"].shape[1])
        np.testing.assert_array_equal(found["tokens"], expected["input_ids"])
        np.testing.assert_array_equal(found["token_weights"], expected["attention_mask"])


def test_bad_folders_are_named(dual_folder, tmp_path):
    with pytest.raises(NaloraError, match=r"tokenizer\.json"):
        read_text_tokenizer(tmp_path, max_length=8, vocab_size=40)
    folder = dual_folder("clip")
    with pytest.raises(NaloraError, match="rows of the embedding"):
        read_text_tokenizer(folder, max_length=8, vocab_size=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[NONE]"}))
    with pytest.raises(NaloraError, match="pad_token"):
        read_text_tokenizer(tmp_path, max_length=8, vocab_size=40)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(NaloraError, match="a tokenizer"):
        read_text_tokenizer(tmp_path, max_length=8, vocab_size=40)
