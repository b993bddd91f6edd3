"""Tokenizers from GGUF metadata, against transformers building one from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.weights.gguf import GGUFFile, read_tokenizer
from tests.weights.gguf_files import finish

CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome. It's what I'd say they've said.",
    "def add(first, second):\n    if first:\n        return first + second\n\n\n\tpass",
    "In 1234567 years, 89.01% of 12 12 12 12 people will have 345 345 345 apples -- naïve café, 東京 東京, Привет!",
    "HELLO Hello hello HTTPServer camelCase snake_case <b>bold</b> https://a.b/c?d=e&f=g",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   leading and trailing   ",
    "  12  345\u00b2 \u0661\u0662\u0663",
    "tabs\t\tand\r\n\r\nnewlines\n \n  \n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|><|unknown|>",
    "emoji 🙂 \U0001f468\u200d\U0001f469\u200d\U0001f467 and \ufeff \x00 \x7f",
    "it's IT'S we'll WE'LL don't",
    "zażółć gęślą jaźń 한국어 العربية हिन्दी ไทย",
]
CONTROL, USER_DEFINED, BYTE = (
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.BYTE,
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a learned byte-level vocabulary, and a token to which no merge leads."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 700, "special_tokens": SPECIAL, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(**options, show_progress=False, min_frequency=1)
    backend.train_from_iterator([*CORPUS, *TEXTS], trainer)
    merges = [f"{left} {right}" for left, right in json.loads(backend.to_str())["model"]["merges"]]
    tokens = backend.get_vocab()
    return [*sorted(tokens, key=tokens.__getitem__), "qzx"], merges


def write(path: Path, architecture: str = "llama", **metadata: Any) -> Path:
    """A GGUF file with a tokenizer and one small tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = dict.fromkeys(("context_length", "embedding_length", "feed_forward_length"), 8)
    sizes |= dict.fromkeys(("block_count", "head_count", "head_count_kv"), 1)
    for name, value in {**sizes, "layer_norm_rms_eps": 1e-5, **metadata}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.ones((len(metadata["token_list"]), 8), np.float32))
    return finish(writer, path)


def write_byte_level(
    path: Path, pre: str, tokens: list[str], merges: list[str], **more: Any
) -> Path:
    kinds = [CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    fields = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": kinds,
    }
    return write(
        path, **fields, token_merges=merges, **({"bos_token_id": 1, "eos_token_id": 2} | more)
    )


def theirs(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_equal(ours: Tokenizer, reference: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        ids = reference.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2", "tekken", "smollm"])
def test_byte_level_vocabularies_equal_transformers(tmp_path, vocabulary, pre):
    path = write_byte_level(tmp_path / "m.gguf", pre, *vocabulary)
    ours, reference = read_tokenizer(GGUFFile(path)), theirs(path)
    if (
        pre == "smollm"
    ):  # transformers 5.24 reads GPT-2's rule; the model's own tokenizer.json splits digits first
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert_equal(ours, reference)
    # Llama 3 and Tekken take whole words before merges.
    assert len(ours.encode("qzx")) == (1 if pre in ("llama-bpe", "tekken") else 3)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (1, 2, 2, False)
    assert ours.eos_ids == (2, 0)


def test_qwen_composes_characters_as_its_own_tokenizer_does(tmp_path, vocabulary):
    path = write_byte_level(tmp_path / "m.gguf", "qwen2", *vocabulary)
    ids, merges = {token: i for i, token in enumerate(vocabulary[0])}, vocabulary[1]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    reference = transformers.Qwen2Tokenizer(vocab=ids, merges=pairs, eos_token="<|im_end|>")
    assert_equal(read_tokenizer(GGUFFile(path)), reference, ["cafe\u0301 1234", *CORPUS])


def test_stop_ids_template_and_special_tokens(tmp_path, vocabulary):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    more = {"add_bos_token": True, "chat_template": template, "eot_token_id": 7, "pad_token_id": 0}
    path = write_byte_level(tmp_path / "m.gguf", "llama-bpe", *vocabulary, **more)
    ours = read_tokenizer(GGUFFile(path))
    assert ours.eos_ids == (2, 7, 0)
    assert ours.pad_id == 0
    assert ours.encode("a") == theirs(path).encode("a")
    assert [1, *ours.encode("a", special=False)] == ours.encode("a")
    assert ours.render_chat([{"role": "user", "content": "hi"}]) == "<|im_start|>hi<|im_end|>"


def sentencepiece(more: list[tuple[str, int]]) -> dict[str, Any]:
    """Token metadata of a SentencePiece BPE vocabulary: specials, ``more``, bytes, merged pieces,
    characters."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False, min_frequency=1)
    )
    vocabulary = backend.get_vocab()
    first = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *more]
    first += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    learned = sorted(vocabulary.keys() - dict(first), key=lambda x: (len(x) == 1, vocabulary[x]))
    scores = [-1000.0 if kind == USER_DEFINED else 0.0 for _, kind in first]
    return {
        "tokenizer_model": "llama",
        "token_list": [token for token, _ in first] + learned,
        "token_types": [kind for _, kind in first] + [gguf.TokenType.NORMAL] * len(learned),
        "token_scores": [*scores, *(-float(i) for i in range(len(learned)))],
        **{"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {}),
        ("phi3", {}),
        ("llama", {"add_bos_token": False}),
        ("gemma3", {"add_space_prefix": False, "add_bos_token": True}),
    ],
)
def test_sentencepiece_vocabularies_equal_transformers(tmp_path, architecture, more):
    words = [("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<b>", USER_DEFINED)]
    spaces = [(text, USER_DEFINED) for text in ("\n", "\n\n", "  ", "   ", "    ")]
    fields = sentencepiece(words + (spaces if architecture == "gemma3" else []))
    path = write(tmp_path / "m.gguf", architecture, **fields, **more)
    ours = read_tokenizer(GGUFFile(path))
    assert_equal(ours, theirs(path))
    assert ours.add_bos == more.get("add_bos_token", True)
    if architecture == "gemma3":
        assert [ours.backend.id_to_token(i) for i in ours.encode("a    b")[2:-1]] == ["▁▁▁▁"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"tokenizer_pre": "chameleon"},
            "tokenizer.ggml.pre: expected one of .*smollm.*found 'chameleon'",
        ),
        ({"tokenizer_model": "bert"}, "tokenizer.ggml.model.*'bert'"),
        ({"token_merges": ["a b", "ab"]}, "merges: expected two tokens and one space"),
        ({"token_merges": ["qqq zzz"]}, "vocabulary and merges that fit together"),
        ({"token_types": [1, 2]}, "token_type: expected 703 numbers.*found 2"),
        ({"eos_token_id": 10_000}, "eos_token_id: expected an id below 703, found 10000"),
        *(
            ({name: None}, "no such key")
            for name in ("tokenizer_model", "token_merges", "eos_token_id")
        ),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, vocabulary, change, match):
    tokens, merges = vocabulary
    tokens = [*tokens, *(f"<{i}>" for i in range(703 - len(tokens)))]
    fields: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
    }
    fields |= {"token_types": [1] * 703, "token_merges": merges, "eos_token_id": 2} | change
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(NaloraError, match=match):
        read_tokenizer(GGUFFile(write(tmp_path / "m.gguf", **fields)))
