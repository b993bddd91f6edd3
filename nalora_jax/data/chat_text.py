"""Renders records as text and marks the parts whose tokens count in the loss.

Usually the text with the generation prompt begins the text with the turn, which begins the whole
text. Three kinds of templates differ:

- The generation prompt and the turn share only a beginning (DeepSeek-R1-Distill, Qwen3.5):
      <｜Assistant｜><think>\\n     <｜Assistant｜>4<｜end▁of▁sentence｜>
- Earlier messages change when turns are added: gpt-oss drops the reasoning of a tool call when the
  final turn follows, Qwen3.5 drops ``<think>\\n\\n</think>`` before earlier turns.
- Reasoning is dropped even from the last turn's content (DeepSeek-R1-Distill). It is kept here, as
  in TRL's training template.

An exact mask needs the rendered text up to every turn, which is quadratic in the length of a chat.
Most templates copy contents unchanged. Then the turns' positions in a long chat follow from a chat
with the same turns and short contents, and only one text of the full length is rendered.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from nalora_jax.config import DataConfig
from nalora_jax.data.forms import Parts, canonical, message_of, tools_of
from nalora_jax.data.source import TableRecord
from nalora_jax.data.tokenizer import REASONING, require_unicode
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


Message = dict[str, Any]
_Ranges = tuple[tuple[int, int], ...]  # of characters: start and stop
# Texts of (messages, add_generation_prompt) pairs.
Render = Callable[[Sequence[tuple[Sequence[Message], bool]]], list[str]]


class MissingFieldError(NaloraError):
    """A record does not have a required field."""


@dataclass(frozen=True)
class Rendered:
    """A text and the character ranges of its completions.

    Example (a completion):
      >>> Rendered("2 + 2 = 4", answers=((7, 9),), special=True)
    """

    text: str
    # Those that count in the loss, in order, not overlapping.
    answers: _Ranges
    # True if the tokenizer adds the begin-of-sequence id (a chat template writes it itself).
    special: bool


def render_record(
    record: dict[str, Any], config: DataConfig, tokenizer: Tokenizer, where: str
) -> Rendered:
    """Returns the training text of a record, chosen by its fields (`nalora_jax.data.forms`).

    Args:
      record: one record of the data set.
      config: names of the fields, ``loss_on`` and ``chat``.
      tokenizer: renders chat templates.
      where: names the record in messages.

    Raises:
      NaloraError: a field is missing or of the wrong type, a completion is empty, or the chat
        template changes earlier turns when later turns are added, so that no exact mask exists.
    """
    record = canonical(record, config, where)
    if config.messages_field in record:
        messages = messages_of(record, config, where)
        tools = tools_of(record, where)
        return render_chat(messages, config.loss_on, tokenizer, where, tools)
    prompt = text_field(
        record, config.prompt_field, where, "--data.prompt-field", config.messages_field
    )
    completion = text_field(
        record, config.completion_field, where, "--data.completion-field"
    )
    if not completion:
        raise NaloraError(
            f"{where}: {config.completion_field}",
            expected="an answer",
            found="an empty text",
        )
    return render_completion(prompt, completion, config, tokenizer, where)


def render_completion(
    prompt: str, completion: str, config: DataConfig, tokenizer: Tokenizer, where: str
) -> Rendered:
    """Returns the text of a prompt and its completion, as turns of a chat with ``config.chat``."""
    if config.chat:
        return render_chat(
            make_turns(prompt, completion), config.loss_on, tokenizer, where
        )
    text = prompt + completion
    start = len(prompt)
    if config.loss_on == "all":
        start = 0
    return Rendered(text, ((start, len(text)),), special=True)


def render_chat(
    messages: Sequence[Message],
    loss_on: str,
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None = None,
) -> Rendered:
    """Renders a conversation with the model's chat template.

    A completion runs from the position at which generation would start to the end of its
    end-of-turn token. It excludes white space that a template writes between turns, and an
    end-of-sequence token that a template writes after the end of the last turn (as Phi-3's does).
    If the template ends turns by the next role's token, that token is part of the completion. If
    the loss is computed on the last completion only, the text after it is left out.

    Example (ChatML, completions in brackets, loss on every assistant turn):
      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello<|im_end|>]\\n

    Raises:
      NaloraError: there is no assistant turn to learn, or the template leaves no exact mask.
    """
    turns = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not turns and loss_on != "all":
        raise NaloraError(
            where,
            expected="an assistant's turn, whose tokens are the targets",
            found="none",
        )
    if loss_on == "answer":
        turns = turns[-1:]
        messages = messages[: turns[0] + 1]
    if turns and turns[0] == 0 and loss_on != "all":
        raise NaloraError(
            where, expected="a user's or system's message first", found="an assistant's"
        )
    for turn in turns:
        message = messages[turn]
        texts = [message.get(name) for name in ("content", *REASONING)]
        has_words = any(isinstance(text, str) and text.strip() for text in texts)
        if not has_words and not message.get("tool_calls"):
            place = f"{where}: message {turn + 1} of {len(messages)}"
            remedy = "the model would learn to end at once: write the answer, or remove the record"
            raise NaloraError(
                place,
                expected="an assistant's answer",
                found="an empty text",
                remedy=remedy,
            )
    ends_in_turn = messages[-1]["role"] == "assistant"
    if loss_on == "all":
        text = tokenizer.render_chat(messages, tools=tools).rstrip()
        answers: _Ranges = ((0, len(text)),)
    else:
        text, answers = _completions(messages, turns, tokenizer, where, tools)
        if ends_in_turn:
            text = text[: answers[-1][1]]
    if ends_in_turn or loss_on != "all":
        text, answers = _with_stops(text, answers, messages[-1], tokenizer, tools)
    return Rendered(text, answers, special=False)


def _completions(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None,
) -> tuple[str, _Ranges]:
    """Returns the text of a conversation and the character ranges of the completions in ``turns``.

    For long chats both are derived from a chat with short contents, if this gives the same text.
    """
    long = {}  # contents to shorten, by the index of their message
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and len(content.strip()) > _LONG:
            long[index] = content
    if len(turns) * sum(map(len, long.values())) > _MOST:
        short = _marked(messages, long)
        text, answers = completions(short.messages, turns, tokenizer, where, tools)
        bounds = list(chain.from_iterable(answers))
        expanded = short.expanded(text, bounds)
        if expanded is not None:
            text, bounds = expanded
            if text == tokenizer.render_chat(messages, tools=tools):
                return text, tuple(zip(bounds[::2], bounds[1::2], strict=True))
    return completions(messages, turns, tokenizer, where, tools)


def make_turns(prompt: str, completion: str) -> list[Message]:
    """Returns prompt and completion as a user and an assistant turn.

    The leading space of the completion is removed.
    """
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion.strip()},
    ]


def messages_of(
    record: dict[str, Any], config: DataConfig, where: str
) -> list[Message]:
    """Returns the chat messages of a record after checking them.

    Raises:
      NaloraError: not a list of messages with a role and a text.
    """
    field = config.messages_field
    value = record[config.messages_field]
    if isinstance(value, dict) and all(
        isinstance(column, list) for column in value.values()
    ):
        # TFDS stores a sequence of dicts as a dict of sequences.
        rows = zip(*value.values(), strict=False)
        value = [dict(zip(value, row, strict=False)) for row in rows]
    if not isinstance(value, list) or not value:
        actual = "none" if value == [] else f"a {type(value).__name__}"
        raise NaloraError(
            f"{where}: {field}", expected="a list of chat messages", found=actual
        )
    messages = []
    for number, turn in enumerate(value):
        place = f"{where}: {field}[{number}]"
        message = message_of(turn, place, filled=isinstance(record, TableRecord))
        text_field(message, "role", place)
        if not isinstance(message.get("content"), Parts):
            text_field(message, "content", place)
        messages.append(message)
    return messages


def text_field(
    record: dict[str, Any],
    field: str,
    where: str,
    flag: str = "",
    alternative: str = "",
) -> str:
    """Returns the text ``record[field]``.

    Raises:
      NaloraError: the field is missing (the message lists the record's fields) or not a text.
    """
    if field not in record:
        expected = f"a field {field!r}"
        remedy = ""
        names = ", ".join(map(repr, record))
        if alternative:
            expected += f" (or {alternative!r})"
        if flag:
            remedy = f"name the right one by {flag}"
        raise MissingFieldError(
            where, expected=expected, found=names or "no field", remedy=remedy
        )
    value = record[field]
    if not isinstance(value, str):
        raise NaloraError(
            f"{where}: {field}", expected="a text", found=f"a {type(value).__name__}"
        )
    require_unicode(value, f"{where}: {field}")
    return value


THOUGHT_END = "</think>"
# A tag around reasoning (group 1), or the words up to the next tag.
_WORDS = re.compile(r"(</?think>)|\S(?:(?!\s*</?think>).)*", re.DOTALL)
# They stand for the texts of a turn and of the message before it.
_MARK = "xz0000zx"
_MARK_BEFORE = "xy0000yx"


def completions(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None = None,
) -> tuple[str, _Ranges]:
    """Returns the text of a conversation and the character ranges of the completions in ``turns``.

    Raises:
      NaloraError: a turn has no place in the text; the message names a setting that works.
    """
    render = _renderer(messages, turns, tokenizer, tools)
    # The full text, then for each completion the text before it and the text up to its end.
    parts: list[tuple[Sequence[Message], bool]] = [(messages, False)]
    for turn in turns:
        parts.append((messages[:turn], True))
        parts.append((messages[: turn + 1], False))
    text, *texts = render(parts)
    eos = (tokenizer.special_tokens or {}).get("eos_token", "")
    after_chat = _end_of_chat(text, messages, eos, render)
    texts = [part.removesuffix(after_chat) for part in texts]

    def rewritten(turn: int, before: str, upto: str) -> tuple[int, int]:
        """Returns the range of the completion in ``turn`` in a template that rewrites turns.

        ``before`` and ``upto`` are the texts up to its start and its end when the chat ends there;
        they do not begin ``text``.
        """
        own = _place(messages[: turn + 1], turn, upto, render)
        if own is None and not upto.startswith(before):
            raise NaloraError(
                where,
                expected="a chat template whose turns begin like its generation prompt",
                found=f"another beginning of messages[{turn}], so that no exact loss mask exists",
                remedy="use records of plain texts (prompt and completion, or pairs of texts), "
                "or --data.loss-on all",
            )
        if own is not None and text.startswith(upto):
            return own[0], len(upto.rstrip())
        place = _place(messages, turn, text, render)
        if own is not None and place is not None:
            start, place_of_words = place
            words = upto[own[1] :].rstrip()
            # The token may follow the last turn only.
            for written in (words, words.removesuffix(eos)):
                if text.startswith(written, place_of_words):
                    return start, place_of_words + len(written)
        raise NaloraError(
            where,
            expected="a chat template whose earlier turns stay as they are when turns are added",
            found=f"one that rewrites messages[{turn}], so that no exact loss mask exists",
            remedy="use --data.loss-on answer, with one record for each turn to learn",
        )

    answers = []
    # From the last turn: if it has a place, computing the loss on it alone is a remedy for the
    # others.
    befores = texts[::2]
    uptos = texts[1::2]
    for turn, before, upto in reversed(list(zip(turns, befores, uptos, strict=True))):
        if upto.startswith(before) and text.startswith(upto):
            answers.append((len(before), len(upto.rstrip())))
        else:
            answers.append(rewritten(turn, before, upto))
    start, end = answers[0]
    ends = tuple(tokenizer.turn_ends.values())
    if after_chat and text[end:] == after_chat and not text[:end].endswith(ends):
        # gpt-oss: `<|return|>` ends the turn here; `<|end|>` replaces it if the chat continues.
        answers[0] = (start, len(text))
    return text, tuple(answers[::-1])


def _with_stops(
    text: str,
    answers: Sequence[tuple[int, int]],
    last: Message,
    tokenizer: Tokenizer,
    tools: Sequence[Message] | None = None,
) -> tuple[str, _Ranges]:
    """Adds the stop token with which the next message begins to completions that have no end token.

    GLM-4.5 writes no end of a turn: the next role's token ends it, ``<|user|>``, or
    ``<|observation|>`` after a tool call. A completion at the end of the text gets the token that
    would follow ``last``.
    """
    ends = tuple(tokenizer.turn_ends.values())
    extended = []
    for start, end in answers:
        if not text[start:end].endswith(ends):
            if end == len(text):
                text += _stop_after(last, tokenizer, tools)
            end += len(_stop_at(text, end, tokenizer))
        extended.append((start, end))
    return text, tuple(extended)


def _stop_after(
    message: Message, tokenizer: Tokenizer, tools: Sequence[Message] | None
) -> str:
    """Returns the stop token with which the message after an assistant's ``message`` begins.

    It is "" if no message can follow, or if the next one begins with no stop token.
    """
    role = "user"  # of the next message
    if message.get("tool_calls"):
        role = "tool"
    # The message with a short content and without reasoning.
    turn = {name: value for name, value in message.items() if name not in REASONING}
    turn["content"] = ""
    if message.get("content"):
        turn["content"] = "x"
    chat = [{"role": "user", "content": "x"}, turn]
    longer = [*chat, {"role": role, "content": "x"}]
    try:
        upto, text = tokenizer.render_chats([(chat, False), (longer, False)], tools)
    except NaloraError:  # such a message cannot follow
        return ""
    upto = upto.rstrip()
    if not text.startswith(upto):
        return ""
    return _stop_at(text, len(upto), tokenizer)


def _stop_at(text: str, place: int, tokenizer: Tokenizer) -> str:
    """Returns the stop token at ``place``, with white space before it, or "" if there is none."""
    begin = len(text) - len(text[place:].lstrip())
    for index in tokenizer.eos_ids:
        stop = tokenizer.turn_ends.get(index)
        if stop and text.startswith(stop, begin):
            return text[place : begin + len(stop)]
    return ""


def _renderer(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: Tokenizer,
    tools: Sequence[Message] | None,
) -> Render:
    """Returns a function that renders chats; contents keep their reasoning even if the template
    drops it.

    Whether it does is tested with a marked turn. A template that writes ``</think>`` itself before
    the rest drops none: the generation prompt ends with it, too.
    """
    thinking = {turn for turn in turns if THOUGHT_END in messages[turn]["content"]}
    drops = False
    if thinking:
        turn = {
            "role": "assistant",
            "content": f"<think>\n{_MARK}\n{THOUGHT_END}\n\n{_MARK}",
        }
        chat = [*messages[: min(thinking)], turn]
        (text,) = tokenizer.render_chats([(chat, False)], tools)
        before, _, _ = text.partition(_MARK)
        one_mark = text.count(_MARK) == 1
        drops = one_mark and not before.rstrip().endswith(THOUGHT_END)
    if not drops:
        return lambda chats: tokenizer.render_chats(chats, tools)

    def render(chats: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        """Renders chats with marks for the contents with reasoning, and puts the contents back."""
        short = [_marked(chat, thinking) for chat, _ in chats]
        prompts = [prompt for _, prompt in chats]
        pairs = [
            (chat.messages, prompt) for chat, prompt in zip(short, prompts, strict=True)
        ]
        texts = tokenizer.render_chats(pairs, tools)
        return [chat.restored(text) for chat, text in zip(short, texts, strict=True)]

    return render


def _place(
    messages: Sequence[Message], turn: int, text: str, render: Render
) -> tuple[int, int] | None:
    """Returns where the completion of ``turn`` starts in ``text``, the text of ``messages``, and
    where its own words start; None if this is unknown.

    The texts between the message before the turn and the turn's words are compared:

        with the turn:             <|im_end|>\\n<|im_start|>assistant\\n
        with a generation prompt:  <|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n

    The completion starts at the end of the shorter one, if it begins the longer one.
    """
    own = _with_mark(messages, turn, _MARK)
    both = _with_mark(own, turn - 1, _MARK_BEFORE)
    own_text, both_text, prompt = render(
        [(own, False), (both, False), (both[:turn], True)]
    )
    head, mark, _ = own_text.partition(_MARK)
    both_head, _, _ = both_text.partition(_MARK)
    _, _, between = both_head.rpartition(_MARK_BEFORE)
    _, _, prompt = prompt.rpartition(_MARK_BEFORE)
    if not mark or not text.startswith(head) or not head.endswith(between):
        return None
    if not prompt.startswith(between) and not between.startswith(prompt):
        return None
    start = len(head) - len(between)
    return start + min(len(prompt), len(between)), len(head)


def _with_mark(messages: Sequence[Message], place: int, mark: str) -> list[Message]:
    """Returns the messages with ``mark`` in place of the words of the message at ``place``.

    The tags ``<think>`` and ``</think>`` around its reasoning stay.
    """
    message = messages[place]
    changed: Message = {name: mark for name in REASONING if message.get(name)}
    content = message["content"]
    if content or not changed:
        text = content.lstrip() if isinstance(content, str) else ""
        marked = _WORDS.sub(lambda words: words[1] or mark, text)
        changed["content"] = marked or mark
    return [*messages[:place], message | changed, *messages[place + 1 :]]


def _end_of_chat(
    text: str, messages: Sequence[Message], eos: str, render: Render
) -> str:
    """Returns ``eos`` if it ends the text of the conversation without being part of the last turn.

    It is "" if there is none, or if the token remains when the template continues the conversation.
    """
    if not eos or not text.endswith(eos):
        return ""
    try:
        (continued,) = render([(messages, True)])
    except NaloraError:  # a completion cannot follow this turn
        return ""
    if continued.startswith(text) or not continued.startswith(text.removesuffix(eos)):
        return ""
    return eos


# Characters that all prefixes together may have before contents are shortened.
_MOST = 4_000_000
_LONG = 64  # characters of a content that is shortened
_CONTENT_MARK = re.compile(r"xq(\d{6})qx")


@dataclass(frozen=True)
class ShortChat:
    """A chat whose long contents are marks, which keep the white space around a content."""

    messages: list[dict[str, Any]]
    contents: list[str]  # of each mark, without white space around it

    def expanded(
        self, text: str, positions: Sequence[int]
    ) -> tuple[str, list[int]] | None:
        """Returns a rendered text with its contents in place of the marks, and where ``positions``
        of the rendered text are in it.

        None if a position is inside a mark.
        """
        ends = []
        shifts = [
            0
        ]  # characters that the contents up to each mark's end add to the text
        for mark in _CONTENT_MARK.finditer(text):
            if any(mark.start() < position < mark.end() for position in positions):
                return None
            ends.append(mark.end())
            content = self.contents[int(mark[1])]
            shifts.append(shifts[-1] + len(content) - len(mark[0]))
        places = [
            position + shifts[bisect_right(ends, position)] for position in positions
        ]
        return self.restored(text), places

    def restored(self, text: str) -> str:
        """Returns a rendered text with its contents."""
        return _CONTENT_MARK.sub(lambda mark: self.contents[int(mark[1])], text)


def _marked(messages: Sequence[Message], places: Collection[int]) -> ShortChat:
    """Returns the chat with marks in place of the contents at ``places``."""
    short = list(messages)
    contents = list[str]()
    for i, message in enumerate(messages):
        if i in places:
            before, content, after = message["content"].partition(
                message["content"].strip()
            )
            mark = f"xq{len(contents):06}qx"
            short[i] = message | {"content": f"{before}{mark}{after}"}
            contents.append(content)
    return ShortChat(short, contents)
