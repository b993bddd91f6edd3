"""Bounds how much longer the rules of a tokenizer can make a text, from its JSON, before it is used.

A ``tokenizer.json`` is a program: a list of replacements, each of which may double the text. The tokenizers library
runs them in this process without a limit.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from nalora_jax.errors import NaloraError

# A space becomes three bytes, a ligature eighteen letters; ALBERT's rules in sequence reach about
# 970.
LONGEST, TOKENS = 1024.0, 4096
_UNICODE = {"NFKC": 18.0, "NFKD": 18.0, "NFC": 3.0, "NFD": 4.0, "Lowercase": 3.0, "ByteLevel": 2.0}


def check_growth(raw: Any, where: str) -> None:
    """Refuses a parsed ``tokenizer.json`` whose rules can lengthen a text without reasonable bound.

    Args:
      raw: the parsed file, of any content; the tokenizers library checks everything except these
        rules.
      where: the file, for the message.

    Raises:
      NaloraError: normalizer or decoder can make a text more than 1,024 times as long, or the
        post-processor adds more than 4,096 tokens to each text.
    """
    if not isinstance(raw, Mapping):
        return
    for component in ("normalizer", "decoder"):
        growth = _growth(raw.get(component))
        if growth > LONGEST:
            raise NaloraError(
                f"{where}: {component}",
                expected=f"rules that make a text at most {LONGEST:.0f} times as long",
                found=f"rules that can make it {growth:.3g} times as long",
                remedy="use the tokenizer that the model's authors published",
            )
    added = _added(raw.get("post_processor"))
    if added > TOKENS:
        expected = f"at most {TOKENS} tokens added to a text"
        raise NaloraError(f"{where}: post_processor", expected=expected, found=f"{added}")


def _growth(rule: Any) -> float:
    """Returns the largest ratio of bytes after ``rule`` to bytes before it."""
    if not isinstance(rule, Mapping):
        return 1.0
    product = 1.0
    for name in ("normalizers", "decoders"):
        for inner in _items(rule.get(name)):
            product *= _growth(inner)
    kind = rule.get("type")
    if kind == "Replace":
        product *= _replacement(rule.get("pattern"), rule.get("content"))
    elif kind == "Precompiled":
        product *= _precompiled(rule.get("precompiled_charsmap"))
    elif isinstance(kind, str):
        product *= _UNICODE.get(kind, 1.0)
    return product


def _replacement(pattern: Any, content: Any) -> float:
    if not isinstance(content, str):
        return 1.0
    size = len(content.encode(errors="replace"))
    text = _field(pattern, "String")
    if isinstance(text, str) and text:
        return max(1.0, size / len(text.encode(errors="replace")))
    return 1.0 + size  # a regular expression may match the empty text between any two bytes


def _precompiled(text: Any) -> float:
    """Returns the length of the longest replacement in SentencePiece's table, at least 1.

    The table contains the size of a trie, the trie, and replacements that each end with a zero.
    """
    try:
        table = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return 1.0  # the library reports the error
    replacements = table[4 + int.from_bytes(table[:4], "little") :]
    return float(max(1, max(map(len, replacements.split(b"\0")), default=1)))


def _added(rule: Any) -> int:
    """Returns the number of tokens that a post-processor adds to a text."""
    total = sum(map(_added, _items(_field(rule, "processors"))))
    for piece in _items(_field(rule, "single")):
        name = _field(_field(piece, "SpecialToken"), "id")
        token = _field(_field(rule, "special_tokens"), name)
        total += len(_items(_field(token, "ids")))
    return total


def _field(value: Any, name: Any) -> Any:
    """Returns ``value[name]`` of an object; None if it is another value or has no such field."""
    if isinstance(value, Mapping):
        return value.get(name)
    return None


def _items(value: Any) -> list[Any]:
    """Returns a list; [] for another value."""
    if isinstance(value, list):
        return value
    return []
