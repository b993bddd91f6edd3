"""Prompts of reinforcement learning: an endless stream of groups, each row a sample that is still
to be drawn.

Row r of a batch belongs to the prompt ``r // samples``; all samples of a prompt are next to each
other. With several updates on a rollout, as many batches follow with the same prompts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.config import DataConfig, RLConfig
from nalora_jax.data.chat_text import Message, messages_of
from nalora_jax.data.forms import Parts, canonical, tools_of
from nalora_jax.data.items import ChoiceItem, CompletionItem
from nalora_jax.data.packing import epoch_order, permutation
from nalora_jax.data.pipeline import HostBatch, Stream
from nalora_jax.data.questions import examples_at, held_out_indices, split_questions
from nalora_jax.data.source import Record, Source
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_OTHERS = 7  # key of the prompts that replace groups without variance
# Text of the prompt of a record, with all its special tokens; it is given the record's name, too.
PromptText = Callable[[Record, str], str]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and its record."""

    ids: Sequence[int]
    text: str
    # of the data set; ``answer`` is the reference completion unless it has one
    record: Mapping[str, Any]
    where: str  # for errors


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptData(Stream):
    """Prompts of a run as an endless stream.

    Attributes:
      source: the records.
      indices: record of each prompt.
      items: prompts with reference completions.
      samples: rows of a prompt.
      updates: batches in a row with the same prompts.
      length: positions of a row, those of the longest prompt plus the sample.
      dropped: records whose prompt is too long.
      seed: of the order.
    """

    source: Source
    indices: np.ndarray
    items: Sequence[CompletionItem | ChoiceItem]
    samples: int
    updates: int
    length: int
    dropped: int
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """Returns the number of rows with every prompt once."""
        return len(self.items) * self.samples * self.updates

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest prompt."""
        return max(len(item.prompt_ids) for item in self.items)

    @property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts."""
        content = hashlib.sha256()
        for item in self.items:
            ids = np.array([len(item.prompt_ids), *item.prompt_ids], np.int32)
            content.update(ids.tobytes())
        return f"{content.hexdigest()}:{self.samples}:{self.updates}:{self.seed}"

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        steps = round(self.rows_per_epoch / self.batch_size, 2)
        return {
            "prompts": len(self.items),
            "dropped": self.dropped,
            "steps_per_epoch": steps,
        }

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the place of each row's prompt, ``prompt [len(rows)]``, and the rows' tokens,
        positions and segments ``[len(rows), length]``."""
        places = [self._place(row) for row in rows]
        tokens = np.zeros((len(rows), self.length), np.int32)
        segments = np.zeros_like(tokens)
        for row, place in enumerate(places):
            ids = self.items[place].prompt_ids
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
        return {
            "prompt": np.array(places, np.int32),
            "tokens": tokens,
            "positions": np.arange(self.length, dtype=np.int32)[None] * segments,
            "segment_ids": segments,
        }

    def prompts(self, places: Sequence[int]) -> list[PromptRecord]:
        """Returns the prompts at ``places``, which ``prompt`` of the arrays holds."""
        indices = [int(self.indices[place]) for place in places]
        items = [self.items[place] for place in places]
        return _with_records(self.source, indices, items)

    def others(self, step: int, attempt: int, count: int) -> np.ndarray:
        """Returns places of prompts that replace others in a step; ``attempt`` counts the
        replacements."""
        return permutation(len(self.items), self.seed, _OTHERS, step, attempt)[:count]

    def _place(self, row: int) -> int:
        """Returns the place among `items` of the prompt of a row of the stream."""
        batch, row_of_batch = divmod(row, self.batch_size)
        # Batches of the same rollout have the same rows.
        rollout = batch // self.updates
        number = (rollout * self.batch_size + row_of_batch) // self.samples
        epoch, place = divmod(number, len(self.items))
        return int(epoch_order(len(self.items), self.seed, epoch)[place])


def prompt_data(
    records: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    rl: RLConfig,
    context: int,
    batch_size: int,
    accumulate: int,
    seed: int,
    written: PromptText | None = None,
) -> PromptData:
    """Tokenizes the prompts of records.

    Args:
      records: with a prompt and a reference completion, as for training on text.
      config: names of the fields; ``max_length`` is the limit of prompt plus sample. Longer prompts
        are left out, with ``too_long`` "error" refused.
      tokenizer: tokenizer of the model.
      rl: number and limit of the samples.
      context: maximum tokens of the model.
      batch_size: samples of a step.
      accumulate: micro-batches of a step.
      seed: of the order.
      written: returns the text of a record's prompt; None: that of training on text.

    Raises:
      NaloraError: bad records, or no prompt that fits.
    """
    order = permutation(len(records), seed, 0)[: config.train_limit or None].tolist()
    limit = min(config.max_length or context, context) - rl.max_new_tokens
    indices, items = _fitting(records, sorted(order), config, tokenizer, limit, written)
    length = config.max_length
    if not length:  # of the longest row, rounded up to a multiple of 8
        longest = max(len(item.prompt_ids) for item in items) + rl.max_new_tokens
        length = min(-(-longest // 8) * 8, context)
    return PromptData(
        batch_size=batch_size,
        accumulate=accumulate,
        rows=tuple(range(batch_size // accumulate)),
        workers=config.workers,
        source=records,
        indices=np.array(indices),
        items=items,
        samples=rl.samples,
        updates=rl.updates,
        length=length,
        dropped=len(order) - len(items),
        seed=seed,
    )


def held_out_prompts(
    records: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    limit: int,
    written: PromptText | None = None,
) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Returns held-out prompts in two lists: for reported results, and to choose a checkpoint.

    Args:
      records: the held-out records.
      config: names of the fields, ``eval_limit`` and ``select_limit``.
      tokenizer: tokenizer of the model.
      limit: tokens of a prompt.
      written: as for `prompt_data`.

    Raises:
      NaloraError: bad records, or fewer than two.
    """
    held_out = held_out_indices(records, config)
    indices, items = _fitting(records, held_out, config, tokenizer, limit, written)
    prompts = _with_records(records, indices, items)
    return split_questions(prompts, config.eval_limit, config.select_limit)


def _fitting(
    records: Source,
    indices: Sequence[int],
    config: DataConfig,
    tokenizer: Tokenizer,
    limit: int,
    written: PromptText | None = None,
) -> tuple[list[int], list[Any]]:
    """Returns the indices of the records whose prompts have at most ``limit`` tokens, and their
    examples.

    Raises: NaloraError: no prompt fits, or one does not and ``config.too_long`` is "error".
    """
    whole = replace(config, max_length=0, loss_last=0.0)  # an example is not divided
    kept = []
    items = []
    examples: Sequence[Any]
    if written is None:
        examples = examples_at(records, indices, whole, tokenizer)
    else:
        examples = _written(records, indices, config, tokenizer, written)
    for index, item in zip(indices, examples, strict=True):
        if len(item.prompt_ids) <= limit:
            kept.append(index)
            items.append(item)
        elif config.too_long == "error":
            raise NaloraError(
                records.where(index),
                expected=f"a prompt of at most {limit} tokens, "
                "--data.max-length minus --rl.max-new-tokens",
                found=len(item.prompt_ids),
                remedy="raise --data.max-length, or leave such prompts out with "
                '--data.too-long "drop"',
            )
    if not items:
        raise NaloraError(
            records.name,
            expected=f"prompts of at most {limit} tokens",
            found="none",
            remedy="raise --data.max-length or lower --rl.max-new-tokens",
        )
    if len(items) < len(indices):
        text = "%s: left out %d of %d prompts, longer than %d tokens"
        log.warning(text, records.name, len(indices) - len(items), len(indices), limit)
    return kept, items


def _written(
    records: Source,
    indices: Sequence[int],
    config: DataConfig,
    tokenizer: Tokenizer,
    written: PromptText,
) -> list[CompletionItem]:
    """Returns an item without a completion for each record; see `prompt_data`."""
    items = []
    for index, record in zip(indices, records.read(list(indices)), strict=True):
        text = written(record, records.where(index))
        ids = tokenizer.encode(text, special=False)
        items.append(CompletionItem(ids, [], text, _reference(record, config)))
    return items


def _reference(record: Record, config: DataConfig) -> str:
    """Returns the reference completion of a record, "" if it has none."""
    completion = record.get(config.completion_field)
    if isinstance(completion, str):
        return completion
    messages = canonical(record, config, "record").get(config.messages_field)
    if not isinstance(messages, list) or not messages:
        return ""
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return ""
    return str(last.get("content") or "")


def answered(record: Record, config: DataConfig) -> Record:
    """Returns a record with ``answer``, its reference completion unless it has that field."""
    return {"answer": _reference(record, config), **record}


# ---------------------------------------------------------------- chats as prompts


def is_chat_prompt(record: Record, config: DataConfig) -> bool:
    """Returns True if a record is a chat that the model continues: its last message is not the
    assistant's."""
    prompt = record.get(config.prompt_field)
    if isinstance(prompt, list) and not isinstance(
        record.get(config.completion_field), list
    ):
        return True
    messages = canonical(record, config, "record").get(config.messages_field)
    if not isinstance(messages, list) or not messages:
        return False
    last = messages[-1]
    return isinstance(last, dict) and last.get("role") != "assistant"


def chat_prompts(config: DataConfig, tokenizer: Tokenizer, system: str) -> PromptText:
    """Returns the function for `prompt_data` that renders the prompts of chats.

    Args:
      config: names of the fields, and ``chat``.
      tokenizer: with the chat template.
      system: system prompt of chats that have none; "": the template's own.
    """

    def text(record: Record, where: str) -> str:
        messages, tools = opening_messages(record, config, where)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)

    return text


def opening_messages(
    record: Record, config: DataConfig, where: str, flag: str = "--rl.system-prompt"
) -> tuple[list[Message], list[Record] | None]:
    """Returns the messages of a record before the completion, and the schemas of its tools.

    ``flag`` is the setting that needs a chat.

    Raises:
      NaloraError: bad messages, none before the completion, or a plain text without ``chat``.
    """
    tools = tools_of(record, where)
    prompt = record.get(config.prompt_field)
    if isinstance(prompt, list):
        record = type(record)({config.messages_field: prompt})
    record = canonical(record, config, where)
    if config.messages_field not in record:
        prompt = record.get(config.prompt_field)
        if not isinstance(prompt, str) or not config.chat:
            raise NaloraError(
                where,
                expected=f"a chat, since {flag} is a message of one",
                found="a plain text",
                remedy="pass --data.chat: prompts are then messages of the user",
            )
        return [{"role": "user", "content": prompt}], tools
    messages = messages_of(record, config, where)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or any(isinstance(m["content"], Parts) for m in messages):
        raise NaloraError(
            where,
            expected="a chat of texts with a message before the completion",
            found=f"{len(messages)} messages",
        )
    return messages, tools


def _with_records(
    records: Source, indices: Sequence[int], items: Sequence[Any]
) -> list[PromptRecord]:
    """Returns one prompt per index, with the fields of its record; ``items[i]`` is made from the
    record at ``indices[i]``. A field ``answer`` of the record replaces the item's answer."""
    prompts = []
    read = records.read(list(indices))
    for index, record, item in zip(indices, read, items, strict=True):
        if isinstance(item, ChoiceItem):
            answer = item.choices[item.gold]
        else:
            answer = item.completion
        record = {"answer": answer, **record}
        where = records.where(index)
        prompts.append(PromptRecord(item.prompt_ids, item.prompt, record, where))
    return prompts
