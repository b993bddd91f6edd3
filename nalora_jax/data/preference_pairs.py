"""Preference pairs: records with a prompt, a chosen and a rejected completion, as packed sequences.

A pair is packed as one unit with two segments, each a copy of the prompt and a completion, the
chosen first:

    tokens        p p c c p p r | p c p r r        two pairs in a row
    segment_ids   1 1 1 1 2 2 2 | 3 3 4 4 4        odd: chosen, even: rejected
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data.chat_text import (
    Message,
    Rendered,
    messages_of,
    render_chat,
    render_completion,
    text_field,
)
from nalora_jax.data.pipeline import HostBatch, TrainData, packed_data
from nalora_jax.data.questions import gold_of, held_out_indices, split_questions
from nalora_jax.data.source import Source
from nalora_jax.data.tokenize import Example, tokenized_texts
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreferencePair:
    """A tokenized prompt with both completions, whose tokens are marked."""

    chosen: Example
    rejected: Example
    prompt: str  # text, for display
    texts: tuple[str, str]  # of the completions


def _of_choices(record: dict[str, Any], where: str) -> tuple[str, str]:
    """Returns the completions of a pair from a question: the right choice, and the first one after
    it with another text. The list is read as a circle."""
    choices = record["choices"]
    gold = gold_of(record, where)
    right = choices[gold]
    following = [*choices[gold + 1 :], *choices[:gold]]
    others = [choice for choice in following if choice != right]
    if not others:
        raise NaloraError(
            f"{where}: choices", expected="two that differ", found=repr(right)
        )
    return f" {right}", f" {others[0]}"


def _answer(
    record: dict[str, Any],
    config: DataConfig,
    name: str,
    tokenizer: Tokenizer,
    where: str,
) -> Rendered:
    """Returns the text of a record's prompt with one of its completions, which is marked.

    Args:
      record: has texts, or chat messages.
      config: names of the fields, and ``chat``.
      name: field of the completion; its messages may contain the prompt.
      tokenizer: renders chat templates.
      where: names the record in messages.

    Raises: NaloraError: a field is missing or of the wrong type, or the completion is empty.
    """
    prompt = record.get(config.prompt_field)
    # TFDS stores messages as a dict of lists.
    is_chat = isinstance(record.get(name), list | dict)
    if name in record and isinstance(prompt, list | dict):
        is_chat = True
    if is_chat:
        turns = _messages(record, name, where, "assistant")
        if prompt is not None:
            turns = [*_messages(record, config.prompt_field, where, "user"), *turns]
        return render_chat(turns, "answer", tokenizer, where)
    flags = "--preference.chosen-field or --preference.rejected-field"
    completion = text_field(record, name, where, flags)
    text = text_field(record, config.prompt_field, where, "--data.prompt-field")
    if not completion.strip():
        raise NaloraError(
            f"{where}: {name}", expected="an answer", found="an empty text"
        )
    return render_completion(text, completion, config, tokenizer, where)


def _messages(
    record: dict[str, Any], name: str, where: str, role: str
) -> list[Message]:
    """Returns the messages of a field; a text becomes one message of ``role``."""
    if isinstance(record[name], str):
        return [{"role": role, "content": text_field(record, name, where)}]
    return messages_of(record, DataConfig(messages_field=name), where)


def tokenize_pairs(
    source: Source,
    indices: Sequence[int],
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
) -> Iterator[PreferencePair]:
    """Yields the pairs of the records at ``indices``, not yet cut.

    Example:
      {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
      {"prompt": [{"role": "user", "content": "2 + 2?"}],
       "chosen": [{"role": "assistant", "content": "4"}], ...}
      {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
      (the last has whole conversations)

    A question with ``choices`` and ``gold`` (a task of this library) becomes the pair of its
    correct choice and the first choice after it in the list with another text.

    Raises:
      NaloraError: a record is not a pair, a field is of the wrong type, a completion is empty, or
        both are equal.
    """
    fields = preference.chosen_field, preference.rejected_field
    config = replace(config, loss_on="answer")

    def render(record: dict[str, Any], where: str) -> tuple[list[Rendered], None]:
        """Returns the texts of a record, the chosen one first."""
        is_question = record.get("choices") and not record.get("choice_prompts")
        if is_question and not set(fields) & set(record):
            record = record | dict(zip(fields, _of_choices(record, where), strict=True))
        texts = [_answer(record, config, name, tokenizer, where) for name in fields]
        return texts, None

    for index, texts, examples, _ in tokenized_texts(
        source, indices, render, tokenizer
    ):
        where = source.where(index)
        for name, example in zip(("chosen", "rejected"), examples, strict=True):
            if not example.has_target:
                raise NaloraError(
                    f"{where}: {name}", expected="a token after the first", found="none"
                )
        chosen, rejected = examples
        if np.array_equal(chosen.ids, rejected.ids):
            raise NaloraError(
                where,
                expected="two answers that differ",
                found="the same one twice",
                remedy="remove it",
            )
        completions = []
        for text in texts:
            start, stop = text.answers[0]
            completions.append(text.text[start:stop])
        begin, _ = texts[0].answers[0]
        prompt = texts[0].text[:begin]
        first, second = completions
        yield PreferencePair(chosen, rejected, prompt, (first, second))


@dataclass(frozen=True, eq=False, kw_only=True)
class PairData(TrainData):
    """Training rows of a run on pairs; its store has both segments of a pair, the chosen first."""

    noun: ClassVar[str] = "pairs"
    group: ClassVar[int] = 2

    @property
    def pairs_per_row(self) -> int:
        """Returns the maximum number of pairs in a row."""
        return int(np.diff(self.pattern.starts).max())

    @cached_property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""
        digest = hashlib.sha256()
        for array in (self.store.tokens, self.store.answer, self.store.offsets):
            digest.update(array.tobytes())
        packed = int(self.pattern.rows < len(self.pattern.lengths))
        return (
            f"pairs:{digest.hexdigest()}:{self.pattern.capacity}:{packed}:{self.seed}"
        )

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the text arrays, and ``pairs`` ``[len(rows), pairs_per_row]``: 1 for each pair in
        a row."""
        flat = super().arrays(rows)
        counts = np.array([len(self.records_of(index)) for index in rows])
        is_pair = np.arange(self.pairs_per_row)[None, :] < counts[:, None]
        flat["pairs"] = is_pair.astype(np.float32)
        return flat


def pair_data(
    source: Source,
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    **options: Any,
) -> PairData:
    """Tokenizes and packs the pairs of ``source``.

    A row of ``max_length`` positions holds both segments of a pair. ``config.too_long`` decides if
    longer pairs are dropped, refused or cut. In a pair that is cut, each completion with its prompt
    takes half a row.

    Args:
      source: the records.
      config: how text becomes rows.
      preference: names of the fields.
      tokenizer: tokenizer of the model.
      options: passed to `packed_data`.

    Raises:
      NaloraError: bad records, most pairs do not fit, or ``accumulate`` does not divide the batch.
    """

    def examples(records: Source, indices: np.ndarray) -> Iterator[tuple[int, Example]]:
        """Yields both examples of every pair, with the index of its record."""
        pairs = tokenize_pairs(records, indices.tolist(), config, preference, tokenizer)
        for index, pair in zip(indices.tolist(), pairs, strict=True):
            yield index, pair.chosen
            yield index, pair.rejected

    options |= {
        "chosen": preference.chosen_field,
        "rejected": preference.rejected_field,
    }
    data = packed_data(
        source, config, tokenizer, kind=PairData, examples=examples, **options
    )
    assert isinstance(data, PairData)
    return data


def pairs_digest(pairs: Iterable[PreferencePair]) -> str:
    """Returns the SHA-256 of pairs; equal for equal pairs in the same order."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        for example in (pair.chosen, pair.rejected):
            sha256.update(example.ids.tobytes() + example.answer.tobytes() + b"|")
    return sha256.hexdigest()


def held_out_pairs(
    records: Source,
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    context: int,
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Returns held-out pairs in two lists: for the reported results, and to choose the checkpoint.

    Args:
      records: the held-out records.
      config: limits of the evaluation.
      preference: names of the fields.
      tokenizer: tokenizer of the model.
      context: positions of the model; pairs with a longer text are left out.

    Raises:
      NaloraError: bad records, or fewer than two pairs.
    """
    indices = held_out_indices(records, config)
    fitting = []
    for pair in tokenize_pairs(records, indices, config, preference, tokenizer):
        if max(len(pair.chosen.ids), len(pair.rejected.ids)) <= context:
            fitting.append(pair)
    return split_questions(fitting, config.eval_limit, config.select_limit)
