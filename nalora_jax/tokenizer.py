"""Text to token ids and back, and chat messages to text, for every model that this library loads.

A `Tokenizer` is a thin shell around a ``tokenizers.Tokenizer``: it adds what a decoder needs to know (which ids begin,
end and pad a sequence, where generation stops) and renders chat templates as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from nalora_jax import bounded
from nalora_jax.bounded.expressions import check_expressions
from nalora_jax.bounded.growth import check_growth
from nalora_jax.chat_templates import PROCESSOR_FILE, read_templates
from nalora_jax.errors import NaloraError
from nalora_jax.image_tokens import ImageTokens, as_parts

if TYPE_CHECKING:
    from nalora_jax.config import DataConfig


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that are added to a model's tokenizer, as transformers' ``add_tokens`` does.

    Args:
      plain: parts of a text; decoding shows them.
      special: marks such as those of a chat template; decoding leaves them out.
    """

    plain: tuple[str, ...] = ()
    special: tuple[str, ...] = ()

    @staticmethod
    def of(data: DataConfig) -> AddedTokens:
        """Those of a run's settings."""
        return AddedTokens(data.add_tokens, data.add_special_tokens)

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them, in the order of their ids."""
        return (*self.special, *self.plain)

    def __bool__(self) -> bool:
        return bool(self.texts)


NO_TOKENS = AddedTokens()
# Fields of a message that hold its reasoning; the first one that it has counts.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special ids and its chat template.

    Args:
      backend: does the splitting; its own post-processor is not used.
      bos_id: id put in front of a text, or None where the model knows none.
      eos_id: id that ends a text.
      pad_id: id that fills unused positions; ``eos_id`` where the model has none of its own.
      eos_ids: every id at which generation stops.
      chat_template: jinja2 source, or None.
      tool_template: jinja2 source for chats with tools, if the model has one apart (``tool_use`` in transformers).
      add_bos: whether the model was trained with ``bos_id`` in front.
      special_tokens: by the names that chat templates use, e.g. ``{"eos_token": "<|im_end|>"}``.
      rows: rows of the model's embedding, where that is known: a text that needs an id beyond them is refused.
      images: how a model that sees writes images into its text.
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
    def vocab_size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        added = self.backend.get_added_tokens_decoder()
        return max(self.backend.get_vocab_size(with_added_tokens=False), *(token_id + 1 for token_id in added), 0)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special``, the begin-of-sequence id in front where the model wants it.

        Special tokens written out in ``text`` become their ids, as in transformers.

        Raises:
          NaloraError: the text is no Unicode text, the tokenizer fails at it, or an id has no row in the embedding.
        """
        with _complaints("text", text):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        ids = [self.bos_id, *ids] if special and self.add_bos and self.bos_id is not None else ids
        self._check_rows(ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode(text, special=False)`` of each text, on all cores."""
        with _complaints("texts", *texts):
            found = [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for ids in found:
            self._check_rows(ids)
        return found

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``."""
        with _complaints("token ids"):
            text: str = self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)
        return text

    def with_tokens(self, added: AddedTokens) -> Tokenizer:
        """This tokenizer with further tokens, each of which is one id wherever it stands in a text.

        Ids follow the last one. What is an added token already stays as it is; a text that the vocabulary holds keeps
        its id.

        Raises:
          NaloraError: the tokenizer cannot hold one of them apart.
        """
        if not added:
            return self
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        own = {token.content for token in backend.get_added_tokens_decoder().values()}
        with _complaints("added tokens", *added.texts):
            for texts, add in ((added.special, backend.add_special_tokens), (added.plain, backend.add_tokens)):
                # Not normalized: otherwise what a normalizer makes of the text around them decides whether they match.
                special = texts is added.special
                add([tokenizers.AddedToken(t, special=special, normalized=False) for t in texts if t not in own])
        for text in added.texts:
            ids = backend.encode(f"a{text}a", add_special_tokens=False).ids
            if backend.token_to_id(text) not in ids:
                raise NaloraError("added tokens", expected="texts that are one token each", found=repr(text))
        return replace(self, backend=backend)

    def rows_for(self, added: AddedTokens, rows: int) -> int:
        """Rows of an embedding of ``rows`` once ``added``, which this tokenizer has, are in it: as many if they fit."""
        ids = [self.backend.token_to_id(text) for text in added.texts]
        return max([rows, *(token_id + 1 for token_id in ids if token_id is not None)])

    def for_embedding(self, rows: int, where: str) -> Tokenizer:
        """This tokenizer beside an embedding of ``rows`` rows.

        Files may list more tokens than the model has rows (a ``[PAD]`` that somebody added, the image tokens of a
        model whose text part this is): they are refused where a text really needs one, and are no stop or padding ids.

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
        pad_id = self.pad_id if self.pad_id < rows else self.eos_id
        return replace(self, rows=rows, eos_ids=stops, pad_id=pad_id)

    def _check_rows(self, ids: Sequence[int]) -> None:
        if self.rows is None or self.vocab_size <= self.rows or not ids or max(ids) < self.rows:
            return
        raise NaloraError(
            "text",
            expected=f"tokens below {self.rows}, the rows of the model's embedding",
            found=f"{self.backend.id_to_token(max(ids))!r}, which is token {max(ids)}",
            remedy="remove that token from the text, or use the tokenizer that belongs to the model",
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """``messages`` as the one text that the model was tuned on.

        Args:
          messages: ``{"role": ..., "content": ...}`` dicts, in order.
          add_generation_prompt: end with what precedes an assistant's answer.
          tools: JSON schemas of the tools that the assistant may call.

        Raises:
          NaloraError: the model has no chat template, or the template refuses the messages, or exceeds a limit of time
            or memory.
        """
        return self.render_chats([(messages, add_generation_prompt)], tools)[0]

    def render_chats(
        self,
        chats: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """`render_chat` of several (messages, add_generation_prompt), for little more than the cost of one.

        Of a model that sees the texts hold the tokens of every image, and begin with the begin-of-sequence token, as
        transformers' processors have it.
        """
        template = self.chat_template if tools is None or self.tool_template is None else self.tool_template
        if template is None:
            raise NaloraError(
                "chat template",
                expected="a model with a chat template",
                found="none in its tokenizer" if self.tool_template is None else "only one for chats with tools",
                remedy="use an instruction-tuned model, or prompt/completion data",
            )
        common = {"tools": tools, "documents": None, **(self.special_tokens or {})}
        chats = [([_for_template(message) for message in messages], prompt) for messages, prompt in chats]
        if self.images is not None:
            chats = [(as_parts(messages), prompt) for messages, prompt in chats]
        variables = [{"messages": messages, "add_generation_prompt": prompt, **common} for messages, prompt in chats]
        try:
            texts = bounded.render(template, variables)
        except bounded.BoundedError as error:
            raise NaloraError(
                "chat template",
                expected=f"messages that the model's template accepts (roles: {[m.get('role') for m in chats[0][0]]})",
                found=error,
                remedy="change the messages' roles or their order; a template that is no jinja2, or goes beyond the "
                "limits of time and memory, is the model's own fault",
            ) from error
        return texts if self.images is None else [self._with_images(text) for text in texts]

    def _with_images(self, text: str) -> str:
        assert self.images is not None
        begin = (self.special_tokens or {}).get("bos_token", "") if self.add_bos else ""
        return ("" if text.startswith(begin) else begin) + self.images.expanded(text)

    @staticmethod
    def from_folder(path: str | Path, base: Tokenizer | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, or of an adapter's: what that lacks is as in ``base``.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json
        (stop ids) and chat templates; only the first must exist.

        Raises:
          NaloraError: a file is missing or damaged, or there is no end-of-sequence token.
        """
        folder = Path(path)
        backend = read_backend(folder / "tokenizer.json")
        settings = read_json(folder / "special_tokens_map.json", missing={})
        settings |= read_json(folder / "tokenizer_config.json", missing={})
        named = {name: _token_text(value) for name, value in settings.items() if name.endswith("_token")}
        special = {name: text for name, text in named.items() if text}
        bos_id, eos_id, pad_id = (backend.token_to_id(special.get(f"{n}_token", "")) for n in ("bos", "eos", "pad"))
        listed = _listed_stop_ids(folder, backend)
        listed += [] if base is None else base.eos_ids
        if eos_id is None and listed:
            eos_id = listed[0]
        if eos_id is None:
            raise NaloraError(
                str(folder / "tokenizer_config.json"),
                expected="eos_token, a token of the vocabulary, or eos_token_id in config.json",
                found=repr(special.get("eos_token")),
                remedy="set eos_token to the token that ends a text",
            )
        template, tool_template = read_templates(folder, settings, read_json(folder / PROCESSOR_FILE, missing={}))
        if template is None and tool_template is None and base is not None:
            template, tool_template = base.chat_template, base.tool_template
        return Tokenizer(
            backend=backend,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            eos_ids=tuple(dict.fromkeys([eos_id, *listed])),
            chat_template=template,
            tool_template=tool_template,
            add_bos=_adds_bos(backend, bos_id, settings.get("add_bos_token")),
            special_tokens=special,
            images=None if base is None else base.images,
        )


def _for_template(message: Any) -> Any:
    """Returns a message as transformers hands it to a template: without nulls, its reasoning under every usual name."""
    if not isinstance(message, Mapping):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in ``path``, or a copy of ``missing`` where the file does not exist and that is given.

    Raises:
      NaloraError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing is not None:
            return dict(missing)
        raise NaloraError(str(path), expected="the file", found="nothing of that name") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise NaloraError(str(path), expected="a JSON file", found=error, remedy="download the file again") from error
    if not isinstance(value, dict):
        raise NaloraError(str(path), expected="a JSON object", found=type(value).__name__)
    return value


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """A ``tokenizer.json`` without truncation and padding; a `NaloraError` where it is missing or damaged."""
    if not path.is_file():
        raise NaloraError(
            str(path),
            expected="the file",
            found="nothing of that name",
            remedy="save it with transformers: AutoTokenizer.from_pretrained(model).save_pretrained(folder)",
        )
    try:
        content = path.read_bytes()
        raw = json.loads(content)
        check_growth(raw, str(path))
        check_expressions(raw, str(path))
        backend = tokenizers.Tokenizer.from_buffer(content)
    except NaloraError:
        raise
    except BaseException as error:  # the binding raises plain Exceptions, and panics, which are none
        if is_foreign(error):
            raise NaloraError(
                str(path), expected="a tokenizer", found=error, remedy="download the file again"
            ) from error
        raise
    backend.no_truncation()  # settings of whoever saved it last, not of the model
    backend.no_padding()
    return backend


def is_foreign(error: BaseException) -> bool:
    """Whether ``error`` came out of a library: everything but an interrupt; a panic in Rust is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _complaints(what: str, *texts: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into an error that names the text."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        broken = next((text for text in texts if not is_unicode(text)), None)
        raise NaloraError(
            what,
            expected="Unicode text" if broken is not None else "what the model's tokenizer can take",
            found=f"half a character in {broken[:80]!r}" if broken is not None else error,
            remedy="write the text anew: half of a surrogate pair is no character" if broken is not None else "",
        ) from error


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be encoded: JSON may hold one half of a character that takes two."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _token_text(value: object) -> str:
    """The text of a special token as configs write it: ``"</s>"`` or ``{"content": "</s>", ...}``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and is_unicode(content) else ""


def _listed_stop_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """The stop ids of generation_config.json and of config.json (a multimodal model's are those of its text part)."""
    config = read_json(folder / "config.json", missing={})
    text = config.get("text_config")
    files = [read_json(folder / "generation_config.json", missing={}), config, text if isinstance(text, dict) else {}]
    values = [file.get("eos_token_id") for file in files]
    found = [item for value in values for item in (value if isinstance(value, list) else [value])]
    numbers = [item for item in found if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31]
    return [number for number in numbers if backend.id_to_token(number) is not None]


def _adds_bos(backend: tokenizers.Tokenizer, bos_id: int | None, setting: object) -> bool:
    """Whether texts start with ``bos_id``: as the config says, else as the backend's post-processor does."""
    if bos_id is None:
        return False
    return setting if isinstance(setting, bool) else backend.encode("a").ids[:1] == [bos_id]
