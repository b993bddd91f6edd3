"""Digests of data files, and errors of the file system about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_jax.common import buckets
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.errors import NaloraError


def data_digest(path: Path | str) -> str:
    """Returns the sha256 of a file, or of the checksum that the bucket of a URL stores.

    Raises:
      NaloraError: the file cannot be read.
    """
    if isinstance(path, str):
        return digest_of(buckets.version(path))
    with readable(path):
        return file_digest(path)


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
