"""Text to token ids and back, and chat messages to text, for every model that this library loads.

A `Tokenizer` is a thin shell around a ``tokenizers.Tokenizer``: it adds what a decoder needs to know (which ids begin,
end and pad a sequence, where generation stops) and renders chat templates as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nalora_jax.errors import NaloraError


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
      add_bos: whether the model was trained with ``bos_id`` in front.
      special_tokens: by the names that chat templates use, e.g. ``{"eos_token": "<|im_end|>"}``.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    add_bos: bool = False
    special_tokens: Mapping[str, str] | None = None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        added = self.backend.get_added_tokens_decoder()
        return max(self.backend.get_vocab_size(with_added_tokens=False), *(token_id + 1 for token_id in added), 0)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special``, the begin-of-sequence id in front where the model wants it.

        Special tokens written out in ``text`` become their ids, as in transformers.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if special and self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``."""
        text: str = self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """``messages`` as the one text that the model was tuned on.

        Args:
          messages: ``{"role": ..., "content": ...}`` dicts, in order.
          add_generation_prompt: end with what precedes an assistant's answer.

        Raises:
          NaloraError: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise NaloraError(
                "chat template",
                expected="a model with a chat template",
                found="none in its tokenizer",
                remedy="use an instruction-tuned model, or prompt/completion data",
            )
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **(self.special_tokens or {}),
            )
        except Exception as error:  # the template is the model's own program: it may fail in any way
            raise NaloraError(
                "chat template",
                expected=f"messages that the model's template accepts (roles: {[m.get('role') for m in messages]})",
                found=f"{type(error).__name__}: {error}",
                remedy="change the messages' roles or their order",
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template | None:
        if self.chat_template is None:
            return None
        try:
            return _environment().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise NaloraError("chat template", expected="valid jinja2", found=error) from error

    @staticmethod
    def from_folder(path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json (stop ids) and
        chat_template.jinja; only the first must exist.

        Raises:
          NaloraError: a file is missing or damaged, or there is no end-of-sequence token.
        """
        folder = Path(path)
        backend = _read_backend(folder / "tokenizer.json")
        settings = read_json(folder / "special_tokens_map.json", missing={})
        settings |= read_json(folder / "tokenizer_config.json", missing={})
        named = {name: _token_text(value) for name, value in settings.items() if name.endswith("_token")}
        special = {name: text for name, text in named.items() if text}
        bos_id, eos_id, pad_id = (backend.token_to_id(special.get(f"{n}_token", "")) for n in ("bos", "eos", "pad"))
        if eos_id is None:
            raise NaloraError(
                str(folder / "tokenizer_config.json"),
                expected="eos_token, a token of the vocabulary",
                found=repr(special.get("eos_token")),
                remedy="set eos_token to the token that ends a text",
            )
        return Tokenizer(
            backend=backend,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            eos_ids=_stop_ids(folder, eos_id),
            chat_template=_chat_template(folder, settings),
            add_bos=_adds_bos(backend, bos_id, settings.get("add_bos_token")),
            special_tokens=special,
        )


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


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise NaloraError(
            str(path),
            expected="the file",
            found="nothing of that name",
            remedy="save it with transformers: AutoTokenizer.from_pretrained(model).save_pretrained(folder)",
        )
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the only type that the binding raises
        raise NaloraError(str(path), expected="a tokenizer", found=error, remedy="download the file again") from error
    backend.no_truncation()  # settings of whoever saved it last, not of the model
    backend.no_padding()
    return backend


def _token_text(value: object) -> str:
    """The text of a special token as configs write it: ``"</s>"`` or ``{"content": "</s>", ...}``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    """``eos_id`` and what generation_config.json adds to it."""
    listed = read_json(folder / "generation_config.json", missing={}).get("eos_token_id")
    more = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys([eos_id, *(token_id for token_id in more if isinstance(token_id, int))]))


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: its own file first, then tokenizer_config.json (one text, or several by name)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _adds_bos(backend: tokenizers.Tokenizer, bos_id: int | None, setting: object) -> bool:
    """Whether texts start with ``bos_id``: as the config says, else as the backend's post-processor does."""
    if bos_id is None:
        return False
    return setting if isinstance(setting, bool) else backend.encode("a").ids[:1] == [bos_id]


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks an assistant's text: its body as it is."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    """The jinja2 environment that chat templates are written for; sandboxed, since a template is foreign code."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own filter escapes HTML characters, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
