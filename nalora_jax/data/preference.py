"""Preference pairs: records with a prompt, a chosen and a rejected completion, as packed sequences.

A pair is packed as one unit with two segments, each a copy of the prompt and a completion, the
chosen first:

    tokens        p p c c p p r | p c p r r        two pairs in a row
    segment_ids   1 1 1 1 2 2 2 | 3 3 4 4 4        odd: chosen, even: rejected
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.common.notes import counting
from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data.chat import (
    Message,
    Rendered,
    as_messages,
    messages_of,
    render_chat,
    text_field,
)
from nalora_jax.data.packing import fill_rows, pack, permutation
from nalora_jax.data.pipeline import HostBatch, PackedStream, drawn, rows_read, stream_figures
from nalora_jax.data.source import Source
from nalora_jax.data.store import UNLIMITED, Counts, advice, report_dropped
from nalora_jax.data.tokenize import Example, broken_records, fit_example, tokenize
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

_SEED = 20260101  # of the held-out draw: the same in every run
_CHUNK = 1024  # records that are rendered and tokenized together


@dataclass(frozen=True)
class Pair:
    """A tokenized prompt with both completions, whose tokens are marked."""

    chosen: Example
    rejected: Example
    prompt: str  # text, for display
    texts: tuple[str, str]  # of the completions

    @property
    def positions(self) -> int:
        """Returns the row positions of both segments; the last token of each is only a target."""
        return len(self.chosen.ids) + len(self.rejected.ids) - 2


def render_pair(
    record: dict[str, Any],
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    where: str,
) -> tuple[Rendered, Rendered]:
    """Returns the texts of both completions, each after the prompt; only completions count.

    Example:
      {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
      {"prompt": [{"role": "user", "content": "2 + 2?"}],
       "chosen": [{"role": "assistant", "content": "4"}], ...}
      {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}
      (the last has whole conversations)

    A question with ``choices`` and ``gold`` (a task of this library) becomes the pair of its
    correct choice and the first choice after it in the list with another text.

    Raises:
      NaloraError: a field is missing or of the wrong type, or a completion is empty.
    """
    fields = preference.chosen_field, preference.rejected_field
    if not set(fields) & set(record) and record.get("choices") and not record.get("choice_prompts"):
        record = record | dict(zip(fields, _of_choices(record, where), strict=True))
    first, second = (_answer(record, config, name, tokenizer, where) for name in fields)
    return first, second


def _of_choices(record: dict[str, Any], where: str) -> tuple[str, str]:
    choices, gold = record["choices"], record.get("gold")
    if not isinstance(gold, int) or len(choices) < 2 or not 0 <= gold < len(choices):
        expected = f"the index of one of {len(choices)} choices"
        raise NaloraError(f"{where}: gold", expected=expected, found=repr(gold))
    others = [choice for choice in (*choices[gold + 1 :], *choices[:gold]) if choice != choices[gold]]
    if not others:
        raise NaloraError(f"{where}: choices", expected="two that differ", found=repr(choices[gold]))
    return f" {choices[gold]}", f" {others[0]}"


def _answer(
    record: dict[str, Any], config: DataConfig, name: str, tokenizer: Tokenizer, where: str
) -> Rendered:
    if name not in record:
        flag = "--preference.chosen-field or --preference.rejected-field"
        text_field(record, name, where, flag)
    prompt, answer = record.get(config.prompt_field), record[name]
    if isinstance(answer, list | dict) or isinstance(prompt, list | dict):
        turns = _messages(record, name, where, "assistant")
        if prompt is not None:
            turns = [*_messages(record, config.prompt_field, where, "user"), *turns]
        return render_chat(turns, "answer", tokenizer, where)
    before_text = text_field(record, config.prompt_field, where, "--data.prompt-field")
    if not text_field(record, name, where).strip():
        raise NaloraError(f"{where}: {name}", expected="an answer", found="an empty text")
    if config.chat:
        return render_chat(as_messages(before_text, answer), "answer", tokenizer, where)
    text = before_text + answer
    return Rendered(text, ((len(before_text), len(text)),), special=True)


def _messages(record: dict[str, Any], name: str, where: str, role: str) -> list[Message]:
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
) -> Iterator[Pair]:
    """Yields the pairs of the records at ``indices``, not yet cut.

    Raises:
      NaloraError: a record is not a pair, or both of its completions are equal.
    """

    def texts_of(record: dict[str, Any], where: str) -> tuple[Rendered, Rendered]:
        return render_pair(record, config, preference, tokenizer, where)

    with counting("tokenizing", len(indices)) as done:
        for start in range(0, len(indices), _CHUNK):
            chunk = [int(index) for index in indices[start : start + _CHUNK]]
            try:
                records = zip(chunk, source.read(chunk), strict=True)
                texts = [texts_of(record, source.where(index)) for index, record in records]
            except NaloraError as error:
                raise broken_records(error, source, indices[start:], texts_of) from error
            examples = iter(tokenize([text for pair in texts for text in pair], tokenizer))
            for index, pair in zip(chunk, texts, strict=True):
                yield _pair(pair, next(examples), next(examples), source.where(index))
            done(len(chunk))


def _pair(texts: tuple[Rendered, Rendered], chosen: Example, rejected: Example, where: str) -> Pair:
    for name, example in (("chosen", chosen), ("rejected", rejected)):
        if not example.has_target:
            raise NaloraError(f"{where}: {name}", expected="a token after the first", found="none")
    if np.array_equal(chosen.ids, rejected.ids):
        expected = "two answers that differ"
        raise NaloraError(where, expected=expected, found="the same one twice", remedy="remove it")
    ((start, _),) = texts[0].answers
    answers = [text.text[slice(*text.answers[0])] for text in texts]
    return Pair(chosen, rejected, texts[0].text[:start], (answers[0], answers[1]))


@dataclass(frozen=True)
class PairData(PackedStream):
    """Training rows of a run on pairs; the counterpart of `nalora_jax.data.pipeline.TrainData`."""

    tokens: np.ndarray  # int32, prompt + completion: chosen, rejected, chosen, ...
    answer: np.ndarray  # uint8, 1 for tokens of a completion
    offsets: np.ndarray  # int64 [2 * pairs + 1], start of each segment
    counts: Counts

    @property
    def lengths(self) -> np.ndarray:
        """Returns the row positions of each pair."""
        return pair_lengths(self.offsets)

    @property
    def pairs_per_row(self) -> int:
        """Returns the maximum number of pairs in a row."""
        return int(np.diff(self.pattern.starts).max())

    @cached_property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.answer, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        packed = int(self.pattern.rows < len(self.pattern.lengths))
        return f"pairs:{digest.hexdigest()}:{self.pattern.capacity}:{packed}:{self.seed}"

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        return stream_figures("pairs", self.counts, self.pattern, self.batch_size)

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the text arrays, and ``pairs`` ``[len(rows), pairs_per_row]``: 1 for each pair in a row."""
        pairs = [self.records_of(index) for index in rows]
        examples = [np.stack([2 * row, 2 * row + 1], axis=1).ravel() for row in pairs]
        flat = fill_rows(examples, self.tokens, self.answer, self.offsets, self.pattern.capacity)
        counts = np.array([len(row) for row in pairs])
        flat["pairs"] = (np.arange(self.pairs_per_row)[None, :] < counts[:, None]).astype(np.float32)
        return flat


def pair_lengths(offsets: np.ndarray) -> np.ndarray:
    """Returns the row positions of each pair, int64 [pairs]."""
    return (np.diff(offsets) - 1).reshape(-1, 2).sum(axis=1)


def pair_data(
    source: Source,
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    accumulate: int = 1,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    context: int = UNLIMITED,
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
      batch_size: rows per step over all hosts.
      accumulate: micro-batches per step.
      seed: seed of the shuffle.
      rows: rows of a micro-batch that this process reads; all by default.
      context: maximum tokens of the model; a row has two texts.

    Raises:
      NaloraError: bad records, most pairs do not fit, or ``accumulate`` does not divide the batch.
    """
    rows = rows_read(rows, batch_size, accumulate)
    indices = np.arange(len(source))
    if 0 < config.train_limit < len(source):
        indices = np.sort(permutation(len(source), seed)[: config.train_limit])
    examples, dropped, truncated, longest = _fitting(
        source, indices.tolist(), config, preference, tokenizer, 2 * context
    )
    tokens = np.concatenate([example.ids for example in examples]).astype(np.int32)
    answer = np.concatenate([example.answer for example in examples]).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(example.ids) for example in examples])]).astype(np.int64)
    targets = sum(int(example.answer[1:].sum()) for example in examples)
    counts = Counts(len(examples) // 2, dropped, truncated, len(tokens), targets, longest + 1)
    report_dropped(source.name, counts, config, 2 * context, "truncate")
    pattern = pack(pair_lengths(offsets), config.max_length, several=config.pack)
    return PairData(
        tokens,
        answer,
        offsets,
        counts,
        pattern=pattern,
        seed=seed,
        batch_size=batch_size,
        accumulate=accumulate,
        rows=rows,
        workers=config.workers,
    )


def _fitting(
    source: Source,
    indices: list[int],
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    context: int,
) -> tuple[list[Example], int, int, int]:
    """Returns both segments of each pair that fits a row.

    Also returns the numbers of dropped and cut pairs, and the positions of the longest pair.
    """
    fitting: list[Example] = []
    dropped = truncated = longest = 0
    pairs = tokenize_pairs(source, indices, config, preference, tokenizer)
    for index, pair in zip(indices, pairs, strict=True):
        longest = max(longest, pair.positions)
        examples = [pair.chosen, pair.rejected]
        if pair.positions > config.max_length:
            if config.too_long == "error":
                expected = f"at most --data.max-length {config.max_length} tokens in both answers with their prompts"
                raise NaloraError(source.where(index), expected=expected, found=pair.positions)
            if config.too_long == "drop":
                dropped += 1
                continue
            truncated += 1
            examples = [
                fit_example(example, config.max_length // 2, tokenizer.bos_id) for example in examples
            ]
        fitting += examples
    if not fitting:
        actual = f"{dropped} pairs, all of them longer"
        remedy = advice(longest, context, "truncate")
        raise NaloraError(
            source.name,
            expected=f"pairs of at most {config.max_length} tokens",
            found=actual,
            remedy=remedy,
        )
    return fitting, dropped, truncated, longest


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """Returns the SHA-256 of pairs; equal for equal pairs in the same order."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        for example in (pair.chosen, pair.rejected):
            sha256.update(example.ids.tobytes() + example.answer.tobytes() + b"|")
    return sha256.hexdigest()


def pair_sizes(
    source: Source, config: DataConfig, tokenizer: Tokenizer, preference: PreferenceConfig
) -> np.ndarray:
    """Returns the row positions of pairs, int64 [n]; of more than 10,000, those of a fixed draw."""
    pairs = tokenize_pairs(source, drawn(source).tolist(), config, preference, tokenizer)
    return np.array([pair.positions for pair in pairs], np.int64)


def held_out_pairs(
    records: Source,
    config: DataConfig,
    preference: PreferenceConfig,
    tokenizer: Tokenizer,
    context: int,
) -> tuple[list[Pair], list[Pair]]:
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
    count = config.eval_limit + config.select_limit if config.eval_limit else len(records)
    indices = np.sort(permutation(len(records), _SEED)[:count]).tolist()
    pairs = list(tokenize_pairs(records, indices, config, preference, tokenizer))
    pairs = [pair for pair in pairs if max(len(pair.chosen.ids), len(pair.rejected.ids)) <= context]
    if len(pairs) < 2:
        raise NaloraError("--data.eval-split", expected="at least two pairs", found=len(pairs))
    order = permutation(len(pairs), _SEED + 1).tolist()
    cut = max(1, min(config.select_limit, len(pairs) // 3))
    reported = order[cut:][: config.eval_limit or None]
    return [pairs[i] for i in sorted(reported)], [pairs[i] for i in sorted(order[:cut])]
