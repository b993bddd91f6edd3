"""Builds the tokenizer that a GGUF file's metadata describes.

Two kinds of vocabulary are supported: byte-level BPE ("gpt2", with a list of merges and a named
rule for splitting text first) and SentencePiece BPE ("llama": Llama 2, Mistral, Gemma, Phi-3;
merges follow from the scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nalora_jax.data import tokenizer as ours
from nalora_jax.data.tokenizer import is_foreign
from nalora_jax.errors import NaloraError
from nalora_jax.models.family import Metadata
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.gguf_config import hf_config
from nalora_jax.weights.model_files import SINGLE_FILES

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
# Stop tokens by name: metadata has one end-of-sequence id, but chat models also stop at others.
_STOPS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the expression that cuts text into words; "" is GPT-2's rule, "digits" the
# same after splitting off single digits
_SPLITS = {
    "": "",
    "default": "",
    "gpt-2": "",
    "smollm": "digits",
    "refact": "digits",  # Granite
    "starcoder": "digits",
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,  # OLMo 2
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# Vocabularies in which a word that is a token takes precedence over the result of the merges.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")


def open_gguf(path: Path) -> tuple[GGUFFile, dict[str, Any], ours.Tokenizer]:
    """Opens a GGUF file: its tensors, what its ``config.json`` would be, and its tokenizer."""
    file = GGUFFile(path)
    return file, hf_config(file), read_tokenizer(file)


SINGLE_FILES["gguf"] = open_gguf


def read_tokenizer(file: GGUFFile) -> ours.Tokenizer:
    """Builds the tokenizer in ``file``.

    Raises:
      NaloraError: an unknown kind of vocabulary or splitting rule, or inconsistent metadata.
    """
    about = file.about("tokenizer.ggml")
    kind, tokens = about.get("model", str), about.get("tokens", list)
    if kind not in ("gpt2", "llama"):
        raise about.error("model", "gpt2 (byte-level BPE) or llama (SentencePiece BPE)", repr(kind))
    try:
        if kind == "gpt2":
            backend = _byte_level(about, tokens)
        else:
            backend = _sentencepiece(about, tokens, file.about("general").get("architecture", str))
        _add_special(backend, tokens, _numbers(about, "token_type", len(tokens), default=1))
    except NaloraError:
        raise
    except BaseException as error:  # the binding raises Exceptions, and panics (BaseException)
        if is_foreign(error):
            raise about.error("tokens", "a vocabulary and merges that fit together", error) from error
        raise
    return _wrapped(file, about, backend, tokens, adds_bos=kind == "llama")


def _wrapped(
    file: GGUFFile, about: Metadata, backend: Tokenizer, tokens: list[str], *, adds_bos: bool
) -> ours.Tokenizer:
    """Adds the special ids, and the special tokens' texts for chat templates."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    optional = {name: _token_id(about, f"{theirs}_token_id", len(tokens)) for name, theirs in names.items()}
    ids = {name: token_id for name, token_id in optional.items() if token_id is not None}
    if "eos" not in ids:
        raise about.error("eos_token_id", "the id of the token that ends a text", "no such key")
    by_name = [backend.token_to_id(name) for name in _STOPS]
    stops = [ids["eos"], *(ids.pop(name) for name in ("eot", "eom") if name in ids)]
    stops += [token_id for token_id in by_name if token_id is not None]
    keys = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
    template, tool_template = (
        value if isinstance(value := file.metadata.get(key), str) else None for key in keys
    )
    return ours.Tokenizer(
        backend=backend,
        bos_id=ids.get("bos"),
        eos_id=ids["eos"],
        pad_id=ids.get("pad", ids["eos"]),
        eos_ids=tuple(dict.fromkeys(stops)),
        chat_template=template,
        tool_template=tool_template,
        add_bos="bos" in ids and about.get("add_bos_token", bool, adds_bos),
        special_tokens={f"{name}_token": tokens[token_id] for name, token_id in ids.items()},
    )


# ---------------------------------------------------------------- byte-level BPE


def _byte_level(about: Metadata, tokens: list[str]) -> Tokenizer:
    rule = about.get("pre", str, "")
    if rule not in _SPLITS:
        raise about.error("pre", f"one of {', '.join(name for name in _SPLITS if name)}", repr(rule))
    listed = about.get("merges", list)
    if any(pair.count(" ") != 1 for pair in listed):
        raise about.error("merges", "two tokens and one space in each", "another form")
    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in listed)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WHOLE_WORDS))
    backend.pre_tokenizer = _splitter(_SPLITS[rule])
    if _SPLITS[rule] == _QWEN2:  # its tokenizer.json composes characters first
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(rule: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("", "digits"))
    if rule == "":
        return byte_level
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if rule != "digits":
        first = pre_tokenizers.Split(Regex(rule), behavior="isolated")
    return pre_tokenizers.Sequence([first, byte_level])


# ---------------------------------------------------------------- SentencePiece BPE


def _sentencepiece(about: Metadata, tokens: list[str], architecture: str) -> Tokenizer:
    token_set = set(tokens)
    # GGUF files write runs of spaces as spaces; the tokenizer needs SentencePiece's visible mark.
    spelled = [
        t if t.strip(" ") or not t or _SPACE * len(t) in token_set else _SPACE * len(t) for t in tokens
    ]
    kinds = _numbers(about, "token_type", len(tokens), default=1)
    scores = _numbers(about, "scores", len(tokens), default=0)
    vocabulary = {token: i for i, token in enumerate(spelled)}
    unknown = _token_id(about, "unknown_token_id", len(tokens))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, spelled, scores, kinds),
            unk_token=None if unknown is None else spelled[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = about.get("add_space_prefix", bool, True)
    if prefix:
        steps.append(decoders.Strip(" ", left=1))
    if not prefix:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    elif architecture == "phi3":
        # As in its tokenizer.json: a space precedes every piece of text.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(
    vocabulary: dict[str, int], tokens: Sequence[str], scores: np.ndarray, kinds: np.ndarray
) -> list[tuple[str, str]]:
    """Returns every split of a token into two tokens: the best token's first, and longest left part first.

    SentencePiece merges the pair whose result has the highest score; of equal scores the first
    token in the file is used. User-defined tokens have no meaningful score and come before all
    others, as in the models' merge lists.
    """
    order = np.lexsort((np.arange(len(tokens)), -scores, kinds != _USER_DEFINED))
    return [
        (token[:k], token[k:])
        for token in (tokens[i] for i in order.tolist())
        for k in range(len(token) - 1, 0, -1)
        if token[:k] in vocabulary and token[k:] in vocabulary
    ]


# ---------------------------------------------------------------- metadata


def _add_special(backend: Tokenizer, tokens: list[str], kinds: np.ndarray) -> None:
    """Registers control and user-defined tokens, which are recognized before any text is split."""
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        chosen = [tokens[i] for i in np.flatnonzero(kinds == kind)]
        present = [
            token for token in chosen if backend.token_to_id(token) is not None
        ]  # others would get new ids
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in present])


def _numbers(about: Metadata, name: str, length: int, *, default: float) -> np.ndarray:
    """Returns one number per token."""
    if not about.has(name):
        return np.full(length, default)
    value: np.ndarray = about.get(name, np.ndarray)
    if value.size != length:
        raise about.error(name, f"{length} numbers, one per token", value.size)
    return value


def _token_id(about: Metadata, name: str, length: int) -> int | None:
    if not about.has(name):
        return None
    value: int = about.get(name, int)
    if not 0 <= value < length:
        raise about.error(name, f"an id below {length}", value)
    return value
