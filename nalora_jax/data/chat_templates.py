"""Chat templates: reading them from a Hugging Face folder, and rendering in jinja2's sandbox.

A template is a program of somebody else. The sandbox gives it no access to Python; texts that it
repeats, joins or returns have at most 4 million characters, and a rendering takes at most 10
seconds of CPU time. Loops and calls read the clock, because an endless loop may not write any text.
Multimodal models replace a template's placeholders by image tokens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nalora_jax.errors import NaloraError

DEFAULT_FILE = "chat_template.jinja"
TOOL_FILE = "additional_chat_templates/tool_use.jinja"
PROCESSOR_FILE = (
    "chat_template.json"  # of multimodal models, as their processors saved it
)
_MAX_TEXT = 4_000_000  # characters: a million tokens
_MAX_SECONDS = 10.0  # of CPU time: long chats take milliseconds
_MAX_DIGITS = 4300  # of a power, as in Python's conversion to text
_MAX_BITS = 16_384  # of an integer: more than 4,300 digits
# A placeholder of a format such as %99999d, or %*d with the width as an argument.
_LARGE_WIDTH = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")


class EndlessTemplateError(NaloraError):
    """A chat template reached its limit of time."""


def read_templates(
    folder: Path, *settings: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Returns the default template and the template ``tool_use``; None for missing ones.

    Template files come first, then the first of ``settings`` with a ``chat_template`` (one text,
    or several by name), as in transformers.

    Args:
      folder: of the tokenizer.
      *settings: the folder's JSON files that may hold templates.

    Raises:
      NaloraError: a template's file cannot be read.
    """
    files = {
        "default": _read(folder / DEFAULT_FILE),
        "tool_use": _read(folder / TOOL_FILE),
    }
    places = [files, *(_by_name(each.get("chat_template")) for each in settings)]
    first = next((place for place in places if any(place.values())), files)
    return first.get("default"), first.get("tool_use")


def write_templates(folder: Path, default: str | None, tool: str | None) -> None:
    """Writes the default template and the template ``tool_use`` as files."""
    for name, template in ((DEFAULT_FILE, default), (TOOL_FILE, tool)):
        if template is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(template, encoding="utf-8")


def has_templates(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns True if a folder has a template in any of the places that `read_templates` reads."""
    files = (DEFAULT_FILE, TOOL_FILE, PROCESSOR_FILE)
    return "chat_template" in settings or any(
        (folder / name).is_file() for name in files
    )


def _read(path: Path) -> str | None:
    """Returns the text of a template file, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NaloraError(
            str(path),
            expected="a chat template",
            found=error,
            remedy="download the file again",
        ) from error


def _by_name(value: Any) -> dict[str, str | None]:
    """Returns templates by name from a ``chat_template``: a text (named "default"), a dict or
    a list of ``{"name", "template"}``. Values that are not texts are left out."""
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        value = {item.get("name"): item.get("template") for item in items}
    if not isinstance(value, dict):
        value = {"default": value}
    return {name: text for name, text in value.items() if isinstance(text, str)}


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Returns a chat template's text as transformers renders it.

    Raises:
      EndlessTemplateError: the template takes more than 10 seconds of CPU time.
      Exception: of any type: the template does not compile, fails, or makes a text of more than 4
        million characters.
    """
    pieces = []
    length = 0
    for piece in _compiled(source).generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > _MAX_TEXT:
            raise OverflowError(f"a text of more than {_MAX_TEXT:,} characters")
    return "".join(pieces)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """Returns a compiled template; the last 16 are kept."""
    return _environment().from_string(source)


class _GenerationTag(jinja2.ext.Extension):
    """Renders the body of ``{% generation %} ... {% endgeneration %}``, which marks an assistant's
    text."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Returns the statements up to the end tag as a separate scope."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


class _Context(Context):
    """The variables of one rendering, and the CPU time at which it must have ended."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline = time.thread_time() + _MAX_SECONDS

    def check_time(self) -> None:
        """Raises an `EndlessTemplateError` after the deadline."""
        if time.thread_time() > self._deadline:
            raise EndlessTemplateError(
                "chat template",
                expected=f"a text within {_MAX_SECONDS:g} seconds of CPU time",
                found="a template that still runs, probably without end",
                remedy="use the chat template that the model was released with, or shorter chats",
            )


class _CodeGenerator(CodeGenerator):
    """Calls the environment for ``~`` and for the iterations of loops, which jinja2 does not
    intercept."""

    def visit_For(self, node: jinja2.nodes.For, frame: Any) -> None:
        """Writes Python code for a loop over `_Environment.timed` of its values."""
        timed = jinja2.nodes.EnvironmentAttribute("timed")
        node.iter = jinja2.nodes.Call(timed, [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        """Writes Python code for ``a ~ b``: a call of `_Environment.concatenated`."""
        self.write("environment.concatenated((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with limits of the operators that make long texts of short ones."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _CodeGenerator
    context_class = _Context

    def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:
        context.check_time()
        return super().call(context, obj, *args, **options)

    @staticmethod
    @jinja2.pass_context
    def timed(context: Any, values: Iterable[Any]) -> Iterator[Any]:
        """Yields the values of a loop while its template has time."""
        for value in values:
            context.check_time()
            yield value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Returns ``left operator right``; raises OverflowError before computing a result that a
        template could make too large for memory."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                repeats = hasattr(value, "__len__") and isinstance(times, int)
                if repeats and len(value) * times > _MAX_TEXT:
                    raise OverflowError(
                        f"a repetition of more than {_MAX_TEXT:,} characters"
                    )
        if operator == "**" and isinstance(right, int):
            bits = left.bit_length() if isinstance(left, int) else 1
            if abs(right) > _MAX_DIGITS or bits * abs(right) > _MAX_BITS:
                raise OverflowError(f"a power above {_MAX_DIGITS:,}")
        formats = operator == "%" and isinstance(left, str)
        if formats and _LARGE_WIDTH.search(left):
            raise OverflowError("a width of more than 4 digits")
        return _bounded(super().call_binop(context, operator, left, right))

    def concatenated(self, values: tuple[Any, ...]) -> str:
        """Returns the result of ``~``."""
        return str(_bounded("".join(map(str, values))))


def _bounded(value: Any) -> Any:
    """Returns ``value``; raises OverflowError if it is a text, list or number that is too large."""
    if isinstance(value, str | list | tuple) and len(value) > _MAX_TEXT:
        raise OverflowError(f"a text of more than {_MAX_TEXT:,} characters")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise OverflowError(f"a number of more than {_MAX_DIGITS:,} digits")
    return value


@cache
def _environment() -> _Environment:
    """Returns the environment of chat templates, with the additions of transformers."""
    env = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """Returns JSON without HTML escapes, which jinja2's filter adds and no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, default=_plain, **options)


def _plain(value: Any) -> Any:
    """Returns one of NumPy's values, as table files have them, as a JSON value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ImageLayout(NamedTuple):
    """Numbers of tokens of an image: those of its tiles, row by row, and of the whole image after
    them."""

    whole: int
    rows: int = 0  # of tiles
    columns: int = 0
    tile: int = 0  # tokens of a tile

    @property
    def tokens(self) -> int:
        """Tokens of the image."""
        return self.rows * self.columns * self.tile + self.whole


@dataclass(frozen=True)
class ImageTokens:
    """The format in which a model writes an image into its text.

    Example (LLaVA 1.5):
      >>> ImageTokens(token="<image>", token_id=32000, count=576, placeholder="<image>")
    """

    token: str  # its name in the tokenizer
    token_id: int
    count: int  # tokens per image
    placeholder: str  # text that a chat template, or a user, writes for an image
    before: str = ""  # texts around an image's tokens
    after: str = ""

    @property
    def expansion(self) -> str:
        """Returns the text of one image."""
        return self.text_of(ImageLayout(self.count))

    def text_of(self, layout: ImageLayout) -> str:
        """Returns the text of an image with these numbers of tokens."""
        return self.before + self.token * layout.whole + self.after

    @property
    def sized(self) -> bool:
        """True if the number of tokens depends on the image's size: `SizedImageTokens`."""
        return not self.count

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """Returns the numbers of tokens of all images of a text.

        Args:
          sizes: height and width of each image.
        """
        return [ImageLayout(self.count)] * len(sizes)

    def expanded(self, text: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns a rendered chat with every placeholder replaced by the tokens of an image."""
        return self.expansion.join(text.split(self.placeholder))

    def reserved(self, text: str) -> bool:
        """Returns True if a text contains a placeholder or image token; users' text must not."""
        return self.placeholder in text or self.token in text


@dataclass(frozen=True)
class SizedImageTokens(ImageTokens):
    """`ImageTokens` of a model whose images take a number of tokens that depends on their size.

    ``count`` is 0. Parts of messages state the tokens of their image: ``{"type": "image", "layout":
    ImageLayout(64)}``.

    Example (a picture of SmolVLM with 1 by 2 tiles), on one line:
      <fake><row_1_col_1><image>...<fake><row_1_col_2><image>... line break
      line break <fake><global-img><image>...<fake>
    """

    # Its method ``layouts`` returns those of images by height and width. It is a `PatchProcessor`
    # or a `TileProcessor` of `nalora_jax.data.images`.
    processor: Any = None
    first: str = ""  # text before everything else
    # before the tokens of a tile, such as "<row_{row}_col_{column}>"; numbers start at 1
    tile: str = ""
    row_end: str = ""  # after the tiles of a row
    between: str = ""  # after all tiles

    def text_of(self, layout: ImageLayout) -> str:
        """Returns the text of an image with these numbers of tokens."""
        pieces = [self.first]
        for row in range(layout.rows):
            for column in range(layout.columns):
                pieces.append(self.tile.format(row=row + 1, column=column + 1))
                pieces.append(self.token * layout.tile)
            pieces.append(self.row_end)
        if layout.rows and layout.whole:
            pieces.append(self.between)
        pieces.append(super().text_of(layout))
        return "".join(pieces)

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[ImageLayout]:
        """Returns the numbers of tokens of all images of a text."""
        layouts: list[ImageLayout] = self.processor.layouts(sizes)
        return layouts

    def expanded(self, text: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns a rendered chat with every placeholder replaced by the tokens of its image.

        Raises:
          NaloraError: the template wrote another number of placeholders than there are images.
        """
        layouts = []
        for part in image_parts(messages):
            if "layout" in part:
                layouts.append(part["layout"])
        first, *others = text.split(self.placeholder)
        if len(others) != len(layouts):
            raise NaloraError(
                "chat template",
                expected=f"{self.placeholder!r} once for each of {len(layouts)} images",
                found=f"{len(others)} times",
                remedy="the template must write the images of every turn",
            )
        pieces = [first]
        for layout, piece in zip(layouts, others, strict=True):
            pieces += [self.text_of(layout), piece]
        return "".join(pieces)


def image_parts(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the image parts of messages, in order."""
    parts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts += [part for part in content if part.get("type") == "image"]
    return parts


def state_layouts(
    messages: Iterable[Mapping[str, Any]], layouts: Iterable[ImageLayout]
) -> None:
    """Adds its layout to each part of messages that stands for an image."""
    for part, layout in zip(image_parts(messages), layouts, strict=True):
        part["layout"] = layout


def split_contents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Converts string contents to lists of parts, as multimodal templates expect.

    Example:
      ``{"role": "user", "content": "Hi"}`` -> ``{"role": "user", "content": [{"type": "text",
      "text": "Hi"}]}``
    """
    converted = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": [{"type": "text", "text": content}]}
        converted.append(dict(message))
    return converted
