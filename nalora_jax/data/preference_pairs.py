"""Preference pairs: records with a prompt, a chosen and a rejected completion, as packed sequences.

A pair is packed as one unit with two segments, each a copy of the prompt and a completion, the
chosen first:

    tokens        p p c c p p r | p c p r r        two pairs in a row
    segment_ids   1 1 1 1 2 2 2 | 3 3 4 4 4        odd: chosen, even: rejected

A record of a loss without pairs has a completion and a label. It is packed in the same way: its
second segment is its prompt with the completion of the record before it, by which the loss
estimates how far the policy has moved.
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
from nalora_jax.data.source import Record, Source, SourceView
from nalora_jax.data.tokenize import Example, tokenize_texts
from nalora_jax.errors import NaloraError
from nalora_jax.ops.preference_losses import LOSSES

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreferencePair:
    """A tokenized prompt with both completions, whose tokens are marked."""

    chosen: Example
    rejected: Example
    prompt: str  # text, for display
    texts: tuple[str, str]  # of the completions
    desirable: bool = True  # the label of a record without a pair


# Field that `LabeledSource` adds: the completion of another record.
_OTHER = "completion_of_another"


class LabeledSource(SourceView):
    """Records with a completion and a label, each with the completion of the record before it.

    Raises:
      NaloraError: on reading, a record without completion or without a label.
    """

    def __init__(self, base: Source, config: DataConfig, label_field: str) -> None:
        """Stores the names of the fields."""
        super().__init__(base)
        self._completion = config.completion_field
        self._label = label_field

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Returns the records at ``indices``; the one before the first is the last."""
        before = [(index - 1) % len(self) for index in indices]
        own = super().read(indices)
        others = super().read(before)
        records = []
        for place, record in enumerate(own):
            where = self.where(indices[place])
            self._check(record, where)
            self._check(others[place], self.where(before[place]))
            records.append(record | {_OTHER: others[place][self._completion]})
        return records

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the labels of records, bool ``[n]``."""
        records = self.read(indices)
        return np.array([bool(record[self._label]) for record in records])

    def _check(self, record: Record, where: str) -> None:
        """Raises NaloraError for a record without a completion, or without a label."""
        shape = "records with a prompt, a completion and a label"
        if self._completion not in record:
            raise NaloraError(
                where,
                expected=f"a field {self._completion!r}",
                found=f"the fields {', '.join(record)}",
                remedy=f'--preference.loss kto reads {shape}; pairs are for "dpo"',
            )
        completion = record[self._completion]
        if isinstance(completion, str) and not completion.strip():
            raise NaloraError(
                f"{where}: {self._completion}",
                expected="an answer",
                found="an empty text",
            )
        label = record.get(self._label)
        if label not in (0, 1):
            raise NaloraError(
                f"{where}: {self._label}",
                expected="true for a desirable completion or false",
                found=repr(label),
                remedy="see --preference.label-field",
            )


def _form_of_loss(
    source: Source, config: DataConfig, preference: PreferenceConfig
) -> tuple[Source, PreferenceConfig]:
    """Returns records with two completions, and settings that name their fields."""
    if LOSSES[preference.loss].has_pairs:
        return source, preference
    labeled = LabeledSource(source, config, preference.label_field)
    named = replace(
        preference, chosen_field=config.completion_field, rejected_field=_OTHER
    )
    return labeled, named


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


def render_pair(
    record: dict[str, Any],
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    where: str,
) -> list[Rendered]:
    """Returns the prompt with each completion of a record, the chosen one first.

    A question with choices has its right choice and the next other one as completions.

    Raises:
      NaloraError: a field is missing or of the wrong type, or a completion is empty.
    """
    fields = preference.chosen_field, preference.rejected_field
    is_question = record.get("choices") and not record.get("choice_prompts")
    if is_question and not set(fields) & set(record):
        record = record | dict(zip(fields, _of_choices(record, where), strict=True))
    return [_answer(record, config, name, tokenizer, where) for name in fields]


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
    source, preference = _form_of_loss(source, config, preference)
    has_pairs = LOSSES[preference.loss].has_pairs
    fields = preference.chosen_field, preference.rejected_field
    config = replace(config, loss_on="answer")

    def render(record: dict[str, Any], where: str) -> tuple[list[Rendered], bool]:
        """Returns the texts of a record, the chosen one first, and its label."""
        texts = render_pair(record, config, preference, tokenizer, where)
        return texts, has_pairs or bool(record[preference.label_field])

    for index, texts, examples, desirable in tokenize_texts(
        source, indices, render, tokenizer
    ):
        where = source.where(index)
        for name, example in zip(fields, examples, strict=True):
            if not example.has_target:
                raise NaloraError(
                    f"{where}: {name}", expected="a token after the first", found="none"
                )
        chosen, rejected = examples
        if has_pairs and np.array_equal(chosen.ids, rejected.ids):
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
        yield PreferencePair(chosen, rejected, prompt, (first, second), desirable)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairData(TrainData):
    """Training rows of a run on pairs; its store has both segments of a pair, the chosen first.

    Attributes:
      desirable: labels of records without pairs, bool ``[records]``; None with pairs.
    """

    noun: ClassVar[str] = "pairs"
    group: ClassVar[int] = 2
    desirable: np.ndarray | None = None

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
        if self.desirable is not None:
            digest.update(self.desirable.tobytes())
        packed = int(self.pattern.rows < len(self.pattern.lengths))
        return (
            f"pairs:{digest.hexdigest()}:{self.pattern.capacity}:{packed}:{self.seed}"
        )

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the text arrays, and ``pairs`` ``[len(rows), pairs_per_row]``: 1 for each pair in
        a row; with labels also ``desirable``, of the same shape."""
        flat = super().arrays(rows)
        counts = np.array([len(self.records_of(index)) for index in rows])
        is_pair = np.arange(self.pairs_per_row)[None, :] < counts[:, None]
        flat["pairs"] = is_pair.astype(np.float32)
        if self.desirable is not None:
            labels = np.zeros_like(flat["pairs"])
            for row, index in enumerate(rows):
                labels[row, : counts[row]] = self.desirable[self.records_of(index)]
            flat["desirable"] = labels
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

    form, named = _form_of_loss(source, config, preference)
    options |= {
        "chosen": named.chosen_field,
        "rejected": named.rejected_field,
    }
    data = packed_data(
        source, config, tokenizer, kind=PairData, examples=examples, **options
    )
    assert isinstance(data, PairData)
    if not isinstance(form, LabeledSource):
        return data
    desirable = form.labels(data.store.records[:: PairData.group].tolist())
    _check_classes(desirable, f"{source.name}: {preference.label_field}")
    return replace(data, desirable=desirable)


def _check_classes(desirable: np.ndarray, where: str) -> None:
    """Raises NaloraError if all labels are equal."""
    if desirable.all() or not desirable.any():
        value = str(bool(desirable[0])).lower()
        raise NaloraError(
            where,
            expected="records with true and others with false",
            found=f"{value} in each of {len(desirable)} records",
            remedy="add records of the other class, or train on good completions without a "
            "preference loss",
        )


def pairs_digest(pairs: Iterable[PreferencePair]) -> str:
    """Returns the SHA-256 of pairs and labels; equal for equal pairs in the same order."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        for example in (pair.chosen, pair.rejected):
            sha256.update(example.ids.tobytes() + example.answer.tobytes() + b"|")
        if not pair.desirable:
            sha256.update(b"undesirable")
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
