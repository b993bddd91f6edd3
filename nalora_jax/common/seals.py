"""Digests inside JSON objects, which detect damage and edits.

    {"step": 10, "loss": 3.2, "sha256": "9f86d081884c7d65"}

The digest is computed from the object without it, as `json.dumps` writes it. Objects without a
digest are accepted: earlier versions wrote none, and a user who edits a line removes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nalora_jax.errors import NaloraError

FIELD = "sha256"
_LENGTH = 16  # hexadecimal digits


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``record``, which holds plain JSON types, with its digest as the last field."""
    return {**record, FIELD: _digest(record)}


def unseal(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns ``record`` without its digest.

    Args:
      record: a parsed JSON object.
      where: file and line, for the message.

    Raises:
      NaloraError: the digest does not match the content.
    """
    content = {name: value for name, value in record.items() if name != FIELD}
    if FIELD in record and record[FIELD] != _digest(content):
        expected = f"the content that its {FIELD} was computed of"
        remedy = f"restore it from a copy; if you edited it, remove the field {FIELD}"
        raise NaloraError(where, expected=expected, found="another", remedy=remedy)
    return content


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:_LENGTH]
