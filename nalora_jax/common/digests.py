"""Digests of bytes, JSON values, files and folders, which detect damage and edits.

A JSON object of a run's log, of ``sweep.json``, of ``before.json`` or of a kept plan ends with the
digest of its other fields, as `json.dumps` writes them:

    {"step": 10, "loss": 3.2, "sha256": "9f86d081884c7d65"}

A record of a study has a longer one, under another name and of sorted fields. Objects without a
digest are accepted: earlier versions wrote none, and a user who edits a line removes it.

A checkpoint and a cache of tokens have a file ``digests.json`` with one entry per file:

    {"metadata": "9f86d081884c7d65...", "d/1f0a...": "60303ae22b998861..."}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from nalora_jax.common.files import names_below
from nalora_jax.errors import NaloraError

DIGESTS = "digests.json"
FIELD = "sha256"
_LENGTH = 16  # hexadecimal digits


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``record``, which holds plain JSON types, with its digest as the last field."""
    return {**record, FIELD: json_digest(record)[:_LENGTH]}


def unseal(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns ``record`` without its digest.

    Args:
      record: a parsed JSON object.
      where: file and line, for the message.

    Raises:
      NaloraError: the digest does not match the content.
    """
    content = {name: value for name, value in record.items() if name != FIELD}
    if FIELD in record and record[FIELD] != json_digest(content)[:_LENGTH]:
        raise NaloraError(
            where,
            expected=f"the content that its {FIELD} was computed of",
            found="another",
            remedy=f"restore it from a copy; if you edited it, remove the field {FIELD}",
        )
    return content


def digest_of(content: bytes | str) -> str:
    """Returns the SHA-256, in hexadecimal, of bytes or of a text in UTF-8."""
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()


def json_digest(value: Any, **options: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of a value as JSON; options as of `json.dumps`."""
    return digest_of(json.dumps(value, **options))


def file_digest(path: Any, start: int = 0) -> str:
    """Returns the SHA-256, in hexadecimal, of a file's bytes starting at ``start``."""
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Any) -> None:
    """Writes ``folder/digests.json`` for all files in ``folder`` and its subfolders."""
    root = epath.Path(folder)
    listed = {
        name: file_digest(root / name)
        for name in sorted(names_below(root))
        if name != DIGESTS
    }
    (root / DIGESTS).write_text(json.dumps(listed, indent=0))


def find_damage(folder: Any) -> str | None:
    """Returns a text about the first difference from ``folder/digests.json``; None without any.

    Raises:
      FileNotFoundError: the folder has no list.
    """
    root = epath.Path(folder)
    text = (root / DIGESTS).read_bytes()
    try:
        listed = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return f"{DIGESTS} is damaged itself"
    present = set(names_below(root))
    for name, digest in listed.items():
        if name not in present:
            return f"{name} is missing"
        if file_digest(root / name) != digest:
            return f"{name} is not what was written"
    return None
