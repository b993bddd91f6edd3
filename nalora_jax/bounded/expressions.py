"""Tries the regular expressions of a tokenizer on a sample text before the tokenizers library uses them here.

That library has no time limit: an expression that backtracks would block this process at its first text. The sample
detects expressions that are slow on any text, not those that are slow on one particular word.
"""

from __future__ import annotations

from typing import Any

from nalora_jax import bounded
from nalora_jax.errors import NaloraError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Expressions of Qwen, Llama 3 and CLIP, as published: trusted, so that the helper process need not
# start.
_KNOWN = frozenset(
    {
        rf"{_CONTRACTIONS}|\p{{N}}{_REST}",
        rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}{_REST}",
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"\s+",
    }
)
# 2 kB of words, numbers, marks, white space and other scripts, and long repetitions of a character.
SAMPLE = (
    "The quick brown fox's 1234567 jumps, isn't it?  \t(x_1 += 0.5e-3;)\r\n\r\n  def f(x):\n\t\treturn {x: [1, 2]}\n"
    "Ünïcode über straße, Привет мир, 東京は夜の七時, مرحبا, 🙂🙂 https://example.org/a/b-c?d=e&f=g#h\n"
) * 6 + "".join(one * 96 for one in "a1 .\n-")


def check_expressions(raw: Any, where: str) -> None:
    """Refuses a ``tokenizer.json`` whose expressions do not split 2 kB of text in seconds.

    Args:
      raw: the parsed file, of any content; the tokenizers library checks everything except
        expressions.
      where: the file, for the message.

    Raises:
      NaloraError: an expression exceeds the helper process's time or memory.
    """
    unsupported = [expression for expression in _expressions(raw) if expression not in _KNOWN]
    if not unsupported:
        return
    try:
        bounded.split(unsupported, SAMPLE)
    except bounded.BoundedError as error:
        raise NaloraError(
            f"{where}: Regex",
            expected="regular expressions that split 2 kB of text in seconds",
            found=error,
            remedy="use the tokenizer that the model's authors published",
        ) from error


def _expressions(raw: Any) -> list[str]:
    """Returns the distinct values of ``Regex`` in the rules that are applied to texts."""
    if not isinstance(raw, dict):
        return []
    expressions: dict[str, None] = {}
    left = [raw.get(rule) for rule in ("normalizer", "pre_tokenizer", "decoder")]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            left += node.values()
            if isinstance(node.get("Regex"), str):
                expressions[node["Regex"]] = None
    return list(expressions)
