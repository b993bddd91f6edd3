"""Conversations about images, converted to messages whose contents are texts and images in order.

OpenAI's form, an image by its file's path or a ``data:`` URL, and the form of transformers' chat
templates::

    {"messages": [
      {"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "cat.png"}},
        {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A cat."}]}

LLaVA's form, and records without messages, whose image comes before their prompt::

    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                           {"from": "gpt", "value": "A cat."}]}
    {"image": "cat.png", "prompt": "What is this?", "completion": " A cat."}

Also the images of packed sequences: their records, image slots per sequence, and pixels.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.common.files import expand_user
from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.chat_templates import ImageLayout, ImageTokens, state_layouts
from nalora_jax.data.chat_text import make_turns, text_field
from nalora_jax.data.forms import IMAGES, Parts, canonical, spoken
from nalora_jax.data.images.image_files import (
    MAX_PIXELS,
    ImageProcessor,
    file_below,
    image_size,
    open_image,
)
from nalora_jax.data.images.opened import IMAGE_SETS, open_images, places_without_error
from nalora_jax.data.images.patches import PatchProcessor
from nalora_jax.data.images.tiles import TileProcessor
from nalora_jax.data.packing import Pattern
from nalora_jax.data.source import Record, Source, SourceView, components
from nalora_jax.data.sources import open_source
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.pipeline import TrainData
    from nalora_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_PLACEHOLDER = "<image>"  # in LLaVA's texts, for every model

Image = bytes | Path
AnyProcessor = ImageProcessor | PatchProcessor | TileProcessor


class ChatImages(SourceView):
    """Records of another source as messages (or prompt and completion), with images in `IMAGES`.

    Args:
      source: source of the records.
      data: names of the fields, and the setting that turns prompts into chats.
      vision: names of the image and caption fields, and the prompt for captions.
      tokens: the model's image tokens.
      folder: folder of the image files, absolute and without links; files outside it are refused.
        None: images are in the records.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        vision: VisionConfig,
        tokens: ImageTokens,
        folder: Path | None,
    ) -> None:
        super().__init__(source, change=self._converted)
        fields = f":{vision.image_field}:{vision.caption_field}:{vision.prompt}"
        self.fingerprint = f"images:{source.fingerprint}{fields}"
        self._data = data
        self._vision = vision
        self._tokens = tokens
        self._folder = folder

    def readable(self) -> SourceView:
        """Returns the records whose images can be read; the log names the others.

        Raises:
          NaloraError: an image cannot be read and ``vision.broken`` is "error", or none can.
        """

        limit = decoding_limit(self._tokens, self._vision)

        def check(index: int) -> None:
            for image in self[index][IMAGES]:
                rgb_image(image, self.where(index), limit)

        places = places_without_error(self.name, len(self), check, self._vision.broken)
        if len(places) == len(self):
            return self
        return SourceView(self, places)

    def _converted(self, record: Record, where: str) -> Record:
        """Returns a record as messages with images, or as a prompt that contains their tokens."""
        data = self._data
        vision = self._vision
        fields = (
            name
            for name in (vision.image_field, "images")
            if record.get(name) is not None
        )
        given = record.get(next(fields, ""), [])
        if not isinstance(given, list):
            given = [given]
        images = tuple(
            self._opened(image, f"{where}: {vision.image_field}") for image in given
        )
        row = canonical(record, data, where)
        if data.messages_field in row:
            messages, images = self._messages(row[data.messages_field], images, where)
            return type(row)({**row, data.messages_field: messages, IMAGES: images})
        if data.prompt_field in row:
            prompt = text_field(row, data.prompt_field, where)
            answer = text_field(
                row, data.completion_field, where, "--data.completion-field"
            )
        else:
            prompt = vision.prompt
            answer = text_field(
                row, vision.caption_field, where, "--vision.caption-field"
            )
        if _PLACEHOLDER not in prompt:
            prompt = f"{_PLACEHOLDER}\n" * len(images) + prompt
        if data.chat:
            messages, images = self._messages(make_turns(prompt, answer), images, where)
            return {data.messages_field: messages, IMAGES: images}
        if prompt.count(_PLACEHOLDER) != len(images):
            expected = f"{_PLACEHOLDER} once for each of {len(images)} images"
            raise NaloraError(
                f"{where}: {data.prompt_field}",
                expected=expected,
                found=repr(prompt)[:80],
            )
        layouts = self._layouts(images, where)
        first, *texts = [self._text(text, where) for text in prompt.split(_PLACEHOLDER)]
        answer = self._text(answer, where)
        if not answer[:1].isspace():
            answer = f" {answer}"
        pieces = [first]
        for layout, text in zip(layouts, texts, strict=True):
            pieces += [self._tokens.text_of(layout), text]
        prompt = "".join(pieces)
        return {
            data.prompt_field: prompt,
            data.completion_field: answer,
            IMAGES: images,
        }

    def _text(self, text: str, where: str) -> str:
        """Returns a text of the user, which must not contain image tokens."""
        if self._tokens.reserved(text):
            expected = (
                f"no {self._tokens.token} or {self._tokens.placeholder} in a text"
            )
            raise NaloraError(where, expected=expected, found=text[:80])
        return text

    def _messages(
        self, messages: Any, images_given: tuple[Image, ...], where: str
    ) -> tuple[list[dict[str, Any]], tuple[Image, ...]]:
        """Returns messages with `Parts` as contents, and the assistant's contents as texts.

        The images in ``images_given`` fill placeholders.
        """
        if not isinstance(messages, list) or not messages:
            found = repr(messages)[:80]
            raise NaloraError(
                f"{where}: messages", expected="a list of messages", found=found
            )
        left = list(images_given)
        images = []
        turns = []
        for number, message in enumerate(messages):
            here = f"{where}: messages[{number}]"
            message = spoken(message, here)
            answers = message.get("role") == "assistant"
            parts = []
            for block in self._parts(message, here):
                if isinstance(block, str):
                    parts.append({"type": "text", "text": self._text(block, here)})
                    continue
                if answers:
                    raise NaloraError(
                        here, expected="texts from the assistant", found="an image"
                    )
                if block is None and not left:
                    expected = f"an image for every {_PLACEHOLDER}"
                    raise NaloraError(here, expected=expected, found="fewer images")
                if block is None:
                    block = left.pop(0)
                images.append(block)
                parts.append({"type": "image"})
            content: str | Parts = Parts(parts)
            if answers:
                content = "".join(part["text"] for part in parts)
            turns.append({**message, "content": content})
        if left:
            actual = f"{len(left)} images more than places"
            raise NaloraError(
                where,
                expected=f"{_PLACEHOLDER} in the text for every image",
                found=actual,
            )
        if self._tokens.sized:
            state_layouts(turns, self._layouts(images, where))
        return turns, tuple(images)

    def _layouts(self, images: Sequence[Image], where: str) -> list[ImageLayout]:
        """Returns the numbers of tokens of all images of a record."""
        sizes = []
        for image in images:
            # Only of images whose size matters is the header read.
            size = (0, 0)
            if self._tokens.sized:
                named = where
                if not isinstance(image, bytes):
                    named = f"{where}: {image}"
                size = image_size(image, named)
            sizes.append(size)
        return self._tokens.layouts(sizes)

    def _parts(
        self, message: Mapping[str, Any], here: str
    ) -> Iterator[str | Image | None]:
        """Yields a message's texts and images; None is an image in another field of the record."""
        content = message.get("content")
        if not isinstance(content, list):
            yield from _split(text_field(dict(message), "content", here))
            return
        for block in content:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text":
                if text := text_field(block, "text", here):
                    yield text
            elif kind in ("image", "image_url"):
                names: tuple[str, ...] = ("image_url",)
                if kind == "image":
                    names = ("image", "path", "url")
                value = next(
                    (block[name] for name in names if block.get(name) is not None), None
                )
                if kind == "image_url" and isinstance(value, dict):
                    value = value.get("url")
                # A part without its image stands for one in the record's field, but not a URL.
                if value is None and kind == "image":
                    yield None
                else:
                    yield self._opened(value, here)
            else:
                expected = 'parts of the type "text", "image" or "image_url"'
                raise NaloraError(
                    f"{here}: content", expected=expected, found=repr(block)[:80]
                )

    def _opened(self, value: Any, where: str) -> Image:
        """Returns an image's bytes, or the path of its file."""
        if isinstance(value, bytes | Path):
            return value
        if not isinstance(value, str) or not value:
            raise NaloraError(where, expected="an image's path", found=repr(value)[:80])
        if value.startswith("data:"):
            return _from_url(value, where)
        location = value.removeprefix("file://")
        if "://" in value and location == value:
            expected = "an image's path or a data: URL"
            remedy = "download it, and name the file"
            raise NaloraError(where, expected=expected, found=value[:80], remedy=remedy)
        if self._folder is None:
            actual = f"the path {value[:80]}, of a data set without a folder"
            raise NaloraError(where, expected="an image", found=actual)
        return file_below(self._folder, location, where)


def open_chats(
    config: DataConfig, vision: VisionConfig, split: str, tokens: ImageTokens
) -> ChatImages:
    """Returns conversations about images: ``split`` of ``config.dataset``.

    Args:
      config: its ``dataset`` is a data set of `nalora_jax.data.sources.open_source` with records of
        any form in this module's docstring, or one of `open_images`, whose captions answer
        ``vision.prompt``.
      vision: names of fields.
      split: as for `open_source`.
      tokens: the model's image tokens.

    Raises:
      NaloraError: no such data set, split or field, or no records.
    """
    name = config.dataset
    if len(components(name)) > 1:
        raise NaloraError(
            "--data.dataset",
            expected='one data set with --vision.task "chat"',
            found=name,
        )
    path = expand_user(split if Path(split).suffix and Path(split).exists() else name)
    lists = path.is_file() and path.suffix in (".csv", ".tsv")
    if name in IMAGE_SETS or name.startswith("tfds:") or path.is_dir() or lists:
        return ChatImages(
            open_images(config, vision, split), config, vision, tokens, None
        )
    folder = Path.cwd()
    if path.is_file():
        folder = path.parent
    return ChatImages(
        open_source(config, split), config, vision, tokens, folder.resolve()
    )


def decoding_limit(tokens: ImageTokens, vision: VisionConfig) -> int:
    """Returns the largest number of pixels of a picture that is decoded.

    A model whose images have any shape resizes larger pictures than ``vision.max_pixels``.
    """
    if tokens.sized:
        return max(MAX_PIXELS, vision.max_pixels)
    return vision.max_pixels


def rgb_image(image: Image, where: str, max_pixels: int) -> Any:
    """Returns an image as an RGB ``PIL.Image.Image``; ``where`` names its record in messages."""
    if not isinstance(image, bytes):
        where = f"{where}: {image}"
    return open_image(image, where, max_pixels)


def question_tokens(
    prompt: str, sizes: Sequence[tuple[int, int]], tokenizer: Tokenizer, *, chat: bool
) -> list[int]:
    """Returns the token ids of a prompt with images before it.

    Args:
      prompt: the text.
      sizes: height and width of each image.
      tokenizer: of the model.
      chat: True if the model's chat template writes the prompt.

    Raises:
      NaloraError: the model has no image input, or the prompt contains image tokens.
    """
    tokens = tokenizer.images
    if tokens is None:
        raise NaloraError(
            "--image", expected="a vision-language model", found="a language model"
        )
    if tokens.reserved(prompt):
        expected = f"no {tokens.token} in it: images come first"
        raise NaloraError("--prompt", expected=expected, found=repr(prompt)[:80])
    layouts = tokens.layouts(sizes)
    if not chat:
        images = "".join(f"{tokens.text_of(layout)}\n" for layout in layouts)
        return tokenizer.encode(images + prompt)
    images_first = [{"type": "image"} for _ in sizes]
    parts = Parts([*images_first, {"type": "text", "text": prompt}])
    messages = [{"role": "user", "content": parts}]
    if tokens.sized:
        state_layouts(messages, layouts)
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    # the template writes the begin-of-sequence token
    return tokenizer.encode(text, special=False)


def _split(text: str) -> Iterator[str | None]:
    """Yields the texts between image placeholders, and None for every placeholder.

    Example: ``"<image>\\nWhat?"`` -> None, ``"What?"``. A line break next to a placeholder is
    removed with it, because templates write the line breaks around images.
    """
    pieces = text.split(_PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            yield None
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            yield piece


def _from_url(value: str, where: str) -> bytes:
    head, comma, body = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        found = f"{head[:40]}: {error}"
        raise NaloraError(
            where, expected="data:image/...;base64,...", found=found
        ) from error


@dataclass(frozen=True, eq=False)
class RowImages:
    """Images of batches of packed sequences.

    A batch has uint8 ``pixels`` and int32 ``images``, the number of images in each row. The images
    of a row are in the order of its image tokens; slots after the first ``images`` are black and
    unused.
    """

    source: Source  # with images in its records (`nalora_jax.data.images.image_chat`)
    records: np.ndarray  # int64 [examples], indices into the source
    processor: AnyProcessor
    max_pixels: int
    places: tuple[int, ...]  # of the processor's arrays

    def batch(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the images of rows, each of which is an array of examples."""
        prepared: list[list[Any]] = []  # of each row
        for examples in rows:
            images: list[Any] = []
            for example in examples.tolist():
                record = int(self.records[example])
                of_record: list[Any] = []
                for encoded in self.source.read([record])[0][IMAGES]:
                    image = rgb_image(
                        encoded, self.source.where(record), self.max_pixels
                    )
                    of_record.append(self.processor.prepare(image))
                images += self.processor.together(of_record)
            prepared.append(images)
        processor: Any = self.processor
        arrays: dict[str, np.ndarray] = processor.arrays(prepared, self.places)
        return arrays


def row_images(
    source: Source,
    data: TrainData,
    tokens: ImageTokens,
    processor: AnyProcessor,
    max_pixels: int,
) -> RowImages:
    """Returns the images of the rows of ``data``, whose tokens are those of ``source``."""
    store = data.store
    lengths = store.lengths()
    of_image = (store.tokens == tokens.token_id).astype(np.int64)
    # of each example
    image_tokens = np.add.reduceat(of_image, store.offsets[:-1])
    if isinstance(processor, ImageProcessor):
        images, _ = most_of_rows(data.pattern, lengths, image_tokens // tokens.count)
        return RowImages(source, store.records, processor, max_pixels, (images,))
    if type(processor) is not PatchProcessor:
        places = _places_of_headers(source, data, processor)
        return RowImages(source, store.records, processor, max_pixels, places)
    # Every image is a run of tokens, since texts stand around it.
    begins = of_image.copy()
    begins[1:] &= 1 - of_image[:-1]
    runs = np.add.reduceat(begins, store.offsets[:-1])
    images, _ = most_of_rows(data.pattern, lengths, runs)
    most, fill = most_of_rows(data.pattern, lengths, image_tokens)
    log.info("places for %d image tokens a row, %.0f%% filled", most, 100 * fill)
    places = (images, most * processor.merge**2)
    return RowImages(source, store.records, processor, max_pixels, places)


def _places_of_headers(
    source: Source, data: TrainData, processor: PatchProcessor | TileProcessor
) -> tuple[int, ...]:
    """Returns the places that the images of the fullest row need, from their headers."""
    by_record: dict[int, tuple[int, ...]] = {}
    for record in data.store.records.tolist():
        sizes = []
        for image in source.read([record])[0][IMAGES]:
            sizes.append(image_size(image, source.where(record)))
        by_record[record] = processor.places_of(processor.layouts(sizes))
    needed = np.array([by_record[record] for record in data.store.records.tolist()])
    places: list[int] = []
    lengths = data.store.lengths()
    for numbers in needed.T:
        most, fill = most_of_rows(data.pattern, lengths, numbers)
        noun = processor.nouns[len(places)]
        places.append(most)
        log.info("places for %d %s a row, %.0f%% filled", most, noun, 100 * fill)
    return tuple(places)


def most_of_rows(
    pattern: Pattern, lengths: np.ndarray, numbers: np.ndarray
) -> tuple[int, float]:
    """Returns the maximum sum of examples' ``numbers`` in a row over all epochs, at least 1, and
    the mean's share of it.

    The slots of a row have fixed lengths; every epoch draws another example of that length for each
    slot.
    """
    most = np.zeros(int(lengths.max()) + 1, np.int64)
    np.maximum.at(most, lengths, numbers)
    of_rows = np.add.reduceat(most[pattern.lengths], pattern.starts[:-1])
    maximum = max(1, int(of_rows.max()))
    return maximum, float(numbers.sum() / (pattern.rows * maximum))
