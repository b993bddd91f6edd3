"""Names of a layer's arrays: paths in a stack, in a uniform model, and in patterns of rules."""

from __future__ import annotations

import re
from typing import Any

_STACK = re.compile(r"(?<=layers/)group\d+/block\d+/")
_EXACT = "router/correction"  # rounding it would choose other experts


def leaf_dtype(path: str, dtype: Any) -> Any:
    """Returns the dtype in which a model of ``dtype`` holds an array."""
    if path.endswith(_EXACT):
        return "float32"
    return dtype


def uniform_path(path: str) -> str:
    """Returns a path without the names of group and block.

    Example: ``layers/group0/block1/ffn/gate_proj`` -> ``layers/ffn/gate_proj``.
    """
    return _STACK.sub("", path)


def layer_path(path: str, number: int) -> str:
    """Returns the path of one layer's array, which rules are searched in.

    Example: ``layers/group0/block1/ffn/gate_proj`` of layer 5 -> ``layers/5/ffn/gate_proj``; a
    prefix before ``layers`` is kept.
    """
    head, _, tail = uniform_path(path).partition("layers/")
    return f"{head}layers/{number}/{tail}"
