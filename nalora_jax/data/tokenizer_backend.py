"""Reading of ``tokenizer.json``, and errors of the tokenizers library."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from nalora_jax.errors import NaloraError

# A tokenizer.json is a program: a list of replacements, each of which may double the text, and which
# the tokenizers library runs without a limit.
# A space becomes three bytes, a ligature eighteen letters; ALBERT's rules in sequence reach about
# 970.
LONGEST, TOKENS = 1024.0, 4096
_UNICODE = {"NFKC": 18.0, "NFKD": 18.0, "NFC": 3.0, "NFD": 4.0, "Lowercase": 3.0, "ByteLevel": 2.0}
_MAX_BYTES = 256 << 20  # Gemma's, among the largest, has 33 MB


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads a ``tokenizer.json`` and turns truncation and padding off.

    Raises:
      NaloraError: the file is missing, larger than any tokenizer's, or damaged.
    """
    if not path.is_file():
        expected = "the file"
        remedy = "save it with transformers: AutoTokenizer.from_pretrained(model).save_pretrained(folder)"
        raise NaloraError(str(path), expected=expected, found="nothing of that name", remedy=remedy)
    if path.stat().st_size > _MAX_BYTES:
        size = f"{path.stat().st_size >> 20} MB"
        raise NaloraError(str(path), expected=f"a tokenizer of up to {_MAX_BYTES >> 20} MB", found=size)
    try:
        content = path.read_bytes()
        raw = json.loads(content)
        _check_growth(raw, str(path))
        backend = tokenizers.Tokenizer.from_buffer(content)
    except NaloraError:
        raise
    except BaseException as error:  # the binding raises Exceptions, and panics (BaseException)
        if is_foreign(error):
            raise NaloraError(
                str(path), expected="a tokenizer", found=error, remedy="download the file again"
            ) from error
        raise
    backend.no_truncation()  # stored by the program that saved the file last; not part of the model
    backend.no_padding()
    return backend


def is_foreign(error: BaseException) -> bool:
    """Returns True if ``error`` was raised by a library: any error except an interrupt.

    A panic in Rust is a ``PanicException``, which is not an `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def tokenizer_errors(what: str, *texts: str) -> Iterator[None]:
    """Converts errors of the tokenizers library to a `NaloraError` that names the text."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        broken = next((text for text in texts if not is_unicode(text)), None)
        if broken is None:
            expected = "what the model's tokenizer can take"
            raise NaloraError(what, expected=expected, found=error) from error
        raise unicode_error(what, broken) from error


def unicode_error(where: str, text: str) -> NaloraError:
    """Returns the error about a text that contains half of a surrogate pair."""
    actual = f"half a character in {text[:60]!r}"
    remedy = "rewrite the text: half of a surrogate pair is not a character"
    return NaloraError(where, expected="Unicode text", found=actual, remedy=remedy)


def is_unicode(text: str) -> bool:
    """Returns True if ``text`` can be encoded: JSON may contain half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_growth(raw: Any, where: str) -> None:
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
