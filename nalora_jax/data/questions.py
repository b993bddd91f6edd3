"""Held-out evaluation examples, drawn once and tokenized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import (
    THOUGHT_END,
    Message,
    Rendered,
    make_turns,
    messages_of,
    render_chat,
    text_field,
)
from nalora_jax.data.forms import IMAGES, Parts, canonical, tools_of
from nalora_jax.data.items import ChoiceItem, CompletionItem, Item, VisionItem
from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Source, require_some
from nalora_jax.data.sources import open_held_out, open_pair
from nalora_jax.data.tokenize import Example, rows_of, tokenize_texts
from nalora_jax.data.tokenizer import require_unicode
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

# The same draw in every run, so that runs with different seeds are evaluated on the same examples.
_SEED = 20260101
T = TypeVar("T")


@dataclass(frozen=True)
class _Question:
    """What an evaluation example has besides its texts, of which there is one per choice."""

    choices: Sequence[str] = ()
    gold: int = 0
    own_prompts: bool = False
    turns: tuple[tuple[str, str], ...] = ()  # of a conversation, before the completion
    images: tuple[Any, ...] | None = None  # None for models without image input


def eval_examples(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: str | None = None,
    limit: int | None = None,
    source: Mapping[str, Source] | None = None,
) -> list[Item]:
    """Opens the evaluation split and returns its examples; see `examples_at`.

    Args:
      config: data settings.
      tokenizer: tokenizer of the model.
      split: in place of ``config.eval_split``.
      limit: in place of ``config.eval_limit``; 0 means all.
      source: sources by split, in place of the data set in ``config``.

    Raises:
      NaloraError: bad data, or records that are also in the training split.
    """
    if split is None:
        _, read = open_pair(config, source=source)
    else:
        read = open_held_out(config, split, source=source)
    require_some(read)
    if limit is None:
        limit = config.eval_limit
    return examples_at(read, _drawn(read, limit), config, tokenizer)


def held_out_indices(records: Source, config: DataConfig) -> list[int]:
    """Returns the indices of the held-out records that a run evaluates, ascending: the same in all
    runs."""
    limit = 0
    if config.eval_limit:
        limit = config.eval_limit + config.select_limit
    return _drawn(records, limit)


def _drawn(records: Source, limit: int) -> list[int]:
    """Returns ``limit`` indices of records, ascending, by the same draw in all runs; 0: all."""
    return np.sort(permutation(len(records), _SEED)[: limit or None]).tolist()


def examples_at(
    read: Source, indices: Sequence[int], config: DataConfig, tokenizer: Tokenizer
) -> list[Item]:
    """Returns the examples of the records at ``indices``: multiple choice if records have choices.

    All other records become completions. Prompt and completion are tokenized exactly as in
    training, so that the scored tokens are the trained tokens, except for the end-of-turn token,
    which is left out.

    Args:
      read: records; those with "choices" (texts) and "gold" (an index) are multiple choice, with
        "choice_prompts" if the choices differ in their prompts instead of their completions.
      indices: indices into ``read``.
      config: names of the fields.
      tokenizer: tokenizer of the model.

    Raises:
      NaloraError: bad records.
    """

    def render(record: dict[str, Any], where: str) -> tuple[list[Rendered], _Question]:
        return _question(record, config, tokenizer, where)

    items: list[Item] = []
    for _, texts, examples, question in tokenize_texts(
        read, indices, render, tokenizer, config, end=False
    ):
        if question.choices:
            items.append(_choice(question, texts, examples))
        else:
            items += _completions(question, texts[0], examples[0], config, tokenizer)
    return items


def held_out(
    records: Source, config: DataConfig, tokenizer: Tokenizer
) -> tuple[list[Item], list[Item]]:
    """Returns held-out examples in two lists: for reported results, and to choose a checkpoint.

    Args:
      records: the held-out records.
      config: names of the fields, ``eval_limit`` and ``select_limit``.
      tokenizer: tokenizer of the model.

    Raises:
      NaloraError: bad records, or fewer than two.
    """
    items = examples_at(records, held_out_indices(records, config), config, tokenizer)
    return split_questions(items, config.eval_limit, config.select_limit)


def split_questions(
    items: Sequence[T], reported: int, selecting: int
) -> tuple[list[T], list[T]]:
    """Splits examples into reported examples and others that choose a checkpoint, without overlap.

    Args:
      items: at least two.
      reported: maximum number of reported examples (0: all that remain).
      selecting: number that choose the checkpoint; at most a third of all.

    Raises:
      NaloraError: fewer than two examples.
    """
    if len(items) < 2:
        raise NaloraError(
            "--data.eval-split", expected="at least two examples", found=len(items)
        )
    order = permutation(len(items), _SEED + 1).tolist()
    cut = max(1, min(selecting, len(items) // 3))
    remaining = order[cut:]
    first = [items[i] for i in sorted(remaining[: reported or None])]
    second = [items[i] for i in sorted(order[:cut])]
    return first, second


def _question(
    record: dict[str, Any], config: DataConfig, tokenizer: Tokenizer, where: str
) -> tuple[list[Rendered], _Question]:
    """Returns the texts to score for one record, one for each choice, and the other parts of its
    example."""
    images = record.get(IMAGES)
    record = canonical(record, config, where)
    if config.messages_field in record:
        messages = messages_of(record, config, where)
        tools = tools_of(record, where)
        text = _chat_text(messages, tokenizer, where, tools)
        return [text], _Question(turns=_turns(messages), images=images)
    prompt = text_field(
        record, config.prompt_field, where, "--data.prompt-field", config.messages_field
    )
    choices = []
    gold = 0
    if record.get("choices"):
        choices = _texts(record, "choices", where)
        gold = gold_of(record, where)
    own_prompts = bool(choices and record.get("choice_prompts"))
    count = max(len(choices), 1)
    prompts = [prompt] * count
    completions = [f" {choice}" for choice in choices]
    if own_prompts:
        prompts = _texts(record, "choice_prompts", where)
        if len(prompts) != count:
            raise NaloraError(
                f"{where}: choice_prompts",
                expected=f"{count}, one a choice",
                found=len(prompts),
            )
    if own_prompts or not choices:
        completion = text_field(
            record, config.completion_field, where, "--data.completion-field"
        )
        completions = [completion] * count
    pairs = zip(prompts, completions, strict=True)
    texts = [
        _text(prompt, completion, config, tokenizer, where)
        for prompt, completion in pairs
    ]
    return texts, _Question(choices, gold, own_prompts, images=images)


def gold_of(record: dict[str, Any], where: str) -> int:
    """Returns the index of the right one of a record's choices."""
    count = len(record["choices"])
    gold = record.get("gold")
    if isinstance(gold, int) and 0 <= gold < count:
        return gold
    raise NaloraError(
        f"{where}: gold",
        expected=f"the index of one of {count} choices",
        found=repr(gold),
    )


def _texts(record: dict[str, Any], field: str, where: str) -> list[str]:
    """Returns the list of non-empty texts in ``field``; raises NaloraError for any other value."""
    value = record[field]
    if not isinstance(value, list) or not all(
        isinstance(text, str) and text for text in value
    ):
        found = repr(value)[:80]
        raise NaloraError(
            f"{where}: {field}", expected="a list of texts, none empty", found=found
        )
    for text in value:
        require_unicode(text, f"{where}: {field}")
    return value


def _text(
    prompt: str, completion: str, config: DataConfig, tokenizer: Tokenizer, where: str
) -> Rendered:
    """Returns a prompt with one completion as in training, without the end-of-turn token."""
    if not completion.strip():
        raise NaloraError(
            f"{where}: {config.completion_field}",
            expected="an answer",
            found="an empty text",
        )
    if config.chat:
        return _chat_text(make_turns(prompt, completion), tokenizer, where)
    text = prompt + completion
    return Rendered(text, ((len(prompt), len(text)),), special=True)


def _chat_text(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None = None,
) -> Rendered:
    """Returns a conversation up to its last completion's end, without the end-of-turn token."""
    text = render_chat(messages, "answer", tokenizer, where, tools)
    ((start, end),) = text.answers
    last = next(turn for turn in reversed(messages) if turn["role"] == "assistant")
    if last.get("tool_calls"):  # each template has its format for calls
        written = text.text[start:end]
        stops = map(tokenizer.backend.id_to_token, tokenizer.eos_ids)
        stop = next((token for token in stops if token and written.endswith(token)), "")
        end = start + len(written.removesuffix(stop).rstrip())
    else:
        # Templates write the rest of a content as it is, but not always the reasoning at its start.
        _, _, after_thought = last["content"].rpartition(THOUGHT_END)
        answer = after_thought.strip()
        thought_end = text.text.rfind(THOUGHT_END, start, end)  # -1 if there is none
        place = text.text.find(answer, max(start, thought_end))
        if not answer or place < 0:
            raise NaloraError(
                where,
                expected="an answer that the chat template writes as it is",
                found=repr(answer[:80]),
            )
        end = place + len(answer)
    return Rendered(text.text[:end], ((start, end),), special=False)


def _turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """Returns the conversation before the last completion as (role, text).

    Tool calls are shown as JSON, and images as ``[image]``.
    """
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    last = answers[-1]
    turns = []
    for turn in messages[:last]:
        text = turn["content"]
        if isinstance(text, Parts):
            text = "".join(block.get("text", "[image]") for block in text)
        calls = [json.dumps(call["function"]) for call in turn.get("tool_calls", ())]
        turns.append((str(turn["role"]), "\n".join(filter(None, [text, *calls]))))
    return tuple(turns)


def _choice(
    question: _Question, texts: Sequence[Rendered], examples: Sequence[Example]
) -> ChoiceItem:
    """Returns a multiple-choice example of a question's texts and their tokens, one for each
    choice."""
    divided = [example.divided for example in examples]
    prompts = [prompt for prompt, _ in divided]
    answers = [answer for _, answer in divided]
    gold = question.gold
    start, _ = texts[gold].answers[0]
    prompt = texts[gold].text[:start]
    own_prompts = None
    if question.own_prompts:
        own_prompts = prompts
    return ChoiceItem(
        prompts[gold], answers, gold, prompt, list(question.choices), own_prompts
    )


def _completions(
    question: _Question,
    text: Rendered,
    example: Example,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> list[CompletionItem]:
    """Returns the examples of a completion: one, or one for each of its rows if it is divided as in
    training."""
    ((start, stop),) = text.answers
    items = []
    for row in rows_of(example, config, tokenizer.bos_id):
        prompt_ids, completion_ids = row.divided
        prompt = text.text[:start]
        completion = text.text[start:stop]
        if row is not example and not np.array_equal(row.answer, example.answer):
            # A part of the text, or fewer loss tokens.
            prompt = tokenizer.decode(prompt_ids, skip_special=False)
            completion = tokenizer.decode(completion_ids, skip_special=False)
        item = CompletionItem(
            prompt_ids, completion_ids, prompt, completion, question.turns
        )
        if question.images is not None:
            item = VisionItem(**vars(item), images=question.images)
        items.append(item)
    return items
