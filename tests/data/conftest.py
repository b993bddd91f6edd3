"""A small real tokenizer and small real files."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nalora_jax.common.downloads import cache_dir
from nalora_jax.data.tokenizer import Tokenizer

CHATML = (Path(__file__).parent / "templates" / "chatml.jinja").read_text()
_CORPUS = [
    "Question: What is the capital of France?\nAnswer: Paris, the city of light.",
    "Question: Which way is up?\nAnswer: the way that is not down.\n\n\nYes\n\n\nNo",
    "system user assistant You are a helpful assistant. Tell me more about the sea, the sky and the green hills.",
] * 8


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with ChatML's special tokens: every text can be encoded, words take one or two
    tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return Tokenizer(backend, bos_id=1, eos_id=2, pad_id=0, eos_ids=(2, 0), chat_template=CHATML)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A new cache, with the downloads of the shared one."""
    folder, downloads = tmp_path / "cache", cache_dir() / "packages"
    folder.mkdir()
    if downloads.exists():
        (folder / "packages").symlink_to(downloads)
    monkeypatch.setenv("NALORA_CACHE", str(folder))
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records, one a line (texts go in as they are), and returns the path."""

    def write(*records, name="data.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
