"""Files in ``gs://`` and ``s3://`` buckets: listed, read by ranges, or copied to the cache.

`nalora_jax.common.uploads` writes to them.

Any process may read any file; each process requests only the files and ranges that it uses. The
stores' packages (gcsfs, s3fs) find the credentials in the same way as their command-line tools.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nalora_jax.common import downloads
from nalora_jax.common.digests import digest_of
from nalora_jax.common.files import scratch_file
from nalora_jax.errors import NaloraError

# By scheme: the package that reads it, the extra that has the package, and the
# command that logs in.
_STORES = {
    "gs": ("gcsfs", "gcs", "gcloud auth application-default login"),
    "s3": ("s3fs", "s3", "aws configure"),
}
_REFUSALS = re.compile(
    r"\b40[13]\b|Forbidden|Unauthorized|Access ?Denied|[Cc]redentials"
    r"|Anonymous caller|PermissionError"
)
# Fields of a store's listing that change with a file's content, the best one first.
_VERSIONS = (
    "md5Hash",
    "crc32c",
    "etag",
    "ETag",
    "generation",
    "LastModified",
    "mtime",
    "created",
)
# Errors of the local disk: full, over a quota, read-only, or a file too large.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def url(name: str) -> str | None:
    """Returns ``name`` as a URL, or None for a path.

    It repairs ``Path("gs://bucket")``, which has lost a slash.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])", name)
    if match is None:
        return None
    rest = name[match.end() :]
    return f"{match[1]}://{rest}"


def is_url(name: object) -> bool:
    """Returns True if ``name`` is the URL of a file or folder in a bucket."""
    return (
        isinstance(name, str) and name.partition("://")[0] in _STORES and "://" in name
    )


def bucket_url(name: str | Path) -> str | None:
    """Returns ``name`` as the URL of a file or folder in a bucket, or None for a path.

    Raises:
      NaloraError: ``name`` looks like a URL of another store.
    """
    where = url(str(name))
    if where is not None and not is_url(where):
        raise missing_package(where, where)
    return where


def missing_package(flag: str, where: str) -> NaloraError:
    """Returns the error for a URL whose package is not installed, or whose scheme is unknown."""
    package, extra, _ = _STORES.get(where.partition("://")[0], ("", "", ""))
    remedy = "use gs:// or s3://, or a folder"
    if package:
        remedy = f"pip install {package} (or nalora_jax with its extra `{extra}`)"
    return NaloraError(
        flag,
        expected="a folder, or a URL of a store that this Python can reach",
        found=where,
        remedy=remedy,
    )


def version(name: str) -> str:
    """Returns a text that changes with the file's content: its size and the store's checksum.

    Raises:
      NaloraError: there is no such file, the bucket cannot be reached, or it refuses.
    """
    with store_errors(name):
        about = filesystem(name).info(name)
        if about["type"] == "directory":
            raise FileNotFoundError(name)
    recorded = next((str(about[field]) for field in _VERSIONS if about.get(field)), "")
    return f"{about['size']}:{recorded}"


def size(name: str) -> int:
    """Returns the size of a file in bytes; raises as `version` does."""
    return int(version(name).partition(":")[0])


def files(name: str) -> list[str]:
    """Returns the sorted URLs of the files in the folder, or matching the pattern, ``name``.

    Raises:
      NaloraError: there is no such file, the bucket cannot be reached, or it refuses.
    """
    scheme = name.partition("://")[0]
    with store_errors(name):
        store = filesystem(name)
        if "*" in name:
            paths = store.glob(name)
        else:
            paths = store.find(name)
        if not paths:
            raise FileNotFoundError(name)
    return sorted(f"{scheme}://{path.lstrip('/')}" for path in paths)


def names(folder: str) -> list[str]:
    """Returns the names of a folder's files, without subfolders; raises as `files` does."""
    with store_errors(folder):
        entries = filesystem(folder).ls(folder, detail=True)
    return sorted(
        entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"
    )


def exists(name: str) -> bool:
    """Returns True if the file ``name`` exists; raises as `version` if the bucket fails."""
    with store_errors(name):
        try:
            return bool(filesystem(name).info(name)["type"] == "file")
        except FileNotFoundError:
            return False


def read_range(name: str, start: int, stop: int) -> bytes:
    """Returns bytes ``start`` to ``stop`` of a file in one request; fewer at the file's end.

    Raises:
      NaloraError: there is no such file, the bucket cannot be reached, or it refuses.
    """
    with store_errors(name):
        data: bytes = filesystem(name).cat_file(name, start=start, end=stop)
    return data


def open_ranges(name: str) -> Any:
    """Returns a file object that reads ranges on demand; raises as `read_range` does."""
    with store_errors(name):
        return filesystem(name).open(name, "rb")


def local_file(name: str) -> Path | None:
    """Returns the path of a file, or of its cached copy if ``name`` is a URL.

    It is None if there is no such file.

    Raises:
      NaloraError: the bucket refuses or cannot be reached, or the disk is full.
    """
    where = url(name)
    if where is None:
        path = Path(name)
        if path.is_file():
            return path
        return None
    if exists(where):
        return local_copy(where)
    return None


def local_copy(name: str) -> Path:
    """Returns a cached copy of a file's current content; raises as `local_folder` does."""
    return local_folder([name]) / name.rpartition("/")[2]


def local_path(folder: str | Path) -> Path:
    """Returns a folder's path; of a folder in a bucket, the path of a cached copy.

    The copy has its files, but not its subfolders.

    Raises as `bucket_url`, `names` and `local_folder` do.
    """
    where = bucket_url(folder)
    if where is None:
        return Path(folder)
    return local_folder(names(where), where)


def local_folder(names: Sequence[str], folder: str = "") -> Path:
    """Returns a cache folder with copies of files; each version of a file is fetched once.

    Args:
      names: URLs, whose last parts differ and are the names of the copies; or
        with ``folder``, names relative to that folder of a bucket, which may contain slashes.
      folder: URL.

    Raises:
      NaloraError: there is no such file, the bucket refuses or cannot be reached, or the disk is
        full.
    """
    sources = {name.rpartition("/")[2]: name for name in names}
    if folder:
        sources = {name: f"{folder.rstrip('/')}/{name}" for name in names}
    versions = [f"{source}\n{version(source)}" for source in sources.values()]
    copies = downloads.cache_dir() / "buckets" / digest_of("\n".join(versions))[:24]
    for relative, source in sources.items():
        target = copies / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():  # several processes may fetch it at once
            with store_errors(source), scratch_file(target) as scratch:
                filesystem(source).get_file(source, scratch.name)
    return copies


@cache
def _filesystem_of(scheme: str) -> Any:
    """Returns fsspec's file system of a scheme ("gs" or "s3"), made once per process."""
    import fsspec

    # Otherwise it logs whole responses, which the errors quote.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme, use_listings_cache=False)


def filesystem(name: str) -> Any:
    """Returns fsspec's file system for the URL ``name``.

    Raises:
      NaloraError: its package is not installed, or the scheme is unknown.
    """
    scheme = name.partition("://")[0]
    try:
        return _filesystem_of(scheme)
    except (ImportError, ValueError) as error:
        raise missing_package(name, name) from error


@contextmanager
def store_errors(name: str, access: str = "read") -> Iterator[None]:
    """Converts any error of a store's package to an error of this library.

    ``access`` is the right that the block needs: "read" or "write".
    """
    try:
        yield
    except NaloraError:
        raise
    except FileNotFoundError as error:
        raise NaloraError(
            name,
            expected="a file or a folder with files",
            found="none of that name",
            remedy="check the bucket and the name",
        ) from error
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        found = " ".join(message.split())[:200]
        expected = "the bucket to answer"
        remedy = "check the network"
        if isinstance(error, OSError) and error.errno in _LOCAL:
            expected = "room for a copy in the cache"
            found = str(error.strerror)
            remedy = "free space, or set NALORA_CACHE to another folder"
        elif _REFUSALS.search(f"{type(error).__name__} {found}"):
            expected = f"credentials that may {access} it"
            login = _STORES[name.partition("://")[0]][2]
            right = f"the right to {access} the bucket"
            remedy = f"log in with `{login}`, or give the machine's account {right}"
        raise NaloraError(
            name, expected=expected, found=found, remedy=remedy
        ) from error
