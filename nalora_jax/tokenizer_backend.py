"""Reading of ``tokenizer.json``, and errors of the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from nalora_jax.bounded.expressions import check_expressions
from nalora_jax.bounded.growth import check_growth
from nalora_jax.errors import NaloraError

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
        check_growth(raw, str(path))
        check_expressions(raw, str(path))
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
