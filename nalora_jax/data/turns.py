"""Places of an assistant's turns in the text that a chat template writes.

Usually the text with the generation prompt begins the text with the turn, which begins the whole
text. Three kinds of templates differ:

- The generation prompt and the turn share only a beginning (DeepSeek-R1-Distill, Qwen3.5):
      <｜Assistant｜><think>\\n     <｜Assistant｜>4<｜end▁of▁sentence｜>
- Earlier messages change when turns are added: gpt-oss drops the reasoning of a tool call when the
  final turn follows, Qwen3.5 drops ``<think>\\n\\n</think>`` before earlier turns.
- Reasoning is dropped even from the last turn's content (DeepSeek-R1-Distill). It is kept here, as
  in TRL's training template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nalora_jax.data.long_chats import marked
from nalora_jax.data.tokenizer import REASONING
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

Message = dict[str, Any]
# Texts of (messages, add_generation_prompt) pairs.
Render = Callable[[Sequence[tuple[Sequence[Message], bool]]], list[str]]

THOUGHT_END = "</think>"
_WORDS = re.compile(r"(</?think>)|\S(?:(?!\s*</?think>).)*", re.DOTALL)
# They stand for the texts of a turn and of the message before it.
_MARK, _MARK_BEFORE = "xz0000zx", "xy0000yx"


def completions(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None = None,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the text of a conversation and the character ranges of the completions in ``turns``.

    Raises:
      NaloraError: a turn has no place in the text; the message names a setting that works.
    """
    render = _renderer(messages, turns, tokenizer, tools)
    # The full text, then for each completion the text before it and the text up to its end.
    parts = [part for turn in turns for part in ((messages[:turn], True), (messages[: turn + 1], False))]
    text, *texts = render([(messages, False), *parts])
    eos = (tokenizer.special_tokens or {}).get("eos_token", "")
    after_chat = _end_of_chat(text, messages, eos, render)
    texts = [part.removesuffix(after_chat) for part in texts]
    answers = []
    # From the last turn: if it has a place, computing the loss on it alone is a remedy for the others.
    for turn, before, upto in zip(turns[::-1], texts[-2::-2], texts[::-2], strict=True):
        if upto.startswith(before) and text.startswith(upto):
            answers.append((len(before), len(upto.rstrip())))
        else:
            answers.append(_rewritten(messages, turn, text, before, upto, eos, render, where))
    return text, tuple(answers[::-1])


def _rewritten(
    messages: Sequence[Message],
    turn: int,
    text: str,
    before: str,
    upto: str,
    eos: str,
    render: Render,
    where: str,
) -> tuple[int, int]:
    """Returns the completion in ``turn`` if the texts up to its start and its end do not begin ``text``."""
    own = _place(messages[: turn + 1], turn, upto, render)
    if own is None and not upto.startswith(before):
        raise NaloraError(
            where,
            expected="a chat template whose turns begin like its generation prompt",
            found=f"another beginning of messages[{turn}], so that no exact loss mask exists",
            remedy="use records of plain texts (prompt and completion, or pairs of texts), or --data.loss-on all",
        )
    if own is not None and text.startswith(upto):
        return own.start, len(upto.rstrip())
    place = _place(messages, turn, text, render)
    if own is not None and place is not None:
        words = upto[own.words :].rstrip()
        for written in (words, words.removesuffix(eos)):  # the token may follow the last turn only
            if text.startswith(written, place.words):
                return place.start, place.words + len(written)
    raise NaloraError(
        where,
        expected="a chat template whose earlier turns stay as they are when turns are added",
        found=f"one that rewrites messages[{turn}], so that no exact loss mask exists",
        remedy="use --data.loss-on answer, with one record for each turn to learn",
    )


def with_stops(
    text: str,
    answers: Sequence[tuple[int, int]],
    last: Message,
    tokenizer: Tokenizer,
    tools: Sequence[Message] | None = None,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Adds the stop token with which the next message begins to completions that have no end token.

    GLM-4.5 writes no end of a turn: the next role's token ends it, ``<|user|>``, or
    ``<|observation|>`` after a tool call. A completion at the end of the text gets the token that
    would follow ``last``.
    """
    ends, extended = tuple(tokenizer.turn_ends.values()), []
    for start, end in answers:
        if not text[start:end].endswith(ends):
            if end == len(text):
                text += _stop_after(last, tokenizer, tools)
            end += len(_stop_at(text, end, tokenizer))
        extended.append((start, end))
    return text, tuple(extended)


def _stop_after(message: Message, tokenizer: Tokenizer, tools: Sequence[Message] | None) -> str:
    """Returns the stop token with which the message after an assistant's ``message`` begins, or ""."""
    role = "tool" if message.get("tool_calls") else "user"
    turn = {name: value for name, value in message.items() if name not in REASONING}
    chat = [{"role": "user", "content": "x"}, turn | {"content": "x" if message.get("content") else ""}]
    try:
        upto, text = tokenizer.render_chats(
            [(chat, False), ([*chat, {"role": role, "content": "x"}], False)], tools
        )
    except NaloraError:  # such a message cannot follow
        return ""
    upto = upto.rstrip()
    return _stop_at(text, len(upto), tokenizer) if text.startswith(upto) else ""


def _stop_at(text: str, place: int, tokenizer: Tokenizer) -> str:
    """Returns the stop token at ``place``, with white space before it, or "" if there is none."""
    begin = len(text) - len(text[place:].lstrip())
    stops = (tokenizer.turn_ends.get(index) for index in tokenizer.eos_ids)
    stop = next((stop for stop in stops if stop and text.startswith(stop, begin)), "")
    return text[place : begin + len(stop)] if stop else ""


def _renderer(
    messages: Sequence[Message], turns: Sequence[int], tokenizer: Tokenizer, tools: Sequence[Message] | None
) -> Render:
    """Returns a function that renders chats; contents keep their reasoning if the template drops it."""
    thinking = {turn for turn in turns if THOUGHT_END in messages[turn]["content"]}
    if not thinking or not _drops_reasoning(messages[: min(thinking)], tokenizer, tools):
        return lambda chats: tokenizer.render_chats(chats, tools)

    def render(chats: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        short = [marked(chat, thinking) for chat, _ in chats]
        prompts = [prompt for _, prompt in chats]
        texts = tokenizer.render_chats(
            [(chat.messages, prompt) for chat, prompt in zip(short, prompts, strict=True)], tools
        )
        return [chat.restored(text) for chat, text in zip(short, texts, strict=True)]

    return render


def _drops_reasoning(
    before: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message] | None
) -> bool:
    """Returns True if the template drops reasoning from the content of the last turn.

    False if it writes ``</think>`` itself before the rest: then the generation prompt does, too.
    """
    turn = {"role": "assistant", "content": f"<think>\n{_MARK}\n{THOUGHT_END}\n\n{_MARK}"}
    (text,) = tokenizer.render_chats([([*before, turn], False)], tools)
    return text.count(_MARK) == 1 and not text.partition(_MARK)[0].rstrip().endswith(THOUGHT_END)


@dataclass(frozen=True)
class _Place:
    """Characters of a text at which a completion and its own words start."""

    start: int
    words: int


def _place(messages: Sequence[Message], turn: int, text: str, render: Render) -> _Place | None:
    """Returns where ``turn`` is in ``text``, the text of ``messages``; None if it is unknown.

    The texts between the message before the turn and the turn's words are compared:

        with the turn:             <|im_end|>\\n<|im_start|>assistant\\n
        with a generation prompt:  <|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n

    The completion starts at the end of the shorter one, if it begins the longer one.
    """
    own = _with_mark(messages, turn, _MARK)
    both = _with_mark(own, turn - 1, _MARK_BEFORE)
    own_text, both_text, prompt = render([(own, False), (both, False), (both[:turn], True)])
    head, mark, _ = own_text.partition(_MARK)
    between = both_text.partition(_MARK)[0].rpartition(_MARK_BEFORE)[2]
    prompt = prompt.rpartition(_MARK_BEFORE)[2]
    if not mark or not text.startswith(head) or not head.endswith(between):
        return None
    if not prompt.startswith(between) and not between.startswith(prompt):
        return None
    return _Place(len(head) - len(between) + min(len(prompt), len(between)), len(head))


def _with_mark(messages: Sequence[Message], place: int, mark: str) -> list[Message]:
    """Returns the messages with ``mark`` for the words of one; tags around its reasoning stay."""
    message = messages[place]
    changed: Message = {name: mark for name in REASONING if message.get(name)}
    content = message["content"]
    if content or not changed:
        text = content.lstrip() if isinstance(content, str) else ""
        changed["content"] = _WORDS.sub(lambda words: words[1] or mark, text) or mark
    return [*messages[:place], message | changed, *messages[place + 1 :]]


def _end_of_chat(text: str, messages: Sequence[Message], eos: str, render: Render) -> str:
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
