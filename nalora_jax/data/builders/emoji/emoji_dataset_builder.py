"""Builder of emoji pictures (64 x 64 PNG) with names and categories, from one pinned npm package.

A hash of its code points assigns each emoji to a split, so that splits are the same on every
machine and do not change when emoji are added: about 70% train, 15% validation, 15% test. Skin-tone
variants are left out, because nearly the same picture would be in several splits. The artwork is
Twitter's (Twemoji), CC-BY 4.0.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from nalora_jax.data.images import packages
from nalora_jax.errors import NaloraError

_RELEASE = "1.0.0"
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
SPLITS = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}
_COUNT = 1911
_ROOT = "package"


class Builder(tfds.core.GeneratorBasedBuilder):
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
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "category"),
            license="artwork CC-BY 4.0 (Twitter and other contributors), data MIT",
            disable_shuffling=True,  # readers shuffle with their seed
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # packages.fetch downloads, with its checksum
        return {split: self._generate_examples(*bounds) for split, bounds in SPLITS.items()}

    def _generate_examples(self, low: int, high: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = {
            f"{_ROOT}/img/twitter/64/{row['image']}": row
            for row in _described()
            if low <= _bucket(row["unified"]) < high
        }
        found: dict[str, bytes] = {}
        with tarfile.open(packages.fetch(packages.EMOJI)) as archive:
            for member in archive:
                if member.name in rows:
                    found[member.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        for key, (name, row) in enumerate(rows.items()):
            yield (
                key,
                {
                    "id": row["unified"],
                    "image": found[name],
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
    path = packages.fetch(packages.EMOJI)
    with tarfile.open(path) as archive:
        rows = json.loads(archive.extractfile(f"{_ROOT}/emoji.json").read())  # type: ignore[union-attr]
    if len(rows) != _COUNT:
        raise NaloraError(str(path), expected=f"{_COUNT} emoji", found=len(rows), remedy="delete it and run again")
    return [row for row in rows if row["has_img_twitter"]]
