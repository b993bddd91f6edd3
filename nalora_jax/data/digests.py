"""Digests of data files, and errors of the file system about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_jax.common import buckets
from nalora_jax.errors import NaloraError


def file_digest(path: Path | str) -> str:
    """Returns the sha256 of a file, or of the checksum that the bucket of a URL stores.

    Raises:
      NaloraError: the file cannot be read.
    """
    if isinstance(path, str):
        return hashlib.sha256(buckets.version(path).encode()).hexdigest()
    with readable(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises file system errors about a path as errors of this library."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NaloraError(
            str(path), expected="a readable file", found=reason, remedy="check the path"
        ) from error
