"""Sources of images: data sets of this library and of TFDS, and folders with captions or classes.

The image of a record is encoded or the path of a file, and is decoded on use. Batches of images,
classes and captions are a function of the seed and the batch's number.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.common.downloads import cache_dir
from nalora_jax.common.files import expand_user
from nalora_jax.common.registry import Registry
from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.data_files import DELIMITERS, loaded_rows, open_rows
from nalora_jax.data.images.image_files import (
    IMAGE_EXTENSIONS,
    ImageProcessor,
    TextTokenizer,
    file_below,
    open_image,
    pillow,
    stack_images,
)
from nalora_jax.data.packing import epoch_order, permutation
from nalora_jax.data.pipeline import HostBatch, Stream
from nalora_jax.data.source import (
    Record,
    RecordChange,
    Source,
    SourceView,
    require_some,
)
from nalora_jax.data.sources import FileSource
from nalora_jax.data.tfds_source import TfdsSource, open_tfds
from nalora_jax.errors import NaloraError, abbreviate

log = logging.getLogger(__name__)

# Files that list a folder's images, by precedence; metadata.* are from Hugging Face's ImageFolder.
LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "captions.csv")
_CHUNK = 4096
# threads that check images; maximum of errors in the log
_THREADS = 4
_SHOWN = 20


class ImageSource(SourceView):
    """Records with an image, and a class or a caption.

    Args:
      records: of any source; images are encoded, or the paths of files.
      fields: names of a record's image, class and caption fields.
      class_names: names of the classes by label, as the data set lists them; () if labels are
        texts.
      change: of records, as of `JoinedSource`.
    """

    def __init__(
        self,
        records: Source,
        fields: VisionConfig,
        class_names: Sequence[str] = (),
        change: RecordChange | None = None,
    ) -> None:
        super().__init__(records, change=change)
        self.fields, self.class_names = fields, tuple(class_names)

    def image(self, record: Mapping[str, Any], where: str) -> bytes | Path:
        """Returns the encoded image of a record, or its file."""
        image: bytes | Path = self._value(
            record, "image", where, "an image", bytes | Path
        )
        return image

    def opened(self, index: int, record: Mapping[str, Any]) -> Any:
        """Returns the image of the record ``index`` as an RGB ``PIL.Image.Image``."""
        where = self.where(index)
        return open_image(self.image(record, where), where, self.fields.max_pixels)

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Returns the ``indices`` whose images can be read; see `places_without_error`."""

        def check(place: int) -> None:
            index = int(indices[place])
            self.opened(index, self[index])

        places = places_without_error(
            self.name, len(indices), check, self.fields.broken
        )
        return np.asarray(indices, np.int64)[places]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Returns the captions of the records at ``indices``."""
        pairs = zip(indices, self.read(indices), strict=True)
        return [
            self._value(record, "caption", self.where(i), "a text", str)
            for i, record in pairs
        ]

    @cached_property
    def _raw_labels(self) -> list[Any]:
        labels: list[Any] = []
        for start in range(0, len(self), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(self)))
            for i, record in zip(indices, self.read(indices), strict=True):
                expected = "a class: a number or a name"
                labels.append(
                    self._value(record, "label", self.where(i), expected, int | str)
                )
        return labels

    def _value(
        self,
        record: Mapping[str, Any],
        kind: str,
        where: str,
        expected: str,
        types: Any,
    ) -> Any:
        """Returns the image, caption or label (``kind``) of a record."""
        field = getattr(self.fields, f"{kind}_field")
        value = record.get(field)
        if (
            isinstance(value, types)
            and not isinstance(value, bool)
            and str(value).strip()
        ):
            return value
        remedy = (
            f"name the field by --vision.{kind}-field (there are {', '.join(record)})"
        )
        raise NaloraError(
            f"{where}: {field}",
            expected=expected,
            found=abbreviate(value),
            remedy=remedy,
        )

    def labels(self, classes: Sequence[str]) -> np.ndarray:
        """Returns the index in ``classes`` (names, by label) of every record's class: int32
        ``[len(self)]``."""
        places = {name: i for i, name in enumerate(self.class_names or classes)}
        labels = np.empty(len(self), np.int32)
        for index, value in enumerate(self._raw_labels):
            place = value if isinstance(value, int) else places.get(value, -1)
            if not 0 <= place < len(classes):
                where = f"{self.where(index)}: {self.fields.label_field}"
                expected = f"one of {len(classes)} classes"
                found = repr(value)[:80]
                remedy = (
                    "name every class by --vision.classes, in the order of the labels"
                )
                raise NaloraError(where, expected=expected, found=found, remedy=remedy)
            labels[index] = place
        return labels

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes from the config, else the data set, else the records.

        Names that are collected from the records are sorted.

        Raises:
          NaloraError: labels are numbers without names, or names and labels differ in number.
        """
        configured = self.fields.classes
        listed = self.class_names
        if configured and listed and len(listed) != len(configured):
            expected = f"{len(listed)} names"
            raise NaloraError(
                "--vision.classes", expected=expected, found=len(configured)
            )
        if configured or listed:
            return configured or listed
        names = set(self._raw_labels)
        if not all(isinstance(name, str) for name in names):
            found = "numbers that the data set does not name"
            remedy = "name them by --vision.classes, in the order of the labels"
            raise NaloraError(
                f"{self.name}: classes", expected="names", found=found, remedy=remedy
            )
        return tuple(sorted(names))


class TfdsImages(ImageSource):
    """One split expression of a TFDS data set, with images left encoded."""

    def __init__(
        self, name: str, split: str, opener: Any, fields: VisionConfig
    ) -> None:
        import tensorflow_datasets as tfds

        field = fields.image_field
        encoded = partial(opener, decoders={field: tfds.decode.SkipDecoding()})
        # Not timed: data that another host prepared are the same.
        records = TfdsSource(name, split, encoded, encoded=field, timed=False)
        features = records.info.features
        if field not in features:
            found = f"only the fields {', '.join(features)}"
            remedy = "name it by --vision.image-field"
            raise NaloraError(
                f"{name}: {field}", expected="an image", found=found, remedy=remedy
            )
        classes: Sequence[str] = ()
        if fields.label_field in features:  # TFDS's features have no `get`
            classes = getattr(features[fields.label_field], "names", None) or ()
        super().__init__(records, fields, classes)
        require_some(self)


def _listed_images(path: Path, split: str, fields: VisionConfig) -> ImageSource:
    """Returns images of a folder, listed in a CSV or JSONL file or stored in one subfolder per
    class.

    Args:
      path: the list, or the folder (with one of `LISTS` in it, or with subfolders).
      split: "train", or a slice of it such as "train[:80%]".
      fields: see `VisionConfig`; the file name is in ``image_field`` or in file_name, image, file
        or path.
    """
    folder = path
    lists = [path / name for name in LISTS if (path / name).is_file()]
    if path.is_file():
        folder = path.parent
        lists = [path]
    if lists:
        if lists[0].suffix.lower() not in (".jsonl", ".json", ".ndjson", *DELIMITERS):
            expected = "a .csv or .jsonl file, or a folder"
            found = path.suffix or "no ending"
            raise NaloraError(str(path), expected=expected, found=found)
        listed = open_rows(lists[0])
        rows = listed.read(range(len(listed)))
    else:  # every image below the folder, with the name of its subfolder as the class
        files = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file()
        )
        names = [p.relative_to(path) for p in files if p.parent != path]
        rows = [
            {fields.image_field: str(name), fields.label_field: name.parts[0]}
            for name in names
        ]
    source = f"{path}[{split}]"
    if not rows:
        remedy = f"a folder holds one of {', '.join(LISTS)}, or a subfolder of images per class"
        raise NaloraError(
            source, expected="at least one image", found="none", remedy=remedy
        )
    root = folder.resolve()
    named = (fields.image_field, "file_name", "image", "file", "path")

    def where(index: int) -> str:
        return str(
            next((rows[index][name] for name in named if name in rows[index]), source)
        )

    def with_path(row: Record, _: str) -> Record:
        name = next(
            (row[field] for field in named if isinstance(row.get(field), str)), None
        )
        if name is None:
            return row
        return row | {fields.image_field: file_below(root, name, source)}

    records = FileSource(
        path, split, {"train": [loaded_rows(str(path), rows, where=where)]}
    )
    images = ImageSource(records, fields, change=with_path)
    images.fingerprint = f"images:{digest_of(repr(rows))}:{split}"
    return images


# Opens a split of a registered data set: (split, fields, cache) -> source.
ImageOpener = Callable[[str, VisionConfig, Path], ImageSource]
IMAGE_SETS: Registry[ImageOpener] = Registry(
    "image data set", "nalora_jax.image_sources"
)


def register_images(name: str) -> Callable[[ImageOpener], ImageOpener]:
    """Returns a decorator that makes a function ``(split, fields, cache) -> ImageSource``
    selectable."""
    return IMAGE_SETS.decorator(name)


def open_images(config: DataConfig, vision: VisionConfig, split: str) -> ImageSource:
    """Returns the images of ``split`` of ``config.dataset``.

    Args:
      config: its ``dataset`` is the name of a registered data set (`register_images`),
        ``"tfds:<name>"``, a folder, or a CSV or JSONL file.
      vision: names of the fields.
      split: a TFDS split expression; for a folder or a list also the path of another folder or
        list.

    Raises:
      NaloraError: no such data set, split, folder or field, or no records.
    """
    name = config.dataset
    if name.startswith("tfds:"):
        opener = partial(open_tfds, name.removeprefix("tfds:"), split, config.data_dir)
        return TfdsImages(name, split, opener, vision)
    if name in IMAGE_SETS:
        return IMAGE_SETS.get(name)(split, vision, cache_dir())
    path = expand_user(name)
    if Path(split).exists():
        path = Path(split)
        split = "train"
    if not path.exists():
        expected = (
            'a registered data set, "tfds:<name>", a folder of images, '
            "or a CSV or JSONL file"
        )
        registered = ", ".join(IMAGE_SETS.names()) or "none"
        remedy = f"--import FILE registers data sets; registered: {registered}"
        raise NaloraError(
            "--data.dataset", expected=expected, found=repr(name), remedy=remedy
        )
    return _listed_images(path, split, vision)


def places_without_error(
    name: str, count: int, check: Callable[[int], None], broken: str
) -> np.ndarray:
    """Returns the places of ``count`` records that pass a check; logs the others.

    Args:
      name: of the source.
      count: number of records.
      check: opens the images of the record at a place.
      broken: ``vision.broken``.

    Raises:
      NaloraError: ``check`` raises it and ``broken`` is "error", or no record passes.
    """

    def error_of(place: int) -> str:
        try:
            check(place)
        except NaloraError as error:
            if broken == "error":
                raise
            return str(error)
        return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        errors = list(pool.map(error_of, range(count)))
    bad = [text for text in errors if text]
    for text in bad[:_SHOWN]:
        log.warning("left out: %s", text)
    if len(bad) > _SHOWN:
        log.warning("left out: %d more records", len(bad) - _SHOWN)
    if len(bad) == count:
        found = next(iter(bad), "none")
        raise NaloraError(
            name, expected="at least one record with readable images", found=found
        )
    return np.flatnonzero([not text for text in errors])


def draw_shots(
    labels: np.ndarray, classes: Sequence[str], shots: int, seed: int
) -> np.ndarray:
    """Returns the ascending indices of ``shots`` records of every class; with 0, of all records.

    Draws are nested: fewer shots are a subset of more shots. A class with fewer records
    contributes all of them.

    Raises:
      NaloraError: a class has no records.
    """
    if not shots:
        return np.arange(len(labels))
    chosen: list[np.ndarray] = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if not len(members):
            raise NaloraError(
                f"class {name!r}", expected="at least one training image", found="none"
            )
        if len(members) < shots:
            text = "class %r has %d training images, fewer than --vision.shots %d"
            log.warning(text, name, len(members), shots)
        chosen.append(members[permutation(len(members), seed, label)[:shots]])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True, eq=False)
class ImageData(Stream):
    """Training records of a run as an endless stream of rows.

    A batch has ``pixels``
    (and ``shapes``, ``mask``) of `ImageProcessor`, ``labels`` int32 if there are classes, and
    ``tokens``, ``token_weights`` if there are captions; each ``[accumulate, rows, ...]``.
    """

    source: ImageSource
    indices: np.ndarray  # training records, as indices into the source
    processor: ImageProcessor
    vision: VisionConfig
    seed: int
    labels: np.ndarray | None = None  # int32, by the source's index
    tokens: dict[str, np.ndarray] | None = (
        None  # of captions, by the position in ``indices``
    )

    @property
    def rows_per_epoch(self) -> int:
        """Returns the number of rows of an epoch, in which every record appears once."""
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """Returns the identity of the stream: the same on any number of hosts and at any batch
        size."""
        v = self.vision
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return (
            f"{self.source.fingerprint}:{chosen}:{v.augment}:{v.crop_area}:{self.seed}"
        )

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        count = len(self.indices)
        steps = round(count / self.batch_size, 2)
        return {"images": count, "of": len(self.source), "steps_per_epoch": steps}

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the arrays of these rows; images are opened and augmented."""
        count = len(self.indices)
        pairs = (divmod(row, count) for row in rows)
        places = np.array(
            [epoch_order(count, self.seed, epoch)[place] for epoch, place in pairs]
        )
        indices = self.indices[places]
        records = self.source.read(indices.tolist())
        prepared = []
        for row, index, record in zip(rows, indices.tolist(), records, strict=True):
            image = self.source.opened(index, record)
            prepared.append(
                self.processor(
                    augment_image(image, self.vision, generator(self.seed, row))
                )
            )
        batch = stack_images(prepared)
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        if self.tokens is not None:
            batch |= {name: value[places] for name, value in self.tokens.items()}
        return batch


def caption_tokens(
    source: ImageSource,
    indices: np.ndarray,
    tokenizer: TextTokenizer,
    vision: VisionConfig,
) -> dict[str, np.ndarray]:
    """Returns ``tokens`` and ``token_weights`` of the captions of ``indices``, ``[records,
    seq]``."""
    limit = vision.caption_length
    if limit > tokenizer.max_length:
        expected = f"at most {tokenizer.max_length}"
        raise NaloraError("--vision.caption-length", expected=expected, found=limit)
    captions = source.captions(indices.tolist())
    tokens = tokenizer(captions)
    if limit and tokens["tokens"].shape[1] > limit and not tokenizer.fixed:
        tokens = tokenizer(captions, length=limit)
    return tokens


# ---------------------------------------------------------------- augmentation
#
# Pure functions of a random generator, thus of (seed, step).


_RATIO = (3 / 4, 4 / 3)  # aspect ratios of a crop, width over height
_TRIES = 10


def generator(*key: int) -> np.random.Generator:
    """Returns a random generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def augment_image(image: Any, vision: VisionConfig, rng: np.random.Generator) -> Any:
    """Returns ``image`` (RGB), cropped and mirrored at random as ``vision.augment`` allows.

    A crop has at least ``vision.crop_area`` of the image's area and an aspect ratio between 3/4 and
    4/3, as in torchvision's RandomResizedCrop; the processor resizes it later.
    """
    if vision.augment == "none":
        return image
    if vision.augment == "crop":
        image = image.crop(crop_box(image.width, image.height, vision.crop_area, rng))
    if rng.random() < 0.5:
        image = image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
    return image


def crop_box(
    width: int, height: int, smallest: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns the left, upper, right and lower border of a random crop."""
    for _ in range(_TRIES):
        area = rng.uniform(smallest, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
