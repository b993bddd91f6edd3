"""Tokenization and chat templates for every model that this library loads.

A `Tokenizer` wraps a ``tokenizers.Tokenizer``: it adds the ids that a decoder needs (begin, end,
padding and stop tokens) and renders chat templates as transformers does.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from nalora_jax.data.chat_templates import (
    PROCESSOR_FILE,
    EndlessTemplateError,
    ImageTokens,
    read_templates,
    render_template,
    split_contents,
)
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.config import DataConfig


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that are added to a model's tokenizer, as transformers' ``add_tokens`` does.

    Args:
      plain: parts of a text; decoding shows them.
      special: marks, for example of a chat template; decoding leaves them out.
    """

    plain: tuple[str, ...] = ()
    special: tuple[str, ...] = ()

    @staticmethod
    def of(data: DataConfig) -> AddedTokens:
        """Returns the tokens that a run's settings add."""
        return AddedTokens(data.add_tokens, data.add_special_tokens)

    @property
    def texts(self) -> tuple[str, ...]:
        """Returns all added tokens, in the order of their ids."""
        return (*self.special, *self.plain)

    def __bool__(self) -> bool:
        return bool(self.texts)


NO_TOKENS = AddedTokens()
# Fields of a message that may hold its reasoning; the first field that is present is used.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special ids and its chat template.

    Args:
      backend: splits the text; its post-processor is not used.
      bos_id: id that precedes a text, or None if the model has none.
      eos_id: id that ends a text.
      pad_id: id that fills unused positions; ``eos_id`` if the model has no padding token.
      eos_ids: every id at which generation stops.
      chat_template: jinja2 source, or None.
      tool_template: jinja2 source for chats with tools, if the model has a separate one
        (``tool_use`` in transformers).
      add_bos: True if the model was trained with ``bos_id`` at the start of each text.
      special_tokens: by the names that chat templates use, e.g. ``{"eos_token": "<|im_end|>"}``.
      rows: rows of the model's embedding, if known: a text that needs a larger id raises an error.
      images: how a multimodal model writes images into its text.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    add_bos: bool = False
    special_tokens: Mapping[str, str] | None = None
    rows: int | None = None
    images: ImageTokens | None = None
    tool_template: str | None = None

    @cached_property
    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def vocab_size(self) -> int:
        """Returns the number of rows that an embedding needs: the largest id plus one."""
        size: int = self.backend.get_vocab_size(with_added_tokens=False)
        return max([size, *(index + 1 for index in self._added_tokens)])

    @cached_property
    def turn_ends(self) -> dict[int, str]:
        """Returns the ids and texts of the tokens that can end a turn: stop ids and every special
        token."""
        ids = set(self.eos_ids)
        ids |= {index for index, token in self._added_tokens.items() if token.special}
        texts = {index: self.backend.id_to_token(index) for index in ids}
        return {index: text for index, text in texts.items() if text is not None}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the ids of ``text``; with ``special``, after the begin id if the model uses it.

        Special tokens written out in ``text`` become their ids, as in transformers.

        Raises:
          NaloraError: the text is not valid Unicode, the tokenizer fails, or an id has no row in
            the embedding.
        """
        with tokenizer_errors("text", text):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if special and self.add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        self._check_rows(ids)
        return ids

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns the ids of each text without the begin id, and their characters, computed on all
        cores.

        Raises:
          NaloraError: as of `encode`.
        """
        processor = self.backend.post_processor
        self.backend.post_processor = None  # it may leave white space out of offsets
        try:
            with tokenizer_errors("texts", *texts):
                encodings = self.backend.encode_batch(
                    list(texts), add_special_tokens=False
                )
        finally:
            self.backend.post_processor = processor
        if self.rows is not None and self.vocab_size > self.rows:
            for encoding in encodings:
                self._check_rows(encoding.ids)
        return list(encodings)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ``ids``."""
        with tokenizer_errors("token ids"):
            text: str = self.backend.decode(
                list(map(int, ids)), skip_special_tokens=skip_special
            )
        return text

    def with_tokens(self, added: AddedTokens) -> Tokenizer:
        """Returns this tokenizer with further tokens, each encoded as a single id.

        New ids follow the last existing id. Tokens that were added before stay as they are; a text
        that is in the vocabulary already keeps its id.

        Raises:
          NaloraError: the tokenizer cannot encode one of the texts as a single token.
        """
        if not added:
            return self
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        known = {token.content for token in self._added_tokens.values()}
        # normalized=False: otherwise matching would depend on how a normalizer changes the
        # surrounding text.
        options = {"normalized": False}
        with tokenizer_errors("added tokens", *added.texts):
            special = [text for text in added.special if text not in known]
            backend.add_special_tokens(
                [tokenizers.AddedToken(t, special=True, **options) for t in special]
            )
            plain = [text for text in added.plain if text not in known]
            backend.add_tokens(
                [tokenizers.AddedToken(text, **options) for text in plain]
            )
        for text in added.texts:
            ids = backend.encode(f"a{text}a", add_special_tokens=False).ids
            if backend.token_to_id(text) not in ids:
                raise NaloraError(
                    "added tokens",
                    expected="texts that are one token each",
                    found=repr(text),
                )
        return replace(self, backend=backend)

    def rows_for(self, added: AddedTokens, rows: int) -> int:
        """Returns the number of embedding rows, at least ``rows``, for the ids of ``added``.

        The tokens must already be in this tokenizer; if their ids fit, the result is ``rows``.
        """
        ids = [self.backend.token_to_id(text) for text in added.texts]
        return max([rows, *(token_id + 1 for token_id in ids if token_id is not None)])

    def for_embedding(self, rows: int, where: str) -> Tokenizer:
        """Returns this tokenizer for a model whose embedding has ``rows`` rows.

        Tokenizer files may list more tokens than the model has rows (a ``[PAD]`` that was added
        later, or the image tokens of a multimodal model of which only the text part is loaded).
        Such ids are dropped from the stop and padding ids, and a text that contains one raises an
        error.

        Raises:
          NaloraError: the end-of-sequence id itself has no row; ``where`` names the tokenizer.
        """
        if self.eos_id >= rows:
            raise NaloraError(
                where,
                expected=f"an end-of-sequence id below {rows}, the rows of the embedding",
                found=self.eos_id,
                remedy="use the tokenizer that belongs to the model",
            )
        stops = tuple(token_id for token_id in self.eos_ids if token_id < rows)
        pad_id = self.pad_id
        if pad_id >= rows:
            pad_id = self.eos_id
        return replace(self, rows=rows, eos_ids=stops, pad_id=pad_id)

    def _check_rows(self, ids: Sequence[int]) -> None:
        """Raises a NaloraError if one of ``ids`` has no row in the embedding."""
        if self.rows is None or not ids or max(ids) < self.rows:
            return
        remedy = "remove that token from the text, or use the tokenizer that belongs to the model"
        raise NaloraError(
            "text",
            expected=f"tokens below {self.rows}, the rows of the model's embedding",
            found=f"{self.backend.id_to_token(max(ids))!r}, which is token {max(ids)}",
            remedy=remedy,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Returns the text of a chat in the format that the model was tuned on.

        Args:
          messages: ``{"role": ..., "content": ...}`` dicts, in order.
          add_generation_prompt: end with the text that precedes an assistant turn.
          tools: JSON schemas of the tools that the assistant may call.

        Raises:
          NaloraError: the model has no chat template, or the template rejects the messages, makes
            a text that is too long, or takes too long.
        """
        return self.render_chats([(messages, add_generation_prompt)], tools)[0]

    def render_chats(
        self,
        chats: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Renders several (messages, add_generation_prompt) pairs.

        For a multimodal model the texts contain the tokens of every image and start with the
        begin-of-sequence token, as with transformers' processors.
        """
        template = self.chat_template
        if tools is not None:
            template = self.tool_template or template
        if template is None:
            expected = "a model with a chat template"
            actual = "none in its tokenizer"
            if self.tool_template is not None:
                actual = "only one for chats with tools"
            raise NaloraError(
                "chat template",
                expected=expected,
                found=actual,
                remedy="use an instruction-tuned model, or prompt/completion data",
            )
        common = {"tools": tools, "documents": None, **(self.special_tokens or {})}
        texts = []
        try:
            for messages, prompt in chats:
                messages = [_for_template(message) for message in messages]
                if self.images is not None:
                    messages = split_contents(messages)
                values = {
                    "messages": messages,
                    "add_generation_prompt": prompt,
                    **common,
                }
                texts.append(render_template(template, values))
        except EndlessTemplateError:
            raise
        except Exception as error:  # a template may raise any
            roles = [message.get("role") for message in chats[0][0]]
            raise NaloraError(
                "chat template",
                expected=f"messages that the model's template accepts (roles: {roles})",
                found=f"{type(error).__name__}: {error}",
                remedy="change the messages' roles or their order; a template that is no jinja2, "
                "or makes a text without end, is the model's own fault",
            ) from error
        if self.images is None:
            return texts
        begin = ""
        if self.add_bos:
            begin = (self.special_tokens or {}).get("bos_token", "")
        expanded = []
        for text, (messages, _) in zip(texts, chats, strict=True):
            body = text.removeprefix(begin)
            expanded.append(begin + self.images.expanded(body, messages))
        return expanded

    @staticmethod
    def from_folder(path: str | Path, base: Tokenizer | None = None) -> Tokenizer:
        """Returns the tokenizer in a model's or adapter's folder; ``base`` completes it.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json (stop ids) and chat templates; only the first must
        exist.

        Raises:
          NaloraError: a file is missing or damaged, or there is no end-of-sequence token.
        """
        folder = Path(path)
        backend = read_backend(folder / "tokenizer.json")
        settings = read_settings(folder)
        special = {}
        for name, value in settings.items():
            text = token_text(value)
            if text and name.endswith("_token"):
                special[name] = text
        bos_id, eos_id, pad_id = (
            backend.token_to_id(special.get(name, ""))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        listed = _listed_stop_ids(folder, backend)
        if base is not None:
            listed += base.eos_ids
        if eos_id is None and listed:
            eos_id = listed[0]
        if eos_id is None:
            place = str(folder / "tokenizer_config.json")
            raise NaloraError(
                place,
                expected="eos_token, a token of the vocabulary, or eos_token_id in config.json",
                found=repr(special.get("eos_token")),
                remedy="set eos_token to the token that ends a text",
            )
        processor = read_json(folder / PROCESSOR_FILE, missing={})
        template, tool_template = read_templates(folder, settings, processor)
        if template is None and tool_template is None and base is not None:
            template = base.chat_template
            tool_template = base.tool_template
        adds_bos = settings.get("add_bos_token")
        if not isinstance(adds_bos, bool):  # then the post-processor decides
            adds_bos = backend.encode("a").ids[:1] == [bos_id]
        return Tokenizer(
            backend=backend,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            eos_ids=tuple(dict.fromkeys([eos_id, *listed])),
            chat_template=template,
            tool_template=tool_template,
            add_bos=adds_bos and bos_id is not None,
            special_tokens=special,
            images=None if base is None else base.images,
        )


def _for_template(message: Any) -> Any:
    """Returns a message as transformers passes it to a template.

    Null fields are dropped, and reasoning is present under both ``thinking`` and
    ``reasoning_content``.
    """
    if not isinstance(message, Mapping):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the JSON object in ``path``; if there is no file, a copy of ``missing``, if given.

    Raises:
      NaloraError: the file does not exist, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing is not None:
            return dict(missing)
        raise NaloraError(
            str(path), expected="the file", found="nothing of that name"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: bad JSON or bad UTF-8
        raise NaloraError(
            str(path),
            expected="a JSON file",
            found=error,
            remedy="download the file again",
        ) from error
    if not isinstance(value, dict):
        raise NaloraError(
            str(path), expected="a JSON object", found=type(value).__name__
        )
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a folder's tokenizer, with its special tokens; {} without files."""
    settings = read_json(folder / "special_tokens_map.json", missing={})
    return settings | read_json(folder / "tokenizer_config.json", missing={})


def token_text(value: object) -> str:
    """Returns a special token's text from a config: ``"</s>"`` or ``{"content": "</s>", ...}``."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and is_unicode(value):
        return value
    return ""


def _listed_stop_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """Returns the stop ids in generation_config.json and config.json (or its ``text_config``)."""
    config = read_json(folder / "config.json", missing={})
    files = [
        read_json(folder / "generation_config.json", missing={}),
        config,
        config.get("text_config"),
    ]
    values = [file.get("eos_token_id") for file in files if isinstance(file, dict)]
    items: list[Any] = []
    for value in values:
        if isinstance(value, list):
            items += value
        else:
            items.append(value)
    numbers = [item for item in items if type(item) is int and 0 <= item < 2**31]
    return [number for number in numbers if backend.id_to_token(number) is not None]


# A tokenizer.json is a program: a list of replacements, each of which may double the text, and
# which the tokenizers library runs without a limit. LONGEST is the largest growth of a text that is
# accepted: ALBERT's rules in sequence reach about 970.
LONGEST = 1024.0
_TOKENS = 4096  # most tokens that a post-processor adds to a text
# Growth by a normalizer. A space becomes three bytes, a ligature eighteen letters.
_UNICODE = {
    "NFKC": 18.0,
    "NFKD": 18.0,
    "NFC": 3.0,
    "NFD": 4.0,
    "Lowercase": 3.0,
    "ByteLevel": 2.0,
}
_MAX_BYTES = 256 << 20  # Gemma's, among the largest, has 33 MB


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads a ``tokenizer.json`` and turns truncation and padding off.

    Raises:
      NaloraError: the file is missing, larger than any tokenizer's, or damaged.
    """
    if not path.is_file():
        raise NaloraError(
            str(path),
            expected="the file",
            found="nothing of that name",
            remedy="save it with transformers: "
            "AutoTokenizer.from_pretrained(model).save_pretrained(folder)",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise NaloraError(
            str(path),
            expected=f"a tokenizer of up to {_MAX_BYTES >> 20} MB",
            found=f"{path.stat().st_size >> 20} MB",
        )
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except BaseException as error:  # Exceptions, and panics of the binding
        if not is_foreign(error):
            raise
        raise NaloraError(
            str(path),
            expected="a tokenizer",
            found=error,
            remedy="download the file again",
        ) from error
    _check_growth(backend, str(path))
    backend.no_truncation()  # stored by the program that saved the file last; not part of the model
    backend.no_padding()
    return backend


def is_foreign(error: BaseException) -> bool:
    """Returns True if ``error`` was raised by a library: any error except an interrupt.

    A panic in Rust is a ``PanicException``, which is not an `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def tokenizer_errors(what: str, *texts: str) -> Iterator[None]:
    """Converts errors of the tokenizers library to a `NaloraError` that names the text."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        for text in texts:
            require_unicode(text, what)
        raise NaloraError(
            what, expected="what the model's tokenizer can take", found=error
        ) from error


def require_unicode(text: str, where: str) -> None:
    """Refuses a text that contains half of a surrogate pair.

    Raises:
      NaloraError: about ``where``.
    """
    if not is_unicode(text):
        raise NaloraError(
            where,
            expected="Unicode text",
            found=f"half a character in {text[:60]!r}",
            remedy="rewrite the text: half of a surrogate pair is not a character",
        )


def is_unicode(text: str) -> bool:
    """Returns True if ``text`` can be encoded: JSON may contain half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_growth(backend: tokenizers.Tokenizer, where: str) -> None:
    """Refuses a tokenizer whose rules can lengthen a text without reasonable bound.

    Raises:
      NaloraError: normalizer or decoder can make a text more than 1,024 times as long, or the
        post-processor adds more than 4,096 tokens to each text.
    """
    parts = {
        name: getattr(backend, name)
        for name in ("normalizer", "decoder", "post_processor")
    }
    # As the library writes them to a file.
    rules = {
        name: json.loads(part.__getstate__())
        for name, part in parts.items()
        if part is not None
    }
    added = _added(rules.pop("post_processor", {}))
    if added > _TOKENS:
        raise NaloraError(
            f"{where}: post_processor",
            expected=f"at most {_TOKENS} tokens added to a text",
            found=f"{added}",
        )
    for name, rule in rules.items():
        growth = _growth(rule)
        if growth > LONGEST:
            raise NaloraError(
                f"{where}: {name}",
                expected=f"rules that make a text at most {LONGEST:.0f} times as long",
                found=f"rules that can make it {growth:.3g} times as long",
                remedy="use the tokenizer that the model's authors published",
            )


def _growth(rule: dict[str, Any]) -> float:
    """Returns the largest ratio of bytes after ``rule`` to bytes before it."""
    kind = rule.get("type", "")
    if kind == "Sequence":
        members = rule.get("normalizers") or rule.get("decoders", ())
        return math.prod(map(_growth, members))
    if kind == "Replace":
        size = len(rule["content"].encode())
        text = rule["pattern"].get("String")
        if text:
            return max(1.0, size / len(text.encode()))
        # A regular expression may match the empty text between any two bytes.
        return 1.0 + size
    if kind == "Precompiled":
        # SentencePiece's table: the size of a trie, the trie, and replacements that each end with a
        # zero.
        table = base64.b64decode(rule["precompiled_charsmap"])
        trie_size = int.from_bytes(table[:4], "little")
        replacements = table[4 + trie_size :].split(b"\0")
        return float(max(1, *map(len, replacements)))
    return _UNICODE.get(kind, 1.0)


def _added(rule: dict[str, Any]) -> int:
    """Returns the number of tokens that a post-processor, and the processors in it, add to a
    text."""
    total = sum(map(_added, rule.get("processors", ())))
    for piece in rule.get("single", ()):
        if "SpecialToken" in piece:
            name = piece["SpecialToken"]["id"]
            total += len(rule["special_tokens"][name]["ids"])
    return total
